"""How well the SAE rebuilds what a rollout's tokens leave in the residual stream."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.sae import SAE
from mechreward.sae.kinds import norm_statistics


def row_fvu(sae: SAE, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"], tokens: int) -> Float[Tensor, " b"]:
    """Fraction of variance unexplained of each row, on `tokens` of its tokens, evenly spaced: squared error of the
    reconstruction over squared distance from the SAE's own centre, what it rebuilds from no feature at all (b_dec, with
    `input_norm` undone). NaN for a row without tokens."""
    rank_BT = mask_BT.cumsum(1) - 1
    count_B1 = mask_BT.sum(1, keepdim=True)
    # The place that tokens 0 ... n-1 take among `tokens` even shares; the first of each share is read.
    share_BT = rank_BT * tokens // count_B1.clamp(min=1)
    before_BT = (rank_BT - 1) * tokens // count_B1.clamp(min=1)
    read_BT = mask_BT & ((rank_BT == 0) | (share_BT != before_BT))
    h_ND = h_BTD[read_BT].float()
    back_ND = sae.decode(sae.encode(h_ND), h_ND)
    row_N = read_BT.nonzero()[:, 0]
    zeros_B = torch.zeros(len(h_BTD), device=h_BTD.device)
    wrong_B = zeros_B.index_add(0, row_N, (h_ND - back_ND).square().sum(1))
    size_B = zeros_B.index_add(0, row_N, (h_ND - _centre(sae, h_ND)).square().sum(1))
    return torch.where(size_B > 0, wrong_B / size_B.clamp(min=1e-30), torch.nan)


def _centre(sae: SAE, h_ND: Float[Tensor, "n d"]) -> Tensor:
    # What `decode` makes of no features, without its product of all of them: this is read at every training step.
    if sae.input_norm == "none":
        return sae.b_dec_D
    shift_N1, scale_N1 = norm_statistics(h_ND, sae.input_norm)
    return sae.b_dec_D * scale_N1 + shift_N1
