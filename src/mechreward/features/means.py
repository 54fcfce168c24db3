"""Mean of a number of every feature over questions, its one-sample t test, and its stability over half-samples.

A question counts once, however many answers it has, so that the t of the question means is the t clustered by question
(n - 1 degrees of freedom). Sums are Welford's: what is constant has a spread of exactly 0, an infinite t. Hence p
is never below 2 / 2^m, with m questions of another value than 0: the least of the exact test that turns their signs.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from mechreward.features.halves import HalfSamples, stability
from mechreward.features.mixed import Array, Bools

ROUNDING = 1e-5
"""Relative difference below which two mean activations are the same one, read in another batch."""


class QuestionMeans:
    """Running mean and squares of [F] over questions, and sums over S half-samples of them."""

    def __init__(self, n_features: int, halves: int, seed: int) -> None:
        self.n = 0
        self.mean_F, self.square_F, self.nonzero_F = np.zeros(n_features), np.zeros(n_features), np.zeros(n_features)
        self._samples = HalfSamples(halves, seed)
        self._sum_SF = np.zeros((halves, n_features))

    def add(self, value_F: Array) -> None:
        """One question's value."""
        self.n += 1
        self.nonzero_F += value_F != 0
        before_F = value_F - self.mean_F
        self.mean_F = self.mean_F + before_F / self.n
        self.square_F = self.square_F + before_F * (value_F - self.mean_F)
        self._sum_SF[self._samples.draw(1)[:, 0]] += value_F

    def p_values(self) -> Array:
        """Two-sided p that the mean over questions is 0; 1 where no more than one question has another value."""
        error_F = np.sqrt(self.square_F / max(self.n - 1, 1) / max(self.n, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            t_F = np.where(self.mean_F == 0, 0.0, np.abs(self.mean_F) / error_F)
        least_F = np.minimum(2.0 ** (1 - self.nonzero_F), 1.0)
        return np.maximum(2 * stats.t.sf(t_F, self.n - 1), least_F)

    def stability(self, tested_F: Bools, top_k: int) -> Array:
        """Share of halves in which a tested feature is among the `top_k` of largest |mean|, with its overall sign."""
        return stability(self._sum_SF, self.mean_F, tested_F, top_k)


def varies(scale_F: Array, mean_F: Array) -> Bools:
    """Whether a mean activation differs between answers to a question by more than float32 reading does."""
    return np.asarray(scale_F > ROUNDING * mean_F)
