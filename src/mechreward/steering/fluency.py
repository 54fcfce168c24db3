"""Whether steered text is still text: its NLL under the unsteered model, and how much of it repeats.

A steered model that has left the language writes what the model itself would never write (NLL goes up), or one thing
over and over (NLL may even go down, so repetition is looked at as well). Repetition is the share of a response's
4-grams of token ids that it has written before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mechreward.models import LoadedModel, iter_logits
from mechreward.rollout import Response

NGRAM = 4


@dataclass(frozen=True, eq=False)
class Fluency:
    """One number a response."""

    nll_R: NDArray[np.float64]
    """Mean over its tokens, in nats, under the unsteered model."""
    repetition_R: NDArray[np.float64]
    tokens_R: NDArray[np.int64]

    @property
    def nll(self) -> float:
        """Nats a token over all responses."""
        return float(np.average(self.nll_R, weights=self.tokens_R))

    @property
    def repetition(self) -> float:
        return float(self.repetition_R.mean())


def fluency(loaded: LoadedModel, responses: Sequence[Response], batch_size: int = 32) -> Fluency:
    """Reads the responses with the model as it is now: call it outside of `Variant.steered`.

    Raises:
        InputError: as `models.iter_logits`.
    """
    nll_R = np.zeros(len(responses))
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    for batch in iter_logits(loaded.model, prompts, completions, batch_size):
        nll_R[batch.rows] = (-batch.logprobs_BT.sum(-1) / batch.mask_BT.sum(-1)).cpu().numpy()
    repeated = np.array([repetition(completion) for completion in completions])
    return Fluency(nll_R, repeated, np.array([len(completion) for completion in completions]))


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams that have come before; 0 for fewer than two."""
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
