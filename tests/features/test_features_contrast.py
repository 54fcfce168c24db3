"""The streaming contrast against brute force in memory, statsmodels' clustered regression, and planted features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mechreward.errors import InputError
from mechreward.features import ContrastTable, PooledBatch, contrast, load_contrast, save_contrast


def world(
    n_questions: int = 24,
    n_answers: int = 6,
    n_features: int = 12,
    seed: int = 0,
    planted: dict[int, float] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sparse activations [N, F], labels, questions; `planted` features rise (or fall) where an answer is right. Feature
    n - 1 never fires, feature n - 2 depends on the question alone."""
    rng = np.random.default_rng(seed)
    questions = np.repeat(np.arange(n_questions), n_answers)
    labels = rng.random(len(questions)) < 0.5
    acts = np.maximum(rng.normal(0.3, 1, (len(questions), n_features)), 0)
    for feature, size in (planted or {}).items():
        acts[:, feature] = np.maximum(rng.normal(1.5, 0.7, len(questions)) + size * (labels - 0.5), 0)
    acts[:, -1] = 0
    acts[:, -2] = questions
    return acts.astype(np.float32), labels, questions


def stream(acts: np.ndarray, labels: np.ndarray, questions: np.ndarray, per_batch: int = 5) -> list[PooledBatch]:
    batches = []
    for start in range(0, questions.max() + 1, per_batch):
        rows = (questions >= start) & (questions < start + per_batch)
        ids = [f"q{q}" for q in questions[rows]]
        batches.append(PooledBatch(ids, torch.tensor(labels[rows]), torch.tensor(acts[rows])))
    return batches


def by_id(table: ContrastTable) -> pd.DataFrame:
    return table.frame.sort_values("id").reset_index(drop=True)


def centred(values: np.ndarray, questions: np.ndarray) -> np.ndarray:
    out = values.astype(np.float64).copy()
    for question in np.unique(questions):
        out[questions == question] -= out[questions == question].mean(0)
    return out


