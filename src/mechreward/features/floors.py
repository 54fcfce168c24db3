"""The least p that the answers at hand allow a feature: one over the ways of dealing out labels that matter to it.

A question with m right of N answers has C(N, m) deals of its labels. Where z answers are alike, r of those right,
C(z, r) deals give every other answer the label that it has, and so the same statistic. An exact test over all deals of
all questions counts each of these as at least as extreme, hence

    p >= product over questions of C(z, r) / C(N, m)

and twice that in a two-sided test where every question in which the feature varies has as many right as wrong answers:
there exchanging right and wrong turns only the sign. Alike are the answers of least activation, which are those that a
sparse feature is silent in. Other ties could only raise the bound, and are not looked for.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

from mechreward.features.mixed import Array, Block


class LeastP:
    """Running sums over mixed questions."""

    def __init__(self, n_features: int) -> None:
        self.log_F = np.zeros(n_features)
        self.lopsided_F = np.zeros(n_features, dtype=bool)

    def add(self, block: Block) -> None:
        size_Q = block.size_Q.astype(np.float64)
        right_Q = block.totals(block.right_B.astype(np.float64))
        least_QL = np.minimum.reduceat(block.acts_BL, block.start_Q, axis=0)
        alike_BL = (block.acts_BL == block.spread(least_QL)).astype(np.float64)
        alike_QL, right_QL = block.totals(alike_BL), block.totals(alike_BL * block.right_B[:, None])
        same_QL = log_choose(alike_QL, right_QL) - log_choose(size_Q, right_Q)[:, None]
        self.log_F[block.live_L] += same_QL.sum(0)
        lopsided_Q1 = (2 * right_Q != size_Q)[:, None]
        self.lopsided_F[block.live_L] |= (lopsided_Q1 & (alike_QL < size_Q[:, None])).any(0)

    @property
    def least_F(self) -> Array:
        """Least p of a two-sided test; 1 for a feature that is constant within every question."""
        return np.minimum(np.exp(self.log_F) * np.where(self.lopsided_F, 1, 2), 1.0)


def log_choose(n: Array, k: Array) -> Array:
    """Logarithm of how many sets of k there are among n."""
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
