"""How outcome and token rewards travel together through a trainer that carries one number a token (verl's `rm_scores`).

The last trained token of a row carries its outcome, the others their feature reward times 2**-20: verl adds a row up
wherever it speaks of "the score", in logs and in validation, and so goes on seeing the outcome. A power of two costs no
digit, and the advantage is scaled by the features' own RMS anyway. A token that has no reward carries minus zero, which
adds nothing and is still told from a reward of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError

UNIT = 2.0**-20


def pack_row(outcome: float, token_rewards: Sequence[float | None], mask: Sequence[int]) -> Float[Tensor, " t"]:
    """One row's numbers: [T] float32, 0 where `mask` is.

    Args:
        outcome: reward of the completion.
        token_rewards: one a token, None for one without.
        mask: 1 for the tokens that are trained on.

    Raises:
        InputError: if lengths differ or no token is trained on.
    """
    if len(token_rewards) != len(mask):
        raise InputError(f"token_rewards: {len(token_rewards)} for {len(mask)} tokens; give one each")
    trained = [place for place, on in enumerate(mask) if on]
    if not trained:
        raise InputError("mask: no token is trained on; there is none to carry the outcome")
    values_T = torch.tensor([0.0 if value is None else value for value in token_rewards])
    missing_T = torch.tensor([value is None for value in token_rewards])
    carried_T = (values_T * UNIT + 0.0).masked_fill(missing_T, -0.0)  # + 0.0: a reward of minus zero is one of zero
    row_T = carried_T.where(torch.tensor(mask) == 1, 0.0)
    row_T[trained[-1]] = outcome
    return row_T


def unpack(
    scores_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Outcomes, token rewards and which tokens have one, of rows made by `pack_row`; NaN for a row without tokens."""
    positions_T = torch.arange(scores_BT.shape[1], device=scores_BT.device)
    last_B1 = torch.where(mask_BT, positions_T, -1).amax(dim=1, keepdim=True)
    outcome_B = scores_BT.gather(1, last_B1.clamp(min=0))[:, 0].masked_fill(last_B1[:, 0] < 0, torch.nan)
    missing_BT = (scores_BT == 0) & scores_BT.signbit()
    has_BT = mask_BT & (positions_T != last_B1) & ~missing_BT
    return outcome_B, (scores_BT / UNIT).masked_fill(~has_BT, 0.0), has_BT
