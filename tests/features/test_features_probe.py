"""The sparse probe against a dense fit of its own objective, and sparse centring against the dense one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from mechreward.errors import InputError
from mechreward.features import ContrastTable, PooledBatch, contrast
from mechreward.features.crossfit import centred
from mechreward.features.halves import HalfSamples
from mechreward.features.probe import fit_sparse, probe
from mechreward.features.rows import PooledRows, RowCollector


def world(n_questions: int = 40, n_answers: int = 6, n_features: int = 12, seed: int = 0) -> list[PooledBatch]:
    """Feature 0 rises and 1 falls where an answer is right; 2 is a noisy copy of 0; 11 never fires, 10 is constant."""
    rng = np.random.default_rng(seed)
    batches = []
    for question in range(n_questions):
        right = rng.permutation(n_answers) < n_answers // 2 - question % 2
        acts = np.maximum(rng.normal(0, 1, (n_answers, n_features)) + question % 3, 0)
        acts[:, 0] = np.maximum(acts[:, 0] + 1.5 * right, 0)
        acts[:, 1] = np.maximum(acts[:, 1] + 1.5 * ~right, 0) * 10
        acts[:, 2] = acts[:, 0] + 2.0 * rng.random(n_answers)
        acts[:, 10], acts[:, 11] = 2.0, 0
        batches.append(
            PooledBatch([f"q{question}"] * n_answers, torch.tensor(right), torch.tensor(acts, dtype=torch.float32))
        )
    return batches


def collected(batches: list[PooledBatch], **options: float) -> tuple[PooledRows, ContrastTable]:
    collector = RowCollector()
    table = contrast(collector.through(batches), permutations=0, halves=2, **options)
    return collector.rows(), table


def by_id(table: ContrastTable) -> pd.DataFrame:
    return table.frame.sort_values("id").reset_index(drop=True)


def test_rows_are_what_went_by() -> None:
    batches = world(5)
    rows, _ = collected(batches)
    dense = torch.cat([batch.acts_BF for batch in batches]).numpy()
    np.testing.assert_array_equal(rows.acts_NF.toarray(), dense)
    assert rows.questions == [name for batch in batches for name in batch.question_ids]
    assert rows.right_N.tolist() == torch.cat([batch.correct_B for batch in batches]).tolist()
    assert rows.states_ND is None
    again = list(rows.batches(np.arange(6, 18)))
    assert [batch.question_ids[0] for batch in again] == ["q1", "q2"]
    torch.testing.assert_close(again[1].acts_BF, batches[2].acts_BF)
    assert again[1].correct_B.tolist() == batches[2].correct_B.tolist()
    part = rows.part(np.array([7, 3]))
    assert part.questions == ["q1", "q0"]
    np.testing.assert_array_equal(part.acts_NF.toarray(), dense[[7, 3]])


def test_sparse_centring_equals_the_dense_one() -> None:
    rows, _ = collected(world(9))
    columns = np.array([3, 0, 10, 11, 7])
    found = rows.centred(columns)
    expected = centred(rows.acts_NF.toarray()[:, columns], rows.questions)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-12)
    assert found[:, [2, 3]].nnz == 0 and found.indices.dtype == np.int32


def test_fit_minimises_the_l1_objective() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4)) * (rng.random((120, 4)) < 0.7)
    x -= x.mean(0)
    right = x[:, 0] - 0.5 * x[:, 1] + rng.normal(0, 1, 120) > 0.3
    weight = fit_sparse(sparse.csr_array(x), right, strength=4.0)
    sign = np.where(right, 1.0, -1.0)
    # C is 4 times the least: by the optimality conditions at zero weights, 1 / max |x' (y - p)| with p the base rate.
    c = 4.0 / np.abs(x.T @ (right - right.mean())).max()

    def objective(parts: np.ndarray) -> float:
        w = parts[:4] - parts[4:8]
        return parts[:8].sum() + c * np.logaddexp(0, -sign * (x @ w + parts[8])).sum()

    bounds = [(0, None)] * 8 + [(None, None)]
    best = minimize(objective, np.zeros(9), bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-9})
    np.testing.assert_allclose(weight, best.x[:4] - best.x[4:8], atol=0.02)
    assert (weight == 0).any() and weight[0] > 0.3 > 0 > weight[1]


def test_effects_are_weights_of_scaled_centred_activations() -> None:
    rows, table = collected(world())
    found = probe(rows, table, halves=2)
    frame, marginal = by_id(found), by_id(table)
    scaled = rows.centred(np.arange(10)).toarray() / marginal["scale"].to_numpy()[:10]
    least = 1 / np.abs(scaled.T @ (rows.right_N - rows.right_N.mean())).max()
    reference = LogisticRegression(C=10 * least, l1_ratio=1, solver="saga", max_iter=20000, tol=1e-6)
    reference.fit(scaled, rows.right_N)
    np.testing.assert_allclose(frame["effect"][:10], reference.coef_[0], atol=0.02)
    assert (frame["effect"][10:] == 0).all()
    assert frame["effect"][0] > 0.5 and frame["effect"][1] < -0.5
    assert found.method == "probe" and (found.n_questions, found.n_mixed) == (table.n_questions, table.n_mixed)
    same = ["difference", "p_value", "q_value", "auroc", "support", "scale"]
    pd.testing.assert_frame_equal(frame[same], marginal[same])
    assert (np.diff(found.frame["effect"].abs()) <= 0).all() and set(found.frame["id"][:2]) == {0, 1}


def test_a_copy_is_explained_away() -> None:
    rows, table = collected(world(80))
    frame, marginal = by_id(probe(rows, table, halves=2)), by_id(table)
    assert marginal["effect"][2] > 0.5 * marginal["effect"][0] > 0.2
    assert abs(frame["effect"][2]) < 0.3 * frame["effect"][0]


def test_stability_equals_fits_of_the_same_halves() -> None:
    rows, table = collected(world(16, seed=3))
    frame = by_id(probe(rows, table, halves=6, strength=100.0, seed=5))
    in_SQ = HalfSamples(6, 5).draw(16)
    scale = by_id(table)["scale"].to_numpy()[:10]
    x = rows.centred(np.arange(10)).toarray() / scale
    hits, kept = np.zeros(10), np.zeros(10)
    for in_Q in in_SQ:
        chosen = np.array([in_Q[int(name[1:])] for name in rows.questions])
        weight = fit_sparse(sparse.csr_array(x[chosen]), rows.right_N[chosen], strength=100.0)
        kept += (weight != 0) & (frame["effect"][:10] != 0)
        hits += (weight != 0) & (np.sign(weight) == np.sign(frame["effect"][:10]))
    np.testing.assert_allclose(frame["stability"][:10], hits / 6)
    assert frame["stability"][1] == 1 and (hits < kept).any()


def test_a_stronger_penalty_keeps_fewer() -> None:
    rows, table = collected(world(seed=4))
    kept = [int((probe(rows, table, strength=s, halves=2).frame["effect"] != 0).sum()) for s in (1.01, 3.0, 100.0)]
    assert kept[0] == 1 and kept[0] < kept[1] < kept[2]


def test_features_without_support_are_not_offered() -> None:
    rare, one_sided = world(12), world(12)
    for at, (batch, other) in enumerate(zip(rare, one_sided, strict=True)):
        batch.acts_BF[:, 0] = batch.correct_B.float() * 9 * (at < 2)
        other.acts_BF[:, 1] = other.correct_B.float() * 5
    rows, table = collected(rare)
    support = by_id(table)["support"][0]
    assert 0 < support < 0.1
    assert by_id(probe(rows, table, min_support=0.01, strength=50.0, halves=2))["effect"][0] > 0
    assert by_id(probe(rows, table, min_support=float(support), strength=50.0, halves=2))["effect"][0] > 0
    assert by_id(probe(rows, table, min_support=0.1, strength=50.0, halves=2))["effect"][0] == 0
    rows, table = collected(one_sided)
    assert by_id(probe(rows, table, halves=2))["effect"][1] > 0
    assert by_id(probe(rows, table, min_each=1, halves=2))["effect"][1] == 0


def test_bad_input() -> None:
    rows, table = collected(world(6))
    with pytest.raises(InputError, match="strength: 1.0 is not allowed, it must be over 1"):
        probe(rows, table, strength=1.0)
    with pytest.raises(InputError, match="halves: 5 is not allowed"):
        probe(rows, table, halves=5)
    with pytest.raises(
        InputError, match="min_support: no feature that varies within questions fires in 1 of 36 answers"
    ):
        probe(rows, table, min_support=1.0, min_each=99)
