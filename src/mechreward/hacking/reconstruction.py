"""How well the SAE rebuilds what a rollout's tokens leave in the residual stream."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.sae import SAE


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
    acts_NF = sae.encode(h_ND)
    back_ND, centre_ND = sae.decode(acts_NF, h_ND), sae.decode(acts_NF.zero_(), h_ND)
    row_N = read_BT.nonzero()[:, 0]
    zeros_B = torch.zeros(len(h_BTD), device=h_BTD.device)
    wrong_B = zeros_B.index_add(0, row_N, (h_ND - back_ND).square().sum(1))
    size_B = zeros_B.index_add(0, row_N, (h_ND - centre_ND).square().sum(1))
    return torch.where(size_B > 0, wrong_B / size_B.clamp(min=1e-30), torch.nan)
