"""Rank sums, Welch's test, shuffles and blocks of the contrast against scipy, scikit-learn and naive loops."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mechreward.errors import InputError
from mechreward.features import ContrastTable, PooledBatch, contrast
from mechreward.features.halves import HalfSamples, HalfSums
from mechreward.features.mixed import MixedQuestions
from mechreward.features.shuffles import family_p_values
from mechreward.features.slopes import within


def world(sizes: list[int], n_features: int = 8, seed: int = 0, shift: float = 0.0) -> tuple[np.ndarray, ...]:
    """Activations with many ties and zeros, labels (both in each question), questions; column -1 is constant."""
    rng = np.random.default_rng(seed)
    questions = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.concatenate([rng.permutation(np.arange(n) < rng.integers(1, n)) for n in sizes])
    acts = np.maximum(np.round(rng.normal(0.5, 1.5, (len(questions), n_features)) + shift * labels[:, None]), 0)
    acts[:, -1] = 0.3
    return acts.astype(np.float32), labels, questions


def table_of(
    acts: np.ndarray, labels: np.ndarray, questions: np.ndarray, cut: int = 3, **options: int
) -> ContrastTable:
    options = {"halves": 2, "permutations": 0} | options
    rows = [questions // cut == part for part in range(questions.max() // cut + 1)]
    return contrast(
        [PooledBatch([f"q{q}" for q in questions[r]], torch.tensor(labels[r]), torch.tensor(acts[r])) for r in rows],
        **options,
    )


def by_id(table: ContrastTable) -> pd.DataFrame:
    return table.frame.sort_values("id").reset_index(drop=True)


def test_one_question_equals_mannwhitneyu() -> None:
    acts, labels, questions = world([40], seed=1, shift=0.6)
    # A second question without a difference in any feature: it adds nothing to any rank statistic but pairs.
    acts = np.concatenate([acts, np.ones((2, 8), np.float32)])
    labels, questions = np.append(labels, [True, False]), np.append(questions, [1, 1])
    frame = by_id(table_of(acts, labels, questions))
    first = acts[:40].astype(np.float64)
    right, wrong = first[labels[:40]], first[~labels[:40]]
    for feature in range(7):
        found = stats.mannwhitneyu(
            right[:, feature], wrong[:, feature], use_continuity=False, method="asymptotic", alternative="two-sided"
        )
        pairs = len(right) * len(wrong)
        assert frame["rank_p_value"][feature] == pytest.approx(found.pvalue, rel=1e-9)
        assert np.sign(frame["rank_z"][feature]) == np.sign(found.statistic - pairs / 2)
        assert frame["auroc"][feature] == pytest.approx((found.statistic + 0.5) / (pairs + 1))


def naive_ranks(column: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> tuple[float, float]:
    """Van Elteren's z with the tie correction of the textbooks, and the share of pairs in the right order."""
    top = variance = wins = pairs = 0.0
    for question in np.unique(questions):
        x, y = column[questions == question], labels[questions == question]
        n, m = len(x), int(y.sum())
        for a, b in itertools.product(x[y], x[~y]):
            wins, pairs = wins + (a > b) + 0.5 * (a == b), pairs + 1
        _, ties = np.unique(x, return_counts=True)
        correction = (ties**3 - ties).sum() / (n * (n - 1))
        top += (stats.rankdata(x)[y].sum() - m * (n + 1) / 2) / (n + 1)
        variance += m * (n - m) / 12 * ((n + 1) - correction) / (n + 1) ** 2
    return top / variance**0.5, wins / pairs


def test_ranks_over_questions_of_many_sizes_equal_a_naive_loop() -> None:
    acts, labels, questions = world([2, 5, 3, 8, 8, 2, 6, 13], seed=2, shift=0.5)
    frame = by_id(table_of(acts, labels, questions))
    for feature in range(7):
        z, auroc = naive_ranks(acts[:, feature], labels, questions)
        row = frame.iloc[feature]
        assert row["rank_z"] == pytest.approx(z)
        assert row["auroc"] == pytest.approx(auroc)
        assert row["rank_p_value"] == pytest.approx(2 * stats.norm.sf(abs(z)))
    tested = frame["support"] >= 0.05
    assert tested.all()
    np.testing.assert_allclose(frame["rank_q_value"], multipletests(frame["rank_p_value"], method="fdr_bh")[1])


