"""How much a rollout says again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

N = 4
"""Tokens in a gram: single words and pairs repeat in every honest text."""


def repetition(completion_ids: Sequence[Sequence[int]], n: int = N) -> Float[Tensor, " b"]:
    """Share of each completion's n-grams that are equal to an earlier one of it; 0 if it is shorter than n + 1."""
    shares = []
    for ids in completion_ids:
        grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
        shares.append(1.0 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(shares, dtype=torch.float32)
