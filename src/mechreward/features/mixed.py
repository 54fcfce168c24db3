"""Answers to questions that have right and wrong ones, block by block: what every within-question statistic is fed.

A block holds whole questions, in order of first appearance, and only the columns of features that fire in it: a feature
that is 0 in all answers to a question adds exactly 0 to each sum that the statistics keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mechreward.errors import InputError
from mechreward.features.pooling import PooledBatch

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Block:
    """Answers to Q mixed questions, those to question q in rows `start_Q[q]` up to the next start."""

    acts_BL: Array
    """Pooled activations of the features that fire in this block."""
    live_L: NDArray[np.intp]
    """Their ids."""
    right_B: Bools
    start_Q: NDArray[np.intp]
    n_features: int

    @property
    def size_Q(self) -> NDArray[np.intp]:
        """Answers to each question."""
        return np.diff(np.append(self.start_Q, len(self.right_B)))

    def totals(self, values_B: Array) -> Array:
        """Sum over the answers to each question: [B, ...] -> [Q, ...]."""
        return np.add.reduceat(values_B, self.start_Q, axis=0)

    def spread(self, values_Q: Array) -> Array:
        """Each question's value at each of its answers: [Q, ...] -> [B, ...]."""
        return np.repeat(values_Q, self.size_Q, axis=0)

    def centred(self, values_B: Array) -> Array:
        """Values less their mean over the answers to the same question."""
        # The first row is taken off first: what is constant becomes exactly 0, not a rounding error.
        rest_B = values_B - self.spread(values_B[self.start_Q])
        size_Q = self.size_Q.reshape(-1, *[1] * (values_B.ndim - 1))
        return rest_B - self.spread(self.totals(rest_B) / size_Q)


@dataclass
class MixedQuestions:
    """Turns a stream of pooled batches into blocks, and counts what comes by."""

    questions: set[str] = field(default_factory=set)
    classes: set[bool] = field(default_factory=set)
    n_seen: int = 0
    n_mixed: int = 0

    def blocks(self, batches: Iterable[PooledBatch]) -> Iterator[Block]:
        """The mixed questions of each batch that has any.

        Raises:
            InputError: if a question comes in two batches or an activation is not finite.
        """
        for batch in batches:
            block = self._block(batch)
            if block is not None:
                yield block

    def check(self) -> None:
        """Checks that there was something to contrast.

        Raises:
            InputError: if there were no answers, those of one class only, or fewer than two mixed questions.
        """
        check_mixed(self.n_mixed, len(self.questions), self.n_seen, self.classes)

    def _block(self, batch: PooledBatch) -> Block | None:
        acts_BF, right_B = batch.acts_BF.numpy(), batch.correct_B.numpy()
        if not np.isfinite(acts_BF).all():
            raise InputError("activations: NaN or infinite values cannot be contrasted")
        names = list(dict.fromkeys(batch.question_ids))
        twice = self.questions.intersection(names)
        if twice:
            raise InputError(f"batches: question {min(twice)} comes in two batches, its answers must come in one")
        self.questions.update(names)
        self.classes.update(right_B.tolist())
        self.n_seen += len(right_B)
        place = {name: at for at, name in enumerate(names)}
        code_B = np.array([place[name] for name in batch.question_ids], dtype=np.intp)
        n_Q, n_right_Q = np.bincount(code_B), np.bincount(code_B, right_B)
        mixed_Q = (n_right_Q > 0) & (n_right_Q < n_Q)
        if not mixed_Q.any():
            return None
        self.n_mixed += int(mixed_Q.sum())
        order = np.argsort(code_B, kind="stable")
        order = order[mixed_Q[code_B[order]]]
        size_Q = n_Q[mixed_Q]
        live_L = np.flatnonzero(acts_BF[order].any(0))
        acts_BL = acts_BF[np.ix_(order, live_L)].astype(np.float64)
        return Block(acts_BL, live_L, right_B[order], np.cumsum(size_Q) - size_Q, acts_BF.shape[1])


def check_mixed(n_mixed: int, n_questions: int, n_responses: int, classes: set[bool], *, least: int = 2) -> None:
    """Raises InputError, in one sentence, where there is nothing to contrast, or fewer mixed questions than `least`."""
    if n_responses == 0:
        raise InputError("responses: there are none to contrast")
    if len(classes) == 1:
        word = "right" if True in classes else "wrong"
        raise InputError(
            f"correct: all {n_responses} answers are {word}, a contrast needs right and wrong answers; "
            f"use {'harder' if word == 'right' else 'easier'} questions"
        )
    if n_mixed < least:
        what = "a contrast" if least == 2 else "cross-fitting a contrast"
        raise InputError(
            f"correct: only {n_mixed} of {n_questions} questions have both right and wrong answers, {what} needs "
            f"at least {least}; use more questions, more answers a question or another difficulty"
        )
