"""Seeds x questions: the analysis of variance against statsmodels, the interval's coverage, planning."""

from __future__ import annotations

from math import isnan

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, t, ttest_1samp
from statsmodels.stats.anova import anova_lm

from mechreward.errors import InputError
from mechreward.gates import Crossed, crossed_interval, hierarchical_bootstrap, seeds_needed, student_interval


def planted(seed: int, n_seeds: int = 5, n_questions: int = 12, mean: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seeds, questions = rng.normal(0, 0.2, (n_seeds, 1)), rng.normal(0, 0.3, n_questions)
    return np.asarray(mean + seeds + questions + rng.normal(0, 0.1, (n_seeds, n_questions)))


def test_against_the_anova_of_statsmodels() -> None:
    d_SQ = planted(0)
    found = crossed_interval(d_SQ)
    rows = [(value, s, q) for s, row in enumerate(d_SQ) for q, value in enumerate(row)]
    frame = pd.DataFrame(rows, columns=["d", "s", "q"])
    squares = anova_lm(smf.ols("d ~ C(s) + C(q)", frame).fit())
    ms = dict(squares["sum_sq"] / squares["df"])
    seed, question, rest = ms["C(s)"], ms["C(q)"], ms["Residual"]
    total = seed + question - rest
    assert found.value == pytest.approx(d_SQ.mean())
    assert found.error == pytest.approx((total / 60) ** 0.5)
    assert found.freedom == pytest.approx(total**2 / (seed**2 / 4 + question**2 / 11 + rest**2 / 44))
    assert found.high - found.value == pytest.approx(t.ppf(0.975, found.freedom) * found.error)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert (found.n_seeds, found.n_questions) == (5, 12)
    assert found.seed_variance == pytest.approx((seed - rest) / 12)
    assert found.question_variance == pytest.approx((question - rest) / 5)
    assert found.rest_variance == pytest.approx(rest)


def test_seeds_alone_give_the_t_test_over_seeds() -> None:
    d_SQ = np.repeat(np.array([[0.1], [0.2], [0.4], [0.0]]), 50, axis=1)
    found = crossed_interval(d_SQ)
    by_seed = ttest_1samp(d_SQ[:, 0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((by_seed.low, by_seed.high))
    assert found.freedom == pytest.approx(3)


def test_the_interval_is_never_narrower_than_one_side_says() -> None:
    # Rows that cancel: the rest is larger than the mean squares of seeds, and the three would give too little.
    d_SQ = np.array([[0.3, -0.3, 0.1], [-0.3, 0.3, 0.0]])
    found = crossed_interval(d_SQ)
    seed, question = 3 * d_SQ.mean(1).var(ddof=1), 2 * d_SQ.mean(0).var(ddof=1)
    assert found.error == pytest.approx((max(seed, question) / 6) ** 0.5)
    assert found.seed_variance == 0.0
    flat = np.array([[0.3, -0.3, 0.5], [-0.3, 0.3, 0.5]])
    assert crossed_interval(flat).error == pytest.approx((2 * flat.mean(0).var(ddof=1) / 6) ** 0.5)


def test_coverage_with_five_seeds() -> None:
    inside = [found.low <= 0.1 <= found.high for found in (crossed_interval(planted(seed)) for seed in range(600))]
    assert 0.92 < np.mean(inside) < 0.985


def test_the_bootstrap_redraws_both() -> None:
    d_SQ = planted(3)
    rng = np.random.default_rng(7)
    naive = []
    for _ in range(4000):
        rows, columns = rng.integers(5, size=5), rng.integers(12, size=12)
        naive.append(d_SQ[rows][:, columns].mean())
    assert hierarchical_bootstrap(d_SQ, draws=4000, seed=1) == pytest.approx(
        np.quantile(naive, [0.025, 0.975]), abs=0.02
    )
    assert hierarchical_bootstrap(d_SQ, seed=1) == hierarchical_bootstrap(d_SQ, seed=1)
    only_questions = np.tile(d_SQ[:1], (5, 1))
    low, high = hierarchical_bootstrap(only_questions)
    assert high - low > 0.1, "questions are redrawn"
    low, high = hierarchical_bootstrap(np.tile(d_SQ[:, :1], (1, 12)))
    assert high - low > 0.1, "seeds are redrawn"


def test_seeds_needed_is_the_first_number_that_is_enough() -> None:
    found = crossed_interval(planted(5, n_questions=200))
    gap = 0.15

    def wide(seeds: int) -> float:
        error = ((found.seed_variance + found.rest_variance / 200) / seeds + found.question_variance / 200) ** 0.5
        return float((t.ppf(0.975, seeds - 1) + norm.ppf(0.8)) * error)

    needed = seeds_needed(found, gap)
    assert needed is not None and wide(needed) < gap <= wide(needed - 1)
    assert seeds_needed(found, 0.0) is None and seeds_needed(found, -0.1) is None
    certain = crossed_interval(np.zeros((5, 4)))
    assert seeds_needed(certain, 0.0) is None and seeds_needed(certain, 0.01) == 2
    questions_only = Crossed(0.0, 0.0, 0.0, 0.1, 4.0, 5, 4, 0.0, 0.04, 0.0)
    assert seeds_needed(questions_only, 0.05) is None, "no number of seeds makes up for four questions"


@given(st.floats(-2, 2), st.floats(0.1, 5))
def test_shift_and_scale(shift: float, scale: float) -> None:
    plain, moved = crossed_interval(planted(1)), crossed_interval(scale * planted(1) + shift)
    assert moved.low == pytest.approx(scale * plain.low + shift)
    assert moved.high == pytest.approx(scale * plain.high + shift)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (np.zeros((1, 5)), r"differences: shape \(1, 5\); at least 2 seeds"),
        (np.zeros((5, 1)), "at least 2 seeds and 2 questions"),
        (np.zeros(5), "differences: shape"),
        (np.array([[0.0, np.nan], [np.inf, 1.0]]), "differences: 2 are NaN or infinite"),
    ],
)
def test_bad_input(bad: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        crossed_interval(bad)


@pytest.mark.parametrize("values", [[0.1, 0.4], [0.5, -0.2, 0.3, 0.31, 0.9]])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_students_interval_is_scipys(values: list[float], level: float) -> None:
    found, wanted = student_interval(values, level), ttest_1samp(values, 0)
    interval = wanted.confidence_interval(level)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), interval.low, interval.high))
    assert found.error == pytest.approx(np.mean(values) / wanted.statistic)


def test_students_interval_of_one_number_and_of_none() -> None:
    alone = student_interval([0.3])
    assert alone.value == 0.3 and isnan(alone.low) and isnan(alone.high) and isnan(alone.error)
    with pytest.raises(InputError, match="values: there are none"):
        student_interval([])
