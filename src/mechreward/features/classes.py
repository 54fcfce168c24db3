"""Right and wrong answers apart: in how many a feature fires, and Welch's t test (Biometrika 1947) on log activations.

Welch's test takes answers as independent and compares all right with all wrong ones (of mixed questions, one weight an
answer). It sees what tells questions apart as noise, or as signal where right answers come from other questions than
wrong ones; so it is there to be compared with, and no feature is chosen by it.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from mechreward.features.mixed import Array, Block

ROUNDING = 1e-12
"""Share of a sum of squares below which what is left of it, less the mean's part, is rounding and counts as 0."""


class ClassSums:
    """Running sums by class: row 0 wrong, row 1 right."""

    def __init__(self, n_features: int) -> None:
        self.n_2 = np.zeros(2)
        self.fires_2F, self.sum_2F, self.square_2F = np.zeros((3, 2, n_features))

    def add(self, block: Block) -> None:
        x_BL = np.log1p(block.acts_BL)
        member_2B = np.stack([~block.right_B, block.right_B]).astype(np.float64)
        self.n_2 += member_2B.sum(1)
        self.fires_2F[:, block.live_L] += member_2B @ (block.acts_BL > 0)
        self.sum_2F[:, block.live_L] += member_2B @ x_BL
        self.square_2F[:, block.live_L] += member_2B @ x_BL**2

    @property
    def support_F(self) -> Array:
        """Share of all answers in which each feature fires."""
        return np.asarray(self.fires_2F.sum(0) / self.n_2.sum())

    @property
    def support_2F(self) -> Array:
        """The same for wrong and for right answers."""
        return np.asarray(self.fires_2F / self.n_2[:, None])

    def welch(self) -> tuple[Array, Array]:
        """t, above 0 where right answers have more, and two-sided p; 0 and 1 where neither class varies.

        Needs two answers of each class, which two mixed questions have.
        """
        n_21 = self.n_2[:, None]
        mean_2F = self.sum_2F / n_21
        rest_2F = self.square_2F - n_21 * mean_2F**2
        spread_2F = np.sqrt(np.where(rest_2F > ROUNDING * self.square_2F, rest_2F, 0) / (n_21 - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            found = stats.ttest_ind_from_stats(
                mean_2F[1], spread_2F[1], self.n_2[1], mean_2F[0], spread_2F[0], self.n_2[0], equal_var=False
            )
        varies_F = spread_2F.any(0)
        return np.where(varies_F, found.statistic, 0.0), np.where(varies_F, found.pvalue, 1.0)