@settings(max_examples=40, deadline=None)
@given(
    acts=arrays(np.float32, (12, 2), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])),
    right=arrays(np.bool_, 12),
)
def test_ranks_of_any_activations(acts: np.ndarray, right: np.ndarray) -> None:
    questions = np.repeat(np.arange(3), 4)
    right[::4], right[1::4] = True, False
    frame = by_id(table_of(acts, right, questions, cut=1))
    flipped = by_id(table_of(acts, ~right, questions, cut=3))
    for feature in range(2):
        if all(np.ptp(acts[questions == q, feature]) == 0 for q in range(3)):
            assert tuple(frame.iloc[feature][["rank_z", "rank_p_value", "auroc"]]) == (0, 1, 0.5)
            continue
        z, auroc = naive_ranks(acts[:, feature], right, questions)
        assert frame["rank_z"][feature] == pytest.approx(z, abs=1e-12)
        assert frame["auroc"][feature] == pytest.approx(auroc)
    np.testing.assert_allclose(frame["rank_z"], -flipped["rank_z"], atol=1e-12)
    np.testing.assert_allclose(frame["effect"], -flipped["effect"], atol=1e-9)


def test_welch_equals_scipy_over_all_answers() -> None:
    acts, labels, questions = world([6, 5, 4, 8], seed=3, shift=0.7)
    frame = by_id(table_of(acts, labels, questions, cut=2))
    x = np.log1p(acts.astype(np.float64))
    found = stats.ttest_ind(x[labels, :7], x[~labels, :7], equal_var=False)
    np.testing.assert_allclose(frame["welch_t"][:7], found.statistic)
    np.testing.assert_allclose(frame["welch_p_value"][:7], found.pvalue)
    # The constant .3 varies by rounding alone.
    assert (frame["welch_t"][7], frame["welch_p_value"][7]) == (0, 1)


