"""Every statistic of the library: AUROC over all and within questions, bootstrap by question, permutation, paired test.

Questions, not answers, are the independent unit: every interval resamples whole questions (cluster bootstrap,
percentile). A statistic is a function of how often each question was drawn, so that 2,000 draws are a few matrix
products.

The within-question AUROC is the chance that, of a right and a wrong answer to the *same* question drawn from all such
pairs, the right one scores higher (ties count half). Weighting by pairs, not by questions, is deliberate: a group with
k of G right has k (G - k) pairs, which is also its weight in a GRPO step whose advantages are centred and not divided
by the group's standard deviation; and it is less noisy. NaN stands for "undefined": one class, or no mixed question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isnan, nan

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control, norm, permutation_test, spearmanr, ttest_ind
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from mechreward.errors import InputError

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From multiplicities [R, Q] (how often resample r holds question q) to values [R]."""

BLOCK = 64
"""Resamples whose rows are laid out at once; bounds memory at BLOCK x rows numbers."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval and bootstrap standard error; NaN where undefined."""

    value: float
    low: float
    high: float
    error: float


@dataclass(frozen=True)
class PairedResult:
    """Mean over questions of after minus before."""

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    n_questions: int


@dataclass(frozen=True)
class QuestionPairs:
    """Per question, in sorted order of question: right-wrong pairs, and how many of them the score orders rightly."""

    wins_Q: Array
    pairs_Q: Array

    @property
    def auroc(self) -> float:
        """Over all pairs within questions."""
        total = self.pairs_Q.sum()
        return float(self.wins_Q.sum() / total) if total else nan

    @property
    def n_mixed(self) -> int:
        """Questions with right and wrong answers."""
        return int((self.pairs_Q > 0).sum())


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that a right answer scores above a wrong one, ties half; NaN if there is one class only.

    Raises:
        InputError: if a score is NaN or infinite, a label not true or false, or the lengths differ.
    """
    values, right = _checked(scores, labels)
    return float(roc_auc_score(right, values)) if right.any() and not right.all() else nan


def question_pairs(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> QuestionPairs:
    """Counts of ordered pairs within each question (Mann-Whitney U from midranks).

    Raises:
        InputError: as `auroc`.
    """
    values, right = _checked(scores, labels, groups)
    code, n_groups = _codes(groups)
    rank = pd.Series(values).groupby(code).rank().to_numpy()
    n_right = np.bincount(code[right], minlength=n_groups).astype(np.float64)
    n_all = np.bincount(code, minlength=n_groups)
    wins = np.bincount(code[right], rank[right], n_groups) - n_right * (n_right + 1) / 2
    pairs = n_right * (n_all - n_right)
    return QuestionPairs(np.where(pairs > 0, wins, 0.0), pairs)


def within_question_auroc(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> float:
    """AUROC over pairs of answers to the same question; NaN if no question has both kinds. See `question_pairs`."""
    return question_pairs(scores, labels, groups).auroc


def ratio(numerator_Q: Array, denominator_Q: Array) -> Statistic:
    """Sum of one per-question number over the sum of another; NaN where a resample's denominator is 0."""

    def statistic(counts_RQ: Array) -> Array:
        below_R = counts_RQ @ denominator_Q
        return np.divide(counts_RQ @ numerator_Q, below_R, out=np.full(len(below_R), nan), where=below_R > 0)

    return statistic


def auroc_statistic(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike) -> Statistic:
    """AUROC over all answers, equal to resampling the rows themselves.

    Rows are sorted by score once. A row of a question drawn c times counts c times, so a right row's wins are a running
    sum of counts over the wrong rows before it, plus half of those it ties with.
    """
    values, right = _checked(scores, labels, groups)
    code, _ = _codes(groups)
    order = np.argsort(values, kind="stable")
    ordered, code, right = values[order], code[order], right[order]
    first = np.searchsorted(ordered, ordered[right], side="left")
    past = np.searchsorted(ordered, ordered[right], side="right")

    def block(counts_RQ: Array) -> Array:
        times_RN = counts_RQ[:, code]
        wrong_RN = np.zeros((len(times_RN), len(code) + 1))
        np.cumsum(np.where(right, 0.0, times_RN), axis=1, out=wrong_RN[:, 1:])
        right_RM = times_RN[:, right]
        wins_R = (right_RM * (wrong_RN[:, first] + wrong_RN[:, past])).sum(1) / 2
        pairs_R = right_RM.sum(1) * wrong_RN[:, -1]
        return np.divide(wins_R, pairs_R, out=np.full(len(pairs_R), nan), where=pairs_R > 0)

    def statistic(counts_RQ: Array) -> Array:
        starts = range(0, len(counts_RQ), BLOCK)
        return np.concatenate([block(counts_RQ[start : start + BLOCK]) for start in starts])

    return statistic


