"""From one number a token to one number a completion: mean, maximum or last, over unmasked tokens only.

A completion without a single unmasked token has no value: NaN, which the rewards turn into None, never into 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError

Aggregation = Literal["mean", "max", "last", "per_token"]


def check_aggregation(aggregation: str) -> None:
    """Raises InputError unless `aggregation` is one of mean, max, last, per_token."""
    if aggregation not in get_args(Aggregation):
        raise InputError(f"aggregation: {aggregation!r} is not one of {', '.join(get_args(Aggregation))}")


def pool(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"], aggregation: str) -> Float[Tensor, " b"]:
    """Pools token values; `per_token` pools like `mean`, which is what a trajectory needs of a dense reward.

    Returns:
        [B] float32; NaN for a row whose mask is empty.

    Raises:
        InputError: for an unknown aggregation.
    """
    check_aggregation(aggregation)
    if aggregation == "max":
        return pool_max(values_BT, mask_BT)
    if aggregation == "last":
        return pool_last(values_BT, mask_BT)
    return pool_mean(values_BT, mask_BT)


def pool_mean(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Mean over unmasked tokens (0/0 is the NaN of an empty row)."""
    return values_BT.float().masked_fill(~mask_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1)


def pool_max(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Largest value over unmasked tokens."""
    if values_BT.shape[1] == 0:
        return _empty_rows_to_nan(values_BT.new_zeros(len(values_BT)), mask_BT)
    highest_B = values_BT.float().masked_fill(~mask_BT, -torch.inf).amax(dim=1)
    return _empty_rows_to_nan(highest_B, mask_BT)


def pool_last(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Value at the last unmasked token."""
    if values_BT.shape[1] == 0:
        return _empty_rows_to_nan(values_BT.new_zeros(len(values_BT)), mask_BT)
    last_B = last_token(mask_BT).clamp(min=0)
    return _empty_rows_to_nan(values_BT.float().gather(1, last_B[:, None])[:, 0], mask_BT)


def last_token(mask_BT: Bool[Tensor, "b t"]) -> Tensor:
    """Position of each row's last unmasked token, -1 for an empty row. [B] int64."""
    positions_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT * positions_T).amax(dim=1) - 1


def _empty_rows_to_nan(values_B: Tensor, mask_BT: Tensor) -> Tensor:
    return values_B.masked_fill(~mask_BT.any(dim=1), torch.nan)
