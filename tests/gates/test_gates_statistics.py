"""Statistics against scikit-learn, scipy, statsmodels and naive loops over the rows themselves."""

from __future__ import annotations

import itertools
import time
from math import isnan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from mechreward.errors import InputError
from mechreward.gates.statistics import (
    accuracy_interval,
    auroc,
    auroc_statistic,
    cluster_bootstrap,
    label_permutation_p,
    mcnemar_p,
    paired_test,
    question_means,
    question_pairs,
    ratio,
    resample_counts,
    wilson,
    within_question_auroc,
)


def world(n_questions: int, n_answers: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores with ties, labels, and questions of unequal size in mixed order."""
    rng = np.random.default_rng(seed)
    groups = [f"q{q}" for q in range(n_questions) for _ in range(n_answers - q % 2)]
    order = rng.permutation(len(groups))
    labels = rng.random(len(groups)) < 0.5
    return rng.integers(0, 6, len(groups)) + labels, labels, [groups[i] for i in order]


def naive_pairs(scores: np.ndarray, labels: np.ndarray, groups: list[str], within: bool) -> tuple[float, int]:
    wins, pairs = 0.0, 0
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if labels[i] and not labels[j] and (groups[i] == groups[j] or not within):
            pairs += 1
            wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return wins, pairs


def test_auroc_by_hand() -> None:
    # Right: 3, 1; wrong: 1, 0. Pairs 3>1, 3>0, 1=1, 1>0.
    assert auroc([3, 1, 1, 0], [True, True, False, False]) == 3.5 / 4


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_class_has_no_auroc(labels: list[bool]) -> None:
    assert isnan(auroc([0.1, 0.2], labels))
    assert isnan(within_question_auroc([0.1, 0.2], labels, ["a", "a"]))
    assert isnan(label_permutation_p([0.1, 0.2], labels, ["a", "a"]))
    interval = cluster_bootstrap(auroc_statistic([0.1, 0.2], labels, ["a", "a"]), 1)
    assert isnan(interval.value) and isnan(interval.low)


def test_constant_score_is_one_half() -> None:
    labels, groups = [True, False, True, False], ["a", "a", "b", "b"]
    assert auroc([2.0] * 4, labels) == 0.5
    assert within_question_auroc([2.0] * 4, labels, groups) == 0.5
    assert label_permutation_p([2.0] * 4, labels, groups, draws=50) == 1.0


@pytest.mark.parametrize("odd", [None, float("nan"), "wrong", 2])
def test_what_is_neither_true_nor_false_is_no_label(odd: object) -> None:
    """None counted as wrong; NaN, text and 2 as right, so that ["right", "wrong"] had one class."""
    for statistic in (
        lambda y: auroc([1.0, 2.0, 3.0], y),
        lambda y: within_question_auroc([1.0, 2.0, 3.0], y, ["q"] * 3),
    ):
        assert statistic([False, 1, True]) == 1.0
        with pytest.raises(InputError, match=f"labels: '?{odd}'? is not allowed; each must be true or false"):
            statistic([True, False, odd])
    with pytest.raises(InputError, match="before: "):
        mcnemar_p([True, odd], [True, False])
    with pytest.raises(InputError, match="after: "):
        mcnemar_p([True, False], [True, odd])


def test_scores_must_be_finite_and_as_many() -> None:
    with pytest.raises(InputError, match="scores: 2 of 3 are NaN or infinite"):
        auroc([np.nan, np.inf, 1.0], [True, False, True])
    with pytest.raises(InputError, match="2 scores, 2 labels and 1 questions"):
        within_question_auroc([1.0, 2.0], [True, False], ["a"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 6))
def test_within_question_auroc_counts_pairs(seed: int, n_questions: int, n_answers: int) -> None:
    scores, labels, groups = world(n_questions, n_answers, seed)
    wins, pairs = naive_pairs(scores, labels, groups, within=True)
    found = question_pairs(scores, labels, groups)
    assert (found.wins_Q.sum(), found.pairs_Q.sum()) == (wins, pairs)
    mixed = {g for g in groups if {bool(y) for y, h in zip(labels, groups, strict=True) if h == g} == {True, False}}
    assert found.n_mixed == len(mixed)


def test_within_question_auroc_weighs_pairs_not_questions() -> None:
    # Question a: 1 pair, won. Question b: 2 right, 2 wrong, 4 pairs, none won.
    scores, labels = [1, 0, 0, 0, 1, 1], [True, False, True, True, False, False]
    assert within_question_auroc(scores, labels, ["a", "a", "b", "b", "b", "b"]) == 1 / 5


def test_difficulty_alone_is_worth_nothing_within_questions() -> None:
    rng = np.random.default_rng(0)
    difficulty = np.repeat(rng.random(50), 8)
    labels = rng.random(400) < difficulty
    groups = np.repeat(np.arange(50), 8).astype(str).tolist()
    assert auroc(difficulty, labels) > 0.75
    assert within_question_auroc(difficulty, labels, groups) == 0.5


def test_auroc_statistic_is_the_auroc_of_the_resampled_rows() -> None:
    scores, labels, groups = world(7, 5, seed=3)
    statistic = auroc_statistic(scores, labels, groups)
    names = sorted(set(groups))
    rng = np.random.default_rng(1)
    for counts in rng.multinomial(7, np.full(7, 1 / 7), 20):
        rows = [i for q, c in zip(names, counts, strict=True) for i in np.flatnonzero(np.array(groups) == q).repeat(c)]
        expected = roc_auc_score(labels[rows], scores[rows])
        np.testing.assert_allclose(statistic(counts[None].astype(float)), [expected], rtol=1e-6)


def test_auroc_statistic_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels, groups = world(9, 6, seed=5)
    counts = resample_counts(9, 10, 0)
    whole = auroc_statistic(scores, labels, groups)(counts)
    monkeypatch.setattr("mechreward.gates.statistics.BLOCK", 4)
    np.testing.assert_array_equal(auroc_statistic(scores, labels, groups)(counts), whole)
    assert len(set(whole)) > 5


def test_bootstrap_equals_naive_resampling_of_questions() -> None:
    scores, labels, groups = world(12, 6, seed=2)
    pairs = question_pairs(scores, labels, groups)
    found = cluster_bootstrap(ratio(pairs.wins_Q, pairs.pairs_Q), 12, draws=200, seed=4)
    names = np.array(sorted(set(groups)))
    values = []
    for drawn in np.random.default_rng(4).integers(12, size=(200, 12)):
        rows, copies = [], []
        for copy, question in enumerate(names[drawn]):
            rows.append(np.flatnonzero(np.array(groups) == question))
            copies += [f"{question}-{copy}"] * len(rows[-1])
        index = np.concatenate(rows)
        wins, n = naive_pairs(scores[index], labels[index], copies, within=True)
        values.append(wins / n)
    assert found.low == pytest.approx(np.quantile(values, 0.025))
    assert found.high == pytest.approx(np.quantile(values, 0.975))
    assert found.error == pytest.approx(np.std(values, ddof=1))
    assert found.value == within_question_auroc(scores, labels, groups)


def test_bootstrap_leaves_undefined_draws_out() -> None:
    # Only the first question has pairs; a draw without it has no value.
    interval = cluster_bootstrap(ratio(np.array([3.0, 0.0]), np.array([4.0, 0.0])), 2, draws=100)
    assert (interval.value, interval.low, interval.high) == (0.75, 0.75, 0.75)


def test_bootstrap_covers_the_truth() -> None:
    """95 % intervals of a mean over 40 questions with answers that depend on their question."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        chance = np.repeat(rng.beta(1, 1, 40), 8)
        interval = accuracy_interval(rng.random(320) < chance, np.repeat(np.arange(40), 8), draws=200)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.88 <= hits / 100 <= 0.99


def test_a_large_bootstrap_takes_less_than_a_second() -> None:
    scores, labels, groups = world(1000, 8, seed=0)
    start = time.process_time()
    pairs = question_pairs(scores, labels, groups)
    cluster_bootstrap(ratio(pairs.wins_Q, pairs.pairs_Q), 1000)
    assert time.process_time() - start < 1


def test_permutation_p_equals_full_enumeration() -> None:
    scores = np.array([5.0, 3.0, 4.0, 1.0, 2.0, 2.0, 0.0])
    labels = np.array([True, True, False, False, True, False, False])
    groups = ["a", "a", "a", "a", "b", "b", "b"]
    observed, _ = naive_pairs(scores, labels, groups, within=True)
    hits = total = 0
    for first in itertools.combinations(range(4), 2):
        for second in itertools.combinations(range(4, 7), 1):
            shuffled = np.isin(np.arange(7), [*first, *second])
            hits += naive_pairs(scores, shuffled, groups, within=True)[0] >= observed
            total += 1
    exact = hits / total
    assert label_permutation_p(scores, labels, groups, draws=5000) == pytest.approx(exact, abs=0.02)


def test_permutation_p_is_never_zero_and_one_sided() -> None:
    groups = np.repeat(np.arange(20), 4).astype(str).tolist()
    labels = np.tile([True, True, False, False], 20)
    assert label_permutation_p(labels.astype(float), labels, groups, draws=99) == 1 / 100
    assert label_permutation_p(-labels.astype(float), labels, groups, draws=99) == 1.0


def test_wilson_equals_statsmodels() -> None:
    assert wilson(3, 50) == pytest.approx(proportion_confint(3, 50, alpha=0.05, method="wilson"))
    low, high = wilson(0, 10)
    assert low == pytest.approx(0) and high == pytest.approx(0.2775, abs=1e-4)


def test_accuracy_interval_is_wider_than_independent_answers_would_have_it() -> None:
    labels = np.repeat([True, False] * 10, 8)
    groups = np.repeat(np.arange(20), 8).astype(str).tolist()
    interval = accuracy_interval(labels, groups)
    naive = wilson(80, 160)
    assert interval.value == 0.5
    assert interval.high - interval.low > 2.5 * (naive[1] - naive[0])


@pytest.mark.parametrize("right", [True, False])
def test_accuracy_of_all_alike_is_not_certain(right: bool) -> None:
    interval = accuracy_interval([right] * 40, np.repeat(np.arange(10), 4).astype(str).tolist())
    assert (interval.low, interval.high) == wilson(10 * right, 10)
    assert interval.value == float(right)
    assert interval.error == pytest.approx((interval.high - interval.low) / (2 * 1.959964), rel=1e-6)


def test_accuracy_of_nothing() -> None:
    with pytest.raises(InputError, match="responses: there are none"):
        accuracy_interval([], [])


def test_question_means() -> None:
    assert question_means([True, False, True, True], ["a", "a", "b", "a"]) == {"a": 2 / 3, "b": 1.0}


def test_paired_test_is_exact_for_few_questions() -> None:
    before = {"a": 0.25, "b": 0.5, "c": 0.0, "d": 0.75, "e": 0.5}
    after = {"a": 0.75, "b": 0.5, "c": 0.5, "d": 1.0, "e": 0.25}
    difference = np.array([after[q] - before[q] for q in "abcde"])
    flips = [abs(np.mean(difference * signs)) for signs in itertools.product([1, -1], repeat=5)]
    result = paired_test(before, dict(reversed(after.items())))
    assert result.difference == pytest.approx(0.2)
    assert result.p_value == np.mean(np.array(flips) >= 0.2 - 1e-12)
    assert result.low < 0.2 < result.high
    assert result.n_questions == 5


def test_paired_test_sees_a_change_and_nothing_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    before = {str(q): rng.binomial(4, 0.4) / 4 for q in range(100)}
    better = {q: min(1.0, x + 0.25 * (rng.random() < 0.6)) for q, x in before.items()}
    result = paired_test(before, better)
    assert result.p_value < 0.001 and result.low > 0.05
    same = paired_test(before, before)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_paired_test_needs_the_same_questions() -> None:
    with pytest.raises(InputError, match="b is in one only"):
        paired_test({"a": 1.0, "b": 0.0}, {"a": 1.0})
    with pytest.raises(InputError, match="at least 2 questions, there are 1"):
        paired_test({"a": 1.0}, {"a": 1.0})