def brute_effect(x: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Cohen's d of each column, from a regression with one dummy a question."""
    effects = []
    for column in x.T:
        dummies = pd.get_dummies(questions).to_numpy(float)
        fit = sm.OLS(column.astype(float), np.column_stack([labels.astype(float), dummies])).fit()
        spread = np.sqrt(fit.mse_resid)
        effects.append(fit.params[0] / spread if spread > 1e-9 else 0.0)
    return np.array(effects)


def mixed_rows(labels: np.ndarray, questions: np.ndarray) -> np.ndarray:
    return np.array([len(set(labels[questions == q])) == 2 for q in questions])


def test_equals_brute_force_in_memory() -> None:
    acts, labels, questions = world(n_answers=4, seed=1)
    table = contrast(stream(acts, labels, questions), min_support=0.3)
    kept = mixed_rows(labels, questions)
    assert not kept.all()
    a, y, q = acts[kept].astype(np.float64), labels[kept], questions[kept]
    frame = by_id(table)
    assert (table.n_questions, table.n_mixed, table.n_responses) == (24, len(set(q)), int(kept.sum()))
    np.testing.assert_allclose(frame["effect"], brute_effect(np.log1p(a), y, q), atol=1e-9)
    np.testing.assert_allclose(frame["support"], (a > 0).mean(0))
    np.testing.assert_allclose(frame["support_correct"], (a[y] > 0).mean(0))
    np.testing.assert_allclose(frame["support_wrong"], (a[~y] > 0).mean(0))
    np.testing.assert_allclose(frame["scale"], np.sqrt((centred(a, q) ** 2).sum(0) / (len(a) - len(set(q)))), atol=1e-9)
    assert (np.diff(table.frame["effect"].abs()) <= 0).all()


def shuffled_p(x: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> float:
    """Sum of x over right answers against its mean and variance if they were drawn from each question's answers."""
    above = variance = 0.0
    for question in np.unique(questions):
        values, right = x[questions == question], labels[questions == question]
        n, m = len(values), right.sum()
        above += values[right].sum() - m * values.mean()
        variance += m * (1 - m / n) * values.var(ddof=1)
    return float(2 * stats.norm.sf(abs(above) / variance**0.5))


def test_difference_and_p_equal_a_clustered_regression_or_shuffles() -> None:
    acts, labels, questions = world(seed=2, planted={0: 1.0})
    frame = by_id(contrast(stream(acts, labels, questions)))
    kept = mixed_rows(labels, questions)
    q = questions[kept]
    x, y = centred(np.log1p(acts[kept]), q), centred(labels[kept], q)
    larger = set()
    for feature in range(10):
        fit = sm.OLS(x[:, feature], y).fit(cov_type="cluster", cov_kwds={"groups": q}, use_t=True)
        assert frame["difference"][feature] == pytest.approx(fit.params[0])
        both = [fit.pvalues[0], shuffled_p(np.log1p(acts[kept][:, feature].astype(float)), labels[kept], q)]
        assert frame["p_value"][feature] == pytest.approx(max(both))
        larger.add(both.index(max(both)))
    assert larger == {0, 1}


def test_difference_by_hand() -> None:
    # Right minus wrong of log1p: 1 in one question, 2 in the other; both have one pair, so both weigh the same.
    acts = np.expm1(np.array([[2.0], [1.0], [5.0], [3.0]], dtype=np.float32))
    labels, questions = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
    row = contrast(stream(acts, labels, questions)).frame.iloc[0]
    assert row["difference"] == pytest.approx(1.5)
    # Residuals are +-.25 twice each: variance (4 * .25^2) / (4 answers - 2 questions - 1) = .25.
    assert row["effect"] == pytest.approx(1.5 / 0.5)


def test_q_values_are_benjamini_hochberg_over_tested_features() -> None:
    acts, labels, questions = world(seed=3, planted={0: 1.0, 1: -1.0})
    acts[:, 5] *= np.arange(len(acts)) % 20 == 0
    frame = by_id(contrast(stream(acts, labels, questions), min_support=0.1))
    tested = frame["support"] >= 0.1
    assert not tested[5] and not tested[11] and tested.sum() == 10
    np.testing.assert_allclose(frame["q_value"][tested], multipletests(frame["p_value"][tested], method="fdr_bh")[1])
    assert (frame["q_value"][~tested] == 1).all()


def test_constant_within_questions_is_no_signal() -> None:
    acts, labels, questions = world(seed=4)
    frame = by_id(contrast(stream(acts, labels, questions)))
    for feature in (10, 11):
        row = frame.iloc[feature]
        assert (row["effect"], row["difference"], row["p_value"], row["stability"], row["scale"]) == (0, 0, 1, 0, 0)
    assert np.isfinite(frame.to_numpy()).all()


def test_a_perfect_separator_has_a_finite_effect() -> None:
    acts, labels, questions = world(seed=4)
    acts[:, 0] = labels
    acts[:, 1] = ~labels
    frame = by_id(contrast(stream(acts, labels, questions)))
    assert 100 < frame["effect"][0] < 300 and frame["effect"][1] == pytest.approx(-frame["effect"][0])
    assert frame["p_value"][0] < 1e-10
    assert np.isfinite(frame.to_numpy()).all()


def test_planted_features_are_found_and_stable() -> None:
    acts, labels, questions = world(60, 8, 200, seed=5, planted={7: 1.2, 90: -1.2, 150: 0.9})
    table = contrast(stream(acts, labels, questions), top_k=5)
    top = table.frame.head(3)
    assert set(top["id"]) == {7, 90, 150}
    assert np.sign(by_id(table)["effect"][[7, 90, 150]]).tolist() == [1, -1, 1]
    assert (top["q_value"] < 1e-4).all() and (top["stability"] >= 0.9).all()
    assert (table.frame["stability"][3:] < 0.8).all()


def test_stability_equals_brute_force_over_the_same_halves() -> None:
    acts, labels, questions = world(10, 6, 8, seed=6, planted={0: 1.0})
    acts[:, 3] *= np.arange(len(acts)) % 30 == 0
    table = contrast(stream(acts, labels, questions), halves=6, top_k=2, seed=9, min_support=0.2)
    kept = mixed_rows(labels, questions)
    order = list(dict.fromkeys(questions[kept].tolist()))
    rng, member = np.random.default_rng(9), {}
    for first, second in zip(order[::2], [*order[1::2], None][: len(order[::2])], strict=True):
        coin = rng.random(3) < 0.5
        member[first] = np.concatenate([coin, ~coin])
        member[second] = ~member[first]
    x = np.log1p(acts.astype(np.float64))
    whole = brute_effect(x[kept], labels[kept], questions[kept])
    tested = (acts[kept] > 0).mean(0) >= 0.2
    assert not tested[3]
    hits = np.zeros(8)
    for half in range(6):
        rows = kept & np.array([member[q][half] if q in member else False for q in questions])
        effect = np.where(tested, brute_effect(x[rows], labels[rows], questions[rows]), 0)
        for sign in (1, -1):
            right_sign = [feature for feature in np.argsort(-sign * effect)[:2] if sign * effect[feature] > 0]
            hits[right_sign] += np.sign(whole[right_sign]) == sign
    np.testing.assert_allclose(by_id(table)["stability"], hits / 6)


def test_batching_and_seed() -> None:
    acts, labels, questions = world(seed=7, planted={0: 0.6})
    one = contrast(stream(acts, labels, questions, per_batch=1), seed=1, top_k=3)
    pd.testing.assert_frame_equal(one.frame, contrast(stream(acts, labels, questions, 24), seed=1, top_k=3).frame)
    other = contrast(stream(acts, labels, questions), seed=2, top_k=3)
    assert (one.frame["stability"] != other.frame["stability"]).any()
    pd.testing.assert_series_equal(one.frame["p_value"], other.frame["p_value"])


@pytest.mark.parametrize("n_answers", [2, 8])
def test_p_values_are_uniform_without_signal(n_answers: int) -> None:
    """With two answers a question a Welch test on the centred values would reject .17 of true nulls at .05."""
    acts, _, questions = world(60, n_answers, 400, seed=8)
    labels = np.tile(np.arange(n_answers) % 2 == 0, 60)
    p = by_id(contrast(stream(acts, labels, questions), halves=2))["p_value"][:398]
    assert 0.02 < (p < 0.05).mean() < 0.09
    assert 0.42 < (p < 0.5).mean() < 0.58


@pytest.mark.parametrize("n_questions", [20, 40])
def test_sparse_features_without_signal_are_not_found_where_one_answer_of_eight_is_right(n_questions: int) -> None:
    """A feature that by chance fires in wrong answers alone has nearly the same sum in every question, so that the t
    test takes it for sure: it gives 2 % (20 questions) and 7 % (40) of them a p under .001."""
    acts, labels, questions = world(n_questions, 8, 400, seed=9)
    labels = np.arange(len(labels)) % 8 == 0
    acts *= np.random.default_rng(1).random(acts.shape) < 0.1
    frame = by_id(contrast(stream(acts, labels, questions), halves=2, permutations=0)).iloc[:398]
    tested = frame[frame["support"] >= 0.05]
    assert len(tested) > 200 and (tested["support_correct"] == 0).sum() > 10
    assert (tested["p_value"] < 0.01).mean() < 0.01 and (tested["q_value"] > 0.05).all()


def test_nothing_to_contrast() -> None:
    acts, labels, questions = world(3, 4)
    with pytest.raises(InputError, match="all 12 answers are right, .* use harder questions"):
        contrast(stream(acts, np.ones_like(labels), questions))
    with pytest.raises(InputError, match="all 12 answers are wrong, .* use easier questions"):
        contrast(stream(acts, np.zeros_like(labels), questions))
    with pytest.raises(InputError, match="only 0 of 3 questions have both"):
        contrast(stream(acts, questions == 1, questions))
    one_mixed = (questions == 1) | (np.arange(12) == 0)
    with pytest.raises(InputError, match="only 1 of 3 questions have both"):
        contrast(stream(acts, one_mixed, questions))
    with pytest.raises(InputError, match="there are none"):
        contrast([])


def test_broken_streams() -> None:
    acts, labels, questions = world(4, 4)
    batches = stream(acts, labels, questions, 2)
    with pytest.raises(InputError, match="question q0 comes in two batches"):
        contrast([*batches, batches[0]])
    acts[3, 1] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        contrast(stream(acts, labels, questions))
    with pytest.raises(InputError, match="halves: 3 is not allowed"):
        contrast(batches, halves=3)


def test_table_round_trip(tmp_path: Path) -> None:
    table = contrast(stream(*world()))
    save_contrast(table, tmp_path / "features.parquet")
    back = load_contrast(tmp_path / "features.parquet")
    pd.testing.assert_frame_equal(back.frame, table.frame, check_flags=False)
    assert (back.n_questions, back.n_mixed, back.n_responses) == (table.n_questions, table.n_mixed, table.n_responses)
    assert (back.pooling, back.prompts) == (None, ())
    save_contrast(replace(table, pooling="last_4", prompts=("a", "b")), tmp_path / "told.parquet")
    told = load_contrast(tmp_path / "told.parquet")
    assert (told.pooling, told.prompts) == ("last_4", ("a", "b"))
    with pytest.raises(InputError, match="no file"):
        load_contrast(tmp_path / "none.parquet")


def test_tables_of_before_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "features.parquet"
    table = contrast(stream(*world()))
    frame = table.frame.copy()
    frame.attrs = {n: v for n, v in vars(table).items() if n not in ("frame", "pooling", "prompts")}
    frame.to_parquet(path)
    assert (load_contrast(path).pooling, load_contrast(path).prompts) == (None, ())
    del frame.attrs["n_mixed"]
    frame.to_parquet(path)
    with pytest.raises(InputError, match="not a table as save_contrast writes it"):
        load_contrast(path)
    path.write_bytes(b"garbage")
    with pytest.raises(InputError, match="features: .*features.parquet is not a whole Parquet file"):
        load_contrast(path)
