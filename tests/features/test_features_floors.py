"""The least p against exact tests that deal out the labels of every question in all ways there are."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch

from mechreward.features import PooledBatch, contrast
from mechreward.features.floors import LeastP
from mechreward.features.mixed import MixedQuestions


def batch(acts: list[list[list[float]]], right: list[list[int]]) -> PooledBatch:
    """Activations by question, answer and feature; places of the right answers."""
    names = [f"q{at}" for at, rows in enumerate(acts) for _ in rows]
    labels = [place in places for rows, places in zip(acts, right, strict=True) for place in range(len(rows))]
    return PooledBatch(names, torch.tensor(labels), torch.tensor([row for rows in acts for row in rows]))


def least(pooled: PooledBatch) -> list[float]:
    [block] = MixedQuestions().blocks([pooled])
    found = LeastP(pooled.acts_BF.shape[1])
    found.add(block)
    return found.least_F.tolist()


def exact_p(acts: list[list[list[float]]], right: list[list[int]], feature: int) -> float:
    """Two-sided, of the sum over questions of (sum of log(1 + a) over right answers, less what it is on average)."""
    columns = [np.log1p([row[feature] for row in rows]) for rows in acts]

    def size(deal: tuple[tuple[int, ...], ...]) -> float:
        parts = zip(columns, deal, strict=True)
        return abs(sum(x[list(places)].sum() - len(places) * x.mean() for x, places in parts))

    deals = list(product(*[combinations(range(len(x)), len(r)) for x, r in zip(columns, right, strict=True)]))
    observed = size(tuple(tuple(places) for places in right))
    return sum(size(deal) >= observed - 1e-9 for deal in deals) / len(deals)


def test_by_hand() -> None:
    # Feature 0 differs everywhere, 1 fires in a right answer to the first question, 2 in all but one wrong one of the
    # second, 3 is constant within questions, 4 never fires.
    first = [[1.0, 5, 0, 7, 0], [2, 0, 0, 7, 0], [3, 0, 0, 7, 0], [4, 0, 0, 7, 0]]
    second = [[1.0, 0, 2, 9, 0], [2, 0, 3, 9, 0], [3, 0, 0, 9, 0], [4, 0, 4, 9, 0]]
    assert least(batch([first, second], [[0, 1], [0, 1]])) == pytest.approx([2 / 36, 2 * 3 / 6, 2 / 6, 1, 1])
    # One right of four: exchanging right and wrong is no deal, so that one side is all there is.
    assert least(batch([first, second], [[0], [0, 1]])) == pytest.approx([1 / 24, 1 / 4, 2 / 6, 1, 1])


def test_no_exact_p_is_below_and_a_perfect_separator_s_is_equal() -> None:
    rng, reached = np.random.default_rng(0), 0
    for _ in range(60):
        sizes = rng.integers(2, 6, size=rng.integers(2, 4))
        right = [sorted(rng.choice(n, rng.integers(1, n), replace=False).tolist()) for n in sizes]
        acts = [(rng.random((n, 4)) * (rng.random((n, 4)) < [1, 0.7, 0.4, 0.2])).tolist() for n in sizes]
        for rows, places in zip(acts, right, strict=True):
            for at, row in enumerate(rows):
                row.append(2.0 + row[0] if at in places else row[0] / 8)
        bounds = least(batch(acts, right))
        exact = [exact_p(acts, right, feature) for feature in range(5)]
        assert all(bound <= p + 1e-12 for bound, p in zip(bounds, exact, strict=True))
        assert bounds[4] == pytest.approx(exact[4])
        reached += sum(abs(bound - p) < 1e-12 for bound, p in zip(bounds[1:4], exact[1:4], strict=True))
    assert reached > 30


@pytest.mark.parametrize(
    ("size", "n_right", "n_questions", "p"), [(4, 2, 2, 2 / 36), (2, 1, 4, 2 / 16), (3, 1, 2, 1 / 9), (3, 2, 3, 1 / 27)]
)
def test_a_perfect_separator_of_few_questions_has_the_exact_p(
    size: int, n_right: int, n_questions: int, p: float
) -> None:
    """The same difference in every question leaves the t test without an error, and its p is 0."""
    acts = [[[5.0 - at if at < n_right else 1.0 / (at + 1)] for at in range(size)] for _ in range(n_questions)]
    right = [list(range(n_right))] * n_questions
    row = contrast([batch(acts, right)]).frame.iloc[0]
    assert exact_p(acts, right, 0) == pytest.approx(p)
    assert [row["p_value"], row["q_value"], row["rank_p_value"], row["rank_q_value"]] == pytest.approx([p] * 4)