def exact_effects(x: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """Cohen's d within questions from the definition, by loops."""
    y, z = labels.astype(float), x.copy()
    for question in np.unique(questions):
        rows = questions == question
        y[rows] -= y[rows].mean()
        z[rows] -= z[rows].mean(0)
    slope = y @ z / (y @ y)
    rest = ((z - np.outer(y, slope)) ** 2).sum(0) / (len(y) - len(np.unique(questions)) - 1)
    return slope / np.sqrt(rest)


def test_shuffles_equal_the_exact_permutation_distribution() -> None:
    """Two questions of 4 with 2 right have 36 labellings: the share of them with so large a maximum, exactly."""
    acts, _, questions = world([4, 4], 5, seed=5)
    acts = (acts + np.random.default_rng(0).random(acts.shape)).astype(np.float32)[:, :4]
    labels = np.array([1, 1, 0, 0, 1, 0, 1, 0], dtype=bool)
    x = np.log1p(acts.astype(np.float64))
    choices = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
    maxima = [
        np.abs(exact_effects(x, np.concatenate(both), questions)).max() for both in itertools.product(choices, choices)
    ]
    table = table_of(acts, labels, questions, permutations=4000, seed=3)
    frame = by_id(table)
    for effect, p in zip(frame["effect"], frame["family_p_value"], strict=True):
        share = np.mean(np.array(maxima) >= abs(effect) - 1e-9)
        assert p == pytest.approx(share, abs=0.03)
    assert 0.05 < frame["family_p_value"].min() < 1
    assert min(abs(table.chance_effect - m) for m in maxima) < 1e-6
    assert np.mean(np.array(maxima) > table.chance_effect + 1e-6) <= 0.06


def test_family_p_counts_shuffles_at_least_as_large() -> None:
    largest, tested = np.array([0.5, 1.0, 2.0]), np.array([True, True, True, False])
    p = family_p_values(np.array([-1.0, 0.4, 3.0, 9.0]), largest, tested)
    assert p.tolist() == [(1 + 2) / 4, 1.0, 1 / 4, 1.0]


def test_family_p_is_rarely_small_without_signal() -> None:
    rng = np.random.default_rng(0)
    least = []
    for _ in range(60):
        acts = rng.random((48, 30)).astype(np.float32)
        labels, questions = np.tile([True, False, True, False], 12), np.repeat(np.arange(12), 4)
        least.append(table_of(acts, labels, questions, permutations=39).frame["family_p_value"].min())
    # Exact level 2/40 = .05 in each of 60 worlds: more than 9 at or below it has a chance of .001.
    assert np.mean(np.array(least) <= 0.05) <= 9 / 60
    assert 0.3 < np.mean(least) < 0.7


def test_untested_features_have_no_say_in_the_maximum() -> None:
    acts, labels, questions = world([6] * 8, 40, seed=7)
    support = (acts > 0).mean(0)
    bar = float(np.median(support))
    tested = support >= bar
    batch = PooledBatch([f"q{q}" for q in questions], torch.tensor(labels), torch.tensor(acts))
    strict = contrast([batch], min_support=bar, halves=2, permutations=50)
    assert 0 < tested.sum() < 40 and (by_id(strict)["family_p_value"][~tested] == 1).all()
    alone = table_of(acts[:, tested], labels, questions, permutations=50)
    assert strict.chance_effect == pytest.approx(alone.chance_effect)
    np.testing.assert_allclose(by_id(strict)["family_p_value"][tested], by_id(alone)["family_p_value"])
    assert table_of(acts, labels, questions, permutations=50).chance_effect > strict.chance_effect


def test_least_number_of_answers_of_each_class() -> None:
    acts, labels, questions = world([6] * 8, seed=8)
    acts[:, 0] = labels
    acts[:, 1] = ~labels
    frame = by_id(table_of(acts, labels, questions, min_each=1, permutations=9))
    assert (frame["q_value"][:2] == 1).all() and (frame["rank_q_value"][:2] == 1).all()
    assert (frame["family_p_value"][:2] == 1).all() and (frame["stability"][:2] == 0).all()
    n_each = np.array([(acts[labels] > 0).sum(0), (acts[~labels] > 0).sum(0)]).min(0)
    cut = int(n_each[3])
    kept = by_id(table_of(acts, labels, questions, min_each=cut, permutations=9))
    dropped = by_id(table_of(acts, labels, questions, min_each=cut + 1, permutations=9))
    p = multipletests(kept["p_value"][n_each >= cut], method="fdr_bh")[1]
    np.testing.assert_allclose(kept["q_value"][n_each >= cut], p)
    assert kept["stability"][3] > 0 and dropped["stability"][3] == 0 and dropped["q_value"][3] == 1


def test_the_least_support_itself_is_enough() -> None:
    acts, labels, questions = world([4] * 4, seed=11)
    acts[:, 0] = (np.arange(16) % 4 == 1) * 2.0
    batch = PooledBatch([f"q{q}" for q in questions], torch.tensor(labels), torch.tensor(acts))
    tables = [contrast([batch], min_support=share, halves=2, permutations=0) for share in (0.25, 0.26)]
    p_K, others = by_id(tables[0])["p_value"].to_numpy(), by_id(tables[0])["support"] >= 0.25
    np.testing.assert_allclose(by_id(tables[0])["q_value"][others], multipletests(p_K[others], method="fdr_bh")[1])
    assert [by_id(table)["stability"][0] > 0 for table in tables] == [True, False]


def test_nothing_depends_on_batches_but_order() -> None:
    acts, labels, questions = world([4, 4, 6, 2, 3, 5], seed=9, shift=0.4)
    one = table_of(acts, labels, questions, cut=1, permutations=30, halves=6)
    all_ = table_of(acts, labels, questions, cut=6, permutations=30, halves=6)
    pd.testing.assert_frame_equal(one.frame, all_.frame)
    assert one.chance_effect == pytest.approx(all_.chance_effect)
    more = table_of(acts, labels, questions, cut=6, permutations=60, halves=6)
    pd.testing.assert_series_equal(more.frame["stability"], all_.frame["stability"])
    other = table_of(acts, labels, questions, permutations=30, seed=4)
    assert (other.frame["family_p_value"] != one.frame["family_p_value"]).any()


def test_rows_of_a_batch_in_any_order() -> None:
    acts, labels, questions = world([4, 4, 6], seed=10)
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = PooledBatch([f"q{q}" for q in questions[order]], torch.tensor(labels[order]), torch.tensor(acts[order]))
    expected = by_id(table_of(acts, labels, questions))
    np.testing.assert_allclose(by_id(contrast([shuffled], halves=2, permutations=0))["effect"], expected["effect"])
    np.testing.assert_allclose(by_id(contrast([shuffled], halves=2, permutations=0))["rank_z"], expected["rank_z"])


def test_blocks_hold_mixed_questions_and_live_features() -> None:
    acts = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [9.0, 9.0, 9.0], [0.0, 0.0, 2.0], [0.0, 5.0, 4.0]])
    batch = PooledBatch(["b", "b", "a", "c", "c"], torch.tensor([True, False, True, False, True]), acts)
    mixed = MixedQuestions()
    (block,) = mixed.blocks([batch, PooledBatch(["d"], torch.tensor([False]), acts[:1])])
    assert (mixed.n_mixed, mixed.n_seen, mixed.questions, mixed.classes) == (2, 6, {"a", "b", "c", "d"}, {True, False})
    assert block.live_L.tolist() == [1, 2] and block.start_Q.tolist() == [0, 2] and block.size_Q.tolist() == [2, 2]
    assert block.acts_BL.tolist() == [[1, 0], [3, 0], [0, 2], [5, 4]] and block.right_B.tolist() == [1, 0, 0, 1]
    assert block.centred(block.acts_BL).tolist() == [[-1, 0], [1, 0], [-2.5, -1], [2.5, 1]]
    assert block.totals(block.acts_BL).tolist() == [[4, 0], [5, 6]]


