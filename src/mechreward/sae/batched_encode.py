"""The two functions by which the library that this one grew from reads an SAE; both are calls of its methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae.sae import SAE


def batched_encode(
    sae: SAE, activations: Float[Tensor, "*batch d"], batch_size: int = 64, dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch f"]:
    """`SAE.encode`, which batches by itself, cast to `dtype`.

    Raises:
        InputError: as `SAE.encode`, and for a batch size below 1.
    """
    _check(batch_size)
    acts = sae.encode(activations)
    return acts if dtype is None else acts.to(dtype)


def batched_encode_selective(
    sae: SAE, activations: Float[Tensor, "*batch d"], feature_ids: Sequence[int], batch_size: int = 64
) -> Float[Tensor, "*batch k"]:
    """`SAE.read`: the chosen features only, exactly, and without encoding the rest where that can be avoided.

    Raises:
        InputError: as `SAE.read`, and for a batch size below 1.
    """
    _check(batch_size)
    return sae.read(activations, feature_ids)


def _check(batch_size: int) -> None:
    # Kept for callers that pass it; the reader chooses its own blocks, and no result depends on them.
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} is not at least 1")
