"""Correlations against scipy, statsmodels and naive loops over resampled rows."""

from __future__ import annotations

import warnings
from math import isnan, sqrt

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mechreward.errors import InputError
from mechreward.gates.correlations import others_mean, own_mean, partial_spearman, plain_correlation
from mechreward.gates.statistics import Statistic

Columns = tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]


def columns(seed: int = 0, n_questions: int = 12, n_answers: int = 5) -> Columns:
    """Scores and controls with ties that depend on each other and on the label."""
    rng = np.random.default_rng(seed)
    n = n_questions * n_answers
    right = rng.random(n) < 0.6
    first = rng.integers(0, 8, n) + 2.0 * right
    second = rng.normal(size=n) + 0.3 * first
    scores = np.round(first + second + right + rng.normal(size=n), 1)
    return scores, right, [first, second], np.repeat(np.arange(n_questions), n_answers).astype(str)


def naive(scores: np.ndarray, right: np.ndarray, controls: list[np.ndarray], ranked: bool = True) -> float:
    """Residuals of statsmodels' OLS on the ranked columns, correlated by scipy."""
    rank = stats.rankdata if ranked else np.asarray
    x = sm.add_constant(np.stack([rank(control) for control in controls], axis=1).astype(float), has_constant="add")
    left = [sm.OLS(rank(column).astype(float), x).fit().resid for column in (scores, right)]
    return float(stats.pearsonr(*left).statistic)


def whole(statistic: Statistic, n: int) -> float:
    return float(statistic(np.ones((1, n)))[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_partial_spearman_is_the_correlation_of_residual_ranks(seed: int) -> None:
    scores, right, controls, groups = columns(seed)
    got = whole(partial_spearman(scores, right, controls, groups), 12)
    assert got == pytest.approx(naive(scores, right, controls), abs=1e-9)


def test_without_controls_it_is_spearman() -> None:
    scores, right, _, groups = columns()
    got = whole(partial_spearman(scores, right, [], groups), 12)
    assert got == pytest.approx(stats.spearmanr(scores, right).statistic)


def test_resamples_are_those_of_whole_questions_at_the_ranks_of_the_sample() -> None:
    scores, right, controls, groups = columns(3)
    names, ranks = np.unique(groups), [stats.rankdata(column) for column in (scores, right, *controls)]
    drawn = np.random.default_rng(1).integers(12, size=(6, 12))
    counts = np.stack([np.bincount(row, minlength=12) for row in drawn]).astype(float)
    want = []
    for row in drawn:
        rows = np.concatenate([np.flatnonzero(groups == names[question]) for question in row])
        own, label, *fixed = (rank[rows] for rank in ranks)
        want.append(naive(own, label, fixed, ranked=False))
    np.testing.assert_allclose(partial_spearman(scores, right, controls, groups)(counts), want, atol=1e-9)


def test_constant_columns() -> None:
    scores, right, controls, groups = columns()
    same = partial_spearman(scores, right, controls, groups)
    # A control that is constant explains nothing, and may come twice.
    padded = partial_spearman(scores, right, [*controls, np.ones(60), np.zeros(60)], groups)
    assert whole(padded, 12) == pytest.approx(whole(same, 12))
    assert isnan(whole(partial_spearman(np.ones(60), right, controls, groups), 12))
    assert isnan(whole(partial_spearman(scores, np.ones(60), controls, groups), 12))
    assert isnan(whole(partial_spearman(scores, right, [scores], groups), 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = plain_correlation(np.ones(60), right)
    assert isnan(plain.spearman) and isnan(plain.pearson_p) and 0.8 < plain.largest_spearman < 0.9


def test_bad_columns() -> None:
    scores, right, controls, groups = columns()
    with pytest.raises(InputError, match="scores: a column of 3 for 60 answers"):
        partial_spearman(scores, right, [np.ones(3)], groups)
    with pytest.raises(InputError, match="all finite"):
        partial_spearman(np.where(right, scores, np.nan), right, controls, groups)


def test_others_mean_by_hand() -> None:
    # Question a: 1, 0, 1; question b: a single answer, for which all others stand in.
    got = others_mean([True, False, True, True], ["a", "a", "a", "b"])
    np.testing.assert_allclose(got, [1 / 2, 1, 1 / 2, 2 / 3])


def test_own_mean_by_hand() -> None:
    got = own_mean([True, False, True, True, False, True], ["a", "a", "a", "b", "c", "c"])
    assert got.tolist() == [2 / 3, 2 / 3, 2 / 3, 1.0, 0.5, 0.5]


def test_difficulty_alone_is_0_with_the_whole_mean_and_not_with_the_others() -> None:
    rng = np.random.default_rng(0)
    chance = np.repeat(rng.random(300), 8)
    right, groups = rng.random(2400) < chance, np.repeat(np.arange(300), 8).astype(str)
    mean = np.repeat(right.reshape(-1, 8).mean(1), 8)
    assert abs(whole(partial_spearman(chance, right, [mean], groups), 300)) < 0.04
    assert whole(partial_spearman(chance, right, [others_mean(right, groups)], groups), 300) > 0.2


def test_plain_correlation_equals_scipy() -> None:
    scores, right, _, _ = columns()
    plain = plain_correlation(scores, right)
    rank, linear = stats.spearmanr(scores, right), stats.pearsonr(scores, right)
    assert (plain.spearman, plain.spearman_p) == (rank.statistic, rank.pvalue)
    assert (plain.pearson, plain.pearson_p) == (linear.statistic, linear.pvalue)
    p = right.mean()
    assert plain.largest_spearman == pytest.approx(sqrt(3 * p * (1 - p)), abs=1e-3)