def test_half_samples_are_complementary_pairs() -> None:
    in_SQ = HalfSamples(4, seed=0).draw(6)
    again = HalfSamples(4, seed=0)
    assert (np.concatenate([again.draw(1), again.draw(5)], axis=1) == in_SQ).all()
    assert (in_SQ[:2] == ~in_SQ[2:]).all()
    assert (in_SQ[:, ::2] == ~in_SQ[:, 1::2]).all()
    assert 0 < in_SQ[:2, ::2].sum() < 6


def test_sums_of_halves_by_loops() -> None:
    acts, labels, questions = world([3, 5, 2, 4, 6], 3, seed=12)
    batch = PooledBatch([f"q{q}" for q in questions], torch.tensor(labels), torch.tensor(acts))
    (block,) = MixedQuestions().blocks([batch])
    sums, in_SQ = HalfSums(3, 4, seed=1), HalfSamples(4, seed=1).draw(5)
    sums.add(block, *within(block)[1:])
    for half, in_Q in enumerate(in_SQ):
        chosen = [q for q in range(5) if in_Q[q]]
        assert sums.free_S[half] == sum((questions == q).sum() - 1 for q in chosen)
        right = [labels[questions == q] - labels[questions == q].mean() for q in chosen]
        x = [np.log1p(acts[questions == q].astype(np.float64)) for q in chosen]
        assert sums.w_S[half] == pytest.approx(sum(y @ y for y in right))
        expected = sum((y @ z for y, z in zip(right, x, strict=True)), np.zeros(3))
        np.testing.assert_allclose(sums.u_SF[half], expected, atol=1e-9)
        squares = sum((((z - z.mean(0)) ** 2).sum(0) for z in x), np.zeros(3))
        np.testing.assert_allclose(sums.square_SF[half], squares, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"permutations": -1}, "permutations: -1 is not allowed, it must be at least 0"),
        ({"min_each": -1}, "min_each: -1 is not allowed"),
        ({"top_k": 0}, "top_k: 0 is not allowed"),
        ({"min_support": 1.5}, "min_support: 1.5 is not allowed, it must be a share from 0 to 1"),
        ({"halves": 0}, "halves: 0 is not allowed"),
    ],
)
def test_arguments_out_of_range(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        contrast([], **options)
