"""The pooled activations of all answers, for what cannot be had from one pass: fits, and scores on held-out questions.

Kept sparse (a feature's activation where it fires), so that memory grows with what fires and not with answers x F.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from mechreward.features.mixed import Bools
from mechreward.features.pooling import PooledBatch


@dataclass(frozen=True)
class PooledRows:
    """Answers in the order in which they came; `acts_NF` in the SAE's units."""

    questions: list[str]
    right_N: Bools
    acts_NF: sparse.csr_array
    states_ND: NDArray[np.float32] | None

    def part(self, places: NDArray[np.intp]) -> PooledRows:
        """Some of the answers."""
        states = None if self.states_ND is None else self.states_ND[places]
        questions = [self.questions[place] for place in places.tolist()]
        return PooledRows(questions, self.right_N[places], self.acts_NF[places], states)

    def batches(self, places: NDArray[np.intp]) -> Iterator[PooledBatch]:
        """Some of the answers as a stream again, a question a batch."""
        by_question: dict[str, list[int]] = {}
        for place in places.tolist():
            by_question.setdefault(self.questions[place], []).append(place)
        for question, rows in by_question.items():
            acts_GF = torch.from_numpy(self.acts_NF[rows].toarray())
            yield PooledBatch([question] * len(rows), torch.from_numpy(self.right_N[rows]), acts_GF)

    def centred(self, columns_K: NDArray[np.intp]) -> sparse.csr_array:
        """[N, K]: chosen features less their mean over the question.

        Sparse still: a feature that fires in no answer to a question stays 0 there.
        """
        kept_NK = self.acts_NF[:, columns_K]
        codes = np.unique(self.questions, return_inverse=True)[1]
        row, column, value = [], [], []
        for code in range(codes.max() + 1):
            places = np.flatnonzero(codes == code)
            part = kept_NK[places]
            fires = np.unique(part.indices)
            acts_GL = part[:, fires].toarray().astype(np.float64)
            rest_GL = acts_GL - acts_GL[0]
            rest_GL -= rest_GL.mean(0)
            g, at = np.nonzero(rest_GL)
            row.append(places[g])
            column.append(fires[at])
            value.append(rest_GL[g, at])
        # liblinear takes indices of 32 bits alone.
        places_2M = np.stack([np.concatenate(row), np.concatenate(column)]).astype(np.int32)
        entries = (np.concatenate(value), (places_2M[0], places_2M[1]))
        return sparse.coo_array(entries, shape=kept_NK.shape).tocsr()


@dataclass
class RowCollector:
    """Keeps what a stream of pooled batches holds while it goes by."""

    _batches: list[tuple[list[str], Bools, sparse.csr_array, NDArray[np.float32] | None]] = field(default_factory=list)

    def through(self, batches: Iterable[PooledBatch]) -> Iterator[PooledBatch]:
        """The same batches."""
        for batch in batches:
            states = None if batch.states_BD is None else batch.states_BD.numpy()
            acts_BF = sparse.csr_array(batch.acts_BF.numpy())
            self._batches.append((batch.question_ids, batch.correct_B.numpy(), acts_BF, states))
            yield batch

    def rows(self) -> PooledRows:
        """All that went by."""
        questions, right, acts, states = zip(*self._batches, strict=True)
        kept = [part for part in states if part is not None]
        return PooledRows(
            questions=[name for part in questions for name in part],
            right_N=np.concatenate(right),
            acts_NF=sparse.vstack(acts, format="csr"),
            states_ND=np.concatenate(kept) if len(kept) == len(states) else None,
        )