def cluster_bootstrap(
    statistic: Statistic, n_groups: int, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval over resamples of `n_groups` questions with replacement.

    The same seed draws the same questions. Resamples in which the statistic is undefined are left out.
    """
    value = float(statistic(np.ones((1, n_groups)))[0])
    if isnan(value):
        return Interval(nan, nan, nan, nan)
    values_R = statistic(resample_counts(n_groups, draws, seed))
    values_R = values_R[~np.isnan(values_R)]
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), float(values_R.std(ddof=1)))


@lru_cache(maxsize=1)
def resample_counts(n_groups: int, draws: int, seed: int) -> Array:
    """[R, Q]: how often each question is in each of `draws` samples of `n_groups` questions with replacement.

    Read-only: the same draws serve every statistic of a gate, one after another.
    """
    drawn_RQ = np.random.default_rng(seed).integers(n_groups, size=(draws, n_groups))
    place_RQ = drawn_RQ + n_groups * np.arange(draws)[:, None]
    counts = np.bincount(place_RQ.ravel(), minlength=draws * n_groups)
    counts_RQ = counts.reshape(draws, n_groups).astype(np.float64)
    counts_RQ.flags.writeable = False
    return counts_RQ


def label_permutation_p(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, draws: int = 2000, seed: int = 0
) -> float:
    """One-sided p of the within-question AUROC when labels are shuffled within each question; NaN if none is mixed.

    (1 + shuffles at least as good) / (1 + draws), Phipson and Smyth (2010): never 0.
    """
    values, right = _checked(scores, labels, groups)
    code, _ = _codes(groups)
    if not question_pairs(values, right, groups).n_mixed:
        return nan
    rank = pd.Series(values).groupby(code).rank().to_numpy()
    # With rows sorted by question, right answers first, a shuffle within questions is a sort by question + U(0, 1).
    order = np.lexsort((~right, code))
    code, rank, right = code[order], rank[order], right[order]
    rng = np.random.default_rng(seed)
    observed = rank[right].sum()
    hits = sum(rank[np.argsort(code + rng.random(len(code)))][right].sum() >= observed - 1e-9 for _ in range(draws))
    return (1 + int(hits)) / (1 + draws)


def wilson(successes: float | int, trials: float | int, level: float = 0.95) -> tuple[float, float]:
    """Wilson interval of a proportion of independent trials."""
    low, high = proportion_confint(successes, trials, alpha=1 - level, method="wilson")
    return float(low), float(high)


def mean_rise(before: ArrayLike, after: ArrayLike) -> tuple[float, float]:
    """Mean of `after` minus that of `before`, and Welch's t of it (1947), for values of different questions.

    Where neither side varies, t is infinite with the difference's sign, or 0 if there is none.

    Raises:
        InputError: if a side has fewer than two values.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if min(len(first), len(second)) < 2:
        raise InputError(f"values: {len(first)} before and {len(second)} after; at least 2 of each are needed")
    difference = float(second.mean() - first.mean())
    if max(np.ptp(first), np.ptp(second)) <= 1e-12 * max(np.abs(first).max(), np.abs(second).max()):
        return difference, float(np.sign(difference)) * float("inf") if difference else 0.0
    return difference, float(ttest_ind(second, first, equal_var=False).statistic)


def largest_spearman(n: int, n_right: int) -> float:
    """Rank correlation that a score without ties reaches at most with labels of which `n_right` of `n` are right.

    It puts every right answer above every wrong one: sqrt(3 p (1 - p)) for large n. A score with ties can reach more:
    the labels themselves, as a score, have 1. NaN for one class.
    """
    if not 0 < n_right < n:
        return nan
    return float(spearmanr(np.arange(n), np.arange(n) >= n - n_right).statistic)


def auroc_of_spearman(rho: float, n: int, n_right: int) -> float:
    """The AUROC that a rank correlation with right and wrong stands for, exact for a score without ties."""
    return (1 + rho / largest_spearman(n, n_right)) / 2


def question_means(values: ArrayLike, groups: ArrayLike) -> dict[str, float]:
    """Mean a question, e.g. its accuracy, by question id."""
    means = pd.Series(np.asarray(values, dtype=np.float64)).groupby(np.asarray(groups, dtype=str)).mean()
    return {str(question): float(mean) for question, mean in means.items()}


def accuracy_interval(
    correct: ArrayLike, groups: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Share of right answers, with an interval clustered by question.

    Where every question has the same accuracy (all right, all wrong) a bootstrap has no spread and would claim
    certainty: then the interval is Wilson's with questions as trials, and the error a standard error as wide.

    Raises:
        InputError: if there are no answers.
    """
    right = np.asarray(correct, dtype=np.float64)
    if not len(right):
        raise InputError("responses: there are none to take an accuracy of")
    code, n_groups = _codes(groups)
    right_Q = np.bincount(code, right, n_groups).astype(np.float64)
    n_Q = np.bincount(code).astype(np.float64)
    interval = cluster_bootstrap(ratio(right_Q, n_Q), n_groups, draws=draws, seed=seed, level=level)
    if np.ptp(right_Q / n_Q) > 0:
        return interval
    low, high = wilson(interval.value * n_groups, n_groups, level)
    return Interval(interval.value, low, high, (high - low) / (2 * float(norm.ppf((1 + level) / 2))))


def paired_test(
    before: Mapping[str, float], after: Mapping[str, float], *, draws: int = 10_000, seed: int = 0
) -> PairedResult:
    """Whether accuracy changed on the same questions: two-sided sign-flip permutation test of the per-question
    differences (exact where 2^n <= draws) and a bootstrap interval over questions.

    Args:
        before, after: accuracy by question id, as `question_means` gives it.

    Raises:
        InputError: if the questions differ or are fewer than two.
    """
    if before.keys() != after.keys():
        odd = min(before.keys() ^ after.keys())
        raise InputError(f"questions: a paired test needs the same questions before and after, {odd} is in one only")
    if len(before) < 2:
        raise InputError(f"questions: a paired test needs at least 2 questions, there are {len(before)}")
    difference_Q = np.array([after[question] - before[question] for question in sorted(before)])
    interval = cluster_bootstrap(ratio(difference_Q, np.ones_like(difference_Q)), len(difference_Q), seed=seed)
    flips = permutation_test(
        (difference_Q,), np.mean, permutation_type="samples", vectorized=True, n_resamples=draws - 1, batch=1000,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    name = "sign-flip permutation of per-question differences"
    return PairedResult(interval.value, interval.low, interval.high, float(flips.pvalue), name, len(difference_Q))


def mcnemar_p(before: ArrayLike, after: ArrayLike) -> float:
    """Two-sided exact p of McNemar's test (1947): yes or no, twice of each of some independent things.

    Raises:
        InputError: if the two are not as many, or one is not true or false.
    """
    first, second = _truths("before", before), _truths("after", after)
    if first.shape != second.shape:
        raise InputError(f"pairs: {first.size} before and {second.size} after; McNemar's test needs both of each")
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    return float(mcnemar([[0, lost], [won, 0]], exact=True).pvalue)


def welch(first: ArrayLike, second: ArrayLike) -> dict[str, Array]:
    """Two samples of independent rows, column by column: difference of means, Cohen's d (pooled spread), two-sided p of
    Welch's t test (Biometrika 1947), q of Benjamini and Hochberg. A column without spread in either has p = 1, d = 0.

    Raises:
        InputError: if a sample has fewer than two rows, or the columns differ.
    """
    a_NF, b_MF = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a_NF.ndim != 2 or a_NF.shape[1:] != b_MF.shape[1:] or min(len(a_NF), len(b_MF)) < 2:
        raise InputError(f"samples: shapes {a_NF.shape} and {b_MF.shape} must have 2 rows or more and the same columns")
    difference_F = a_NF.mean(0) - b_MF.mean(0)
    freedom = len(a_NF) + len(b_MF) - 2
    spread_F = np.sqrt(((len(a_NF) - 1) * a_NF.var(0, ddof=1) + (len(b_MF) - 1) * b_MF.var(0, ddof=1)) / freedom)
    moves = spread_F > 0
    p_F, effect_F = np.ones(a_NF.shape[1]), np.zeros(a_NF.shape[1])
    p_F[moves] = ttest_ind(a_NF[:, moves], b_MF[:, moves], equal_var=False).pvalue
    effect_F[moves] = difference_F[moves] / spread_F[moves]
    return {"difference": difference_F, "effect": effect_F, "p_value": p_F, "q_value": false_discovery_control(p_F)}


def _codes(groups: ArrayLike) -> tuple[NDArray[np.intp], int]:
    names, code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return code, len(names)


def _truths(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    """As booleans. None would count as false, NaN and any text as true."""
    given = np.asarray(values, dtype=object)
    if odd := [value for value in given.ravel().tolist() if value not in (0, 1)]:
        raise InputError(f"{name}: {odd[0]!r} is not allowed; each must be true or false")
    return given.astype(bool)


def _checked(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None) -> tuple[Array, NDArray[np.bool_]]:
    values, right = np.asarray(scores, dtype=np.float64), _truths("labels", labels)
    n_groups = len(values) if groups is None else len(np.asarray(groups))
    if not len(values) == len(right) == n_groups:
        raise InputError(f"scores: {len(values)} scores, {len(right)} labels and {n_groups} questions must be as many")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(f"scores: {bad} of {len(values)} are NaN or infinite; all must be finite")
    return values, right
