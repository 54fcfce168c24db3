"""Stability over half-samples of questions (Meinshausen and Buhlmann 2010), drawn as complementary pairs (Shah and
Samworth 2013): of two questions in a row each half takes exactly one, so that a stream can be halved as it comes by."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mechreward.errors import InputError
from mechreward.features.mixed import Array, Block, Bools
from mechreward.features.slopes import cohens_d


class HalfSamples:
    """Says which of S halves each question is in, in the order in which questions are asked for.

    Raises:
        InputError: if `halves` is odd or less than 2.
    """

    def __init__(self, halves: int, seed: int) -> None:
        if halves < 2 or halves % 2:
            raise InputError(f"halves: {halves} is not allowed, it must be an even number of at least 2")
        self.halves = halves
        self._rng = np.random.default_rng(seed)
        self._odd_S: Bools | None = None

    def draw(self, n_questions: int) -> Bools:
        """[S, Q] for the next questions."""
        return np.stack([self._next() for _ in range(n_questions)], axis=1)

    def _next(self) -> Bools:
        if self._odd_S is not None:
            in_S, self._odd_S = ~self._odd_S, None
            return in_S
        first = self._rng.random(self.halves // 2) < 0.5
        self._odd_S = np.concatenate([first, ~first])
        return self._odd_S


class HalfSums:
    """What Cohen's d needs, for each half: two [S, F] sums."""

    def __init__(self, n_features: int, halves: int, seed: int) -> None:
        self.samples = HalfSamples(halves, seed)
        self.u_SF, self.square_SF = np.zeros((halves, n_features)), np.zeros((halves, n_features))
        self.w_S, self.free_S = np.zeros(halves), np.zeros(halves)

    def add(self, block: Block, u_QL: Array, square_QL: Array, w_Q: Array) -> None:
        """Adds a block; `within` gives the three."""
        in_SQ = self.samples.draw(len(w_Q)).astype(np.float64)
        self.u_SF[:, block.live_L] += in_SQ @ u_QL
        self.square_SF[:, block.live_L] += in_SQ @ square_QL
        self.w_S += in_SQ @ w_Q
        self.free_S += in_SQ @ (block.size_Q - 1.0)

    def stability(self, effect_F: Array, tested_F: Bools, top_k: int) -> Array:
        """Share of halves in which a tested feature is among the `top_k` of largest |effect| of its overall sign."""
        halves = zip(self.u_SF, self.square_SF, self.w_S, self.free_S, strict=True)
        # A half without a mixed question finds nothing.
        effects = (cohens_d(u_F, q_F, w, free) if w else np.zeros_like(u_F) for u_F, q_F, w, free in halves)
        return stability(effects, effect_F, tested_F, top_k)


def stability(effects: Iterable[Array], effect_F: Array, tested_F: Bools, top_k: int) -> Array:
    """Share of half-samples in which a tested feature is among the `top_k` of largest |effect| of its overall sign.
    Each sign has its own: where most answers are wrong, what goes with wrong ones would crowd all others out.

    Args:
        effects: of each half [F]; only order and sign count, so that a half may give its sum in place of its mean.
    """
    hits_F, n = np.zeros_like(effect_F), 0
    for half_F in effects:
        for sign in (1, -1):
            size_F = np.where(tested_F & (sign * half_F > 0), sign * half_F, 0)
            top = np.argsort(-size_F, kind="stable")[:top_k]
            hits_F[top] += (size_F[top] > 0) & (np.sign(effect_F[top]) == sign)
        n += 1
    return hits_F / n
