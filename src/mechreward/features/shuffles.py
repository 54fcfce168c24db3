"""How large |d| gets by chance: labels shuffled within each question, and the largest |d| of all features kept.

Single-step max-T adjustment of Westfall and Young (1993) with |d| as the statistic: a feature's family-wise p is
(1 + shuffles whose largest |d| over all tested features is at least its own) / (1 + shuffles), never 0 (Phipson and
Smyth 2010). The correlation between features is kept, as answers are shuffled whole. A shuffle within questions changes
neither w nor the spread of x, so that of each shuffle only the sum u is kept: P x F numbers in all.
"""

from __future__ import annotations

import numpy as np

from mechreward.errors import InputError
from mechreward.features.mixed import Array, Block, Bools
from mechreward.features.slopes import SlopeSums, cohens_d

ROUNDING = 1e-9
"""Relative difference below which two effects are the same one, summed in another order."""


class LabelShuffles:
    """P shuffles of the labels of a stream of blocks; P may be 0, and then every p is 1.

    Raises:
        InputError: if there are fewer than 0.
    """

    def __init__(self, n_features: int, permutations: int, seed: int) -> None:
        if permutations < 0:
            raise InputError(f"permutations: {permutations} is not allowed, it must be at least 0")
        self.u_PF = np.zeros((permutations, n_features))
        # A stream of its own, so that the half-samples do not depend on how many shuffles there are.
        self._rng = np.random.default_rng([seed, 1])

    def add(self, block: Block, x_BL: Array) -> None:
        """Adds a block with its centred log activations; labels need no centring, as these are."""
        questions = np.split(block.right_B, block.start_Q[1:])
        right_PB = np.concatenate([self._shuffled(right_G) for right_G in questions], axis=1)
        self.u_PF[:, block.live_L] += right_PB.astype(np.float64) @ x_BL

    def _shuffled(self, right_G: Bools) -> Bools:
        return self._rng.permuted(np.tile(right_G, (len(self.u_PF), 1)), axis=1)

    def largest(self, slopes: SlopeSums, tested_F: Bools) -> Array:
        """[P]: each shuffle's largest |d| over the tested features."""
        kept = np.flatnonzero(tested_F)
        square_K = slopes.square_F[kept]
        effects = (cohens_d(u_F[kept], square_K, slopes.w, slopes.free) for u_F in self.u_PF)
        return np.array([np.abs(effect_K).max(initial=0.0) for effect_K in effects])


def family_p_values(effect_F: Array, largest_P: Array, tested_F: Bools) -> Array:
    """Family-wise p of each |effect|; 1 for features that are not tested."""
    bar_F = np.abs(effect_F) * (1 - ROUNDING)
    reached_F = len(largest_P) - np.searchsorted(np.sort(largest_P), bar_F, side="left")
    return np.where(tested_F, (1 + reached_F) / (1 + len(largest_P)), 1.0)
