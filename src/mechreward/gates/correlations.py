"""Rank correlations of a score with being right: plain, and with what else could explain it held fixed.

`partial_spearman` ranks every column (ties get their mean rank), takes off what a least-squares fit on the controls
explains, and correlates what is left (papers' "partial Spearman"). Its interval is a percentile bootstrap over
questions in which the ranks stay those of the whole sample: a resample's sums of products are then sums over questions,
and 2,000 draws cost a matrix product.

The question's accuracy can be held fixed in two ways. As the mean over *all* its answers it takes away what tells only
questions apart, as a fixed effect does: a score that is difficulty alone comes out at 0. That the mean holds the
answer's own label gives a score nothing, because it is a control and not a predictor. As the mean over its *other*
answers (leave one out) it is difficulty measured with an error, and pure difficulty keeps a partial correlation: .28 in
simulation, with 8 answers and accuracies uniform over questions. Both are given; neither is a bar, which is on the
within-question AUROC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mechreward.errors import InputError
from mechreward.gates.statistics import Statistic, largest_spearman

Array = NDArray[np.float64]
RESIDUE = 1e-9
"""A column of which the controls leave less than this share of variance is explained by them altogether."""


@dataclass(frozen=True)
class PlainCorrelation:
    """Over all answers, as if they were independent: the figures most papers print; NaN where either is constant."""

    spearman: float
    spearman_p: float
    pearson: float
    pearson_p: float
    largest_spearman: float
    """Spearman's rho that a score without ties reaches at most, sqrt(3 p (1 - p)) for a share p of right answers."""


def plain_correlation(scores: ArrayLike, labels: ArrayLike) -> PlainCorrelation:
    """Spearman and Pearson correlation of a score with being right, from scipy."""
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    largest = largest_spearman(len(right), int(right.sum()))
    if np.ptp(values) == 0 or np.ptp(right) == 0:
        return PlainCorrelation(nan, nan, nan, nan, largest)
    rank, linear = stats.spearmanr(values, right), stats.pearsonr(values, right)
    return PlainCorrelation(
        float(rank.statistic), float(rank.pvalue), float(linear.statistic), float(linear.pvalue), largest
    )


def own_mean(labels: ArrayLike, groups: ArrayLike) -> Array:
    """Share of right answers among all answers to the same question; the same number for the same share."""
    code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    right_Q = np.bincount(code, np.asarray(labels, dtype=np.float64))
    return np.asarray((right_Q / np.bincount(code))[code])


def others_mean(labels: ArrayLike, groups: ArrayLike) -> Array:
    """Share of right answers among the *other* answers to the same question; over all others where there is none."""
    right = np.asarray(labels, dtype=np.float64)
    code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    n, total = np.bincount(code)[code] - 1, np.bincount(code, right)[code] - right
    everywhere = (right.sum() - right) / max(len(right) - 1, 1)
    return np.where(n > 0, total / np.maximum(n, 1), everywhere)


def partial_spearman(
    scores: ArrayLike, labels: ArrayLike, controls: Sequence[ArrayLike], groups: ArrayLike
) -> Statistic:
    """Rank correlation of score and label with the controls held fixed; NaN where they explain either altogether.

    Raises:
        InputError: if a column has another length, or holds NaN or infinity.
    """
    x_NC = np.stack([_ranks(column, len(np.asarray(groups))) for column in (*controls, scores, labels)], axis=1)
    x_NC = np.hstack([np.ones((len(x_NC), 1)), x_NC])
    code = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    products_QCC = np.zeros((code.max() + 1, x_NC.shape[1], x_NC.shape[1]))
    np.add.at(products_QCC, code, x_NC[:, :, None] * x_NC[:, None, :])

    def statistic(counts_RQ: Array) -> Array:
        sums_RCC = np.tensordot(counts_RQ, products_QCC, axes=1)
        fixed_RCC, cross_RC2, both_R22 = sums_RCC[:, :-2, :-2], sums_RCC[:, :-2, -2:], sums_RCC[:, -2:, -2:]
        left_R22 = both_R22 - cross_RC2.transpose(0, 2, 1) @ np.linalg.pinv(fixed_RCC, hermitian=True) @ cross_RC2
        variance_R2 = np.diagonal(left_R22, axis1=1, axis2=2)
        defined_R = (variance_R2 > RESIDUE * np.diagonal(both_R22, axis1=1, axis2=2)).all(1)
        scale_R = np.sqrt(np.where(defined_R, variance_R2.prod(1), 1.0))
        return np.where(defined_R, left_R22[:, 0, 1] / scale_R, nan)

    return statistic


def _ranks(column: ArrayLike, n: int) -> Array:
    """Mid-ranks about 0, of unit size."""
    values = np.asarray(column, dtype=np.float64)
    if len(values) != n or not np.isfinite(values).all():
        raise InputError(f"scores: a column of {len(values)} for {n} answers; allowed are as many, all finite")
    rank = stats.rankdata(values)
    return np.asarray((rank - rank.mean()) / max(len(rank), 1))
