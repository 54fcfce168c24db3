"""Mann-Whitney within questions, of each feature: van Elteren's stratified rank sum (1960) and the AUROC.

In a question with m right of N answers, R is the sum of the right answers' midranks. Without a difference its mean is
m (N + 1) / 2 and its variance m (N - m) / (N (N - 1)) times the sum of squared rank deviations, which is the variance
corrected for ties. Questions are added with van Elteren's weights 1 / (N + 1), best where the shift is the same in all:

    z = sum (R - mean) / (N + 1)  /  sqrt(sum variance / (N + 1)^2),   two-sided p from the normal distribution

On one question that is scipy's `mannwhitneyu` with method "asymptotic" and no continuity correction. The AUROC is
1/2 + sum (R - mean) / sum m (N - m): weighted by pairs, as `gates.statistics` has it. A question comes whole, so that
its ranks are known when it comes by and F numbers are all that is kept. Ranks are the same before and after log1p.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from mechreward.features.mixed import Array, Block


class RankSums:
    """Running sums over mixed questions."""

    def __init__(self, n_features: int) -> None:
        self.above_F, self.weighted_F, self.variance_F = np.zeros((3, n_features))
        self.pairs = 0.0

    def add(self, block: Block) -> None:
        deviation_BL = midrank_deviations(block)
        size_Q = block.size_Q.astype(np.float64)
        n_right_Q = block.totals(block.right_B.astype(np.float64))
        pairs_Q = n_right_Q * (size_Q - n_right_Q)
        above_QL = block.totals(deviation_BL * block.right_B[:, None])
        variance_QL = block.totals(deviation_BL**2) * (pairs_Q / (size_Q * (size_Q - 1)))[:, None]
        self.above_F[block.live_L] += above_QL.sum(0)
        self.weighted_F[block.live_L] += (1 / (size_Q + 1)) @ above_QL
        self.variance_F[block.live_L] += (1 / (size_Q + 1)) ** 2 @ variance_QL
        self.pairs += float(pairs_Q.sum())

    @property
    def auroc_F(self) -> Array:
        """Chance that a right answer has the larger activation of a pair to the same question, ties half."""
        return 0.5 + self.above_F / self.pairs

    @property
    def z_F(self) -> Array:
        """Van Elteren's statistic; 0 for a feature that is constant within every question."""
        error_F = np.sqrt(self.variance_F)
        return np.divide(self.weighted_F, error_F, out=np.zeros_like(error_F), where=error_F > 0)

    def p_values(self) -> Array:
        return np.asarray(2 * stats.norm.sf(np.abs(self.z_F)))


def midrank_deviations(block: Block) -> Array:
    """Midranks within the question less their mean (N + 1) / 2: [B, L]."""
    deviation_BL, size_Q = np.empty_like(block.acts_BL), block.size_Q
    for size in np.unique(size_Q):
        row_QG = block.start_Q[size_Q == size][:, None] + np.arange(size)
        deviation_BL[row_QG] = stats.rankdata(block.acts_BL[row_QG], axis=1) - (size + 1) / 2
    return deviation_BL
