"""Terms that hold a policy back, as rewards: none takes a gradient.

`kl_penalty` and `entropy_bonus` are sample estimates at the tokens that were written: under the policy their means are
KL(policy || reference) and the policy's entropy, and as rewards their expected policy gradient is that of those
numbers. (As differentiable losses both would have an expected gradient of 0 or another one: they are not meant as such;
TRL's `beta` puts a KL term into the loss.)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.hacking.config import Regularizers

Reduction = str
"""none, mean or sum."""


def kl_penalty(
    policy_logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], reduction: Reduction = "mean"
) -> Tensor:
    """log pi(token) - log pi_ref(token), in nats: the sample estimate of KL(policy || reference), which may be negative
    at a token.

    Raises:
        InputError: for an unknown reduction.
    """
    return _reduced((policy_logprobs - ref_logprobs).detach(), reduction)


def entropy_bonus(policy_logprobs: Float[Tensor, "*shape"], reduction: Reduction = "mean") -> Tensor:
    """-log pi(token), in nats: the sample estimate of the policy's entropy at each token.

    Raises:
        InputError: for an unknown reduction.
    """
    return _reduced(-policy_logprobs.detach(), reduction)


def feature_diversity_bonus(
    acts_BTK: Float[Tensor, "b t k"], mask_BT: Bool[Tensor, "b t"] | None = None
) -> Float[Tensor, " b"]:
    """How evenly K features share a completion's activation: entropy of their shares over log K, from 0 (one feature
    does it all, or none fires) to 1 (all alike)."""
    if mask_BT is not None:
        acts_BTK = acts_BTK.masked_fill(~mask_BT[..., None], 0.0)
    total_BK = acts_BTK.detach().sum(1)
    share_BK = total_BK / total_BK.sum(1, keepdim=True).clamp(min=torch.finfo(total_BK.dtype).tiny)
    entropy_B = torch.special.entr(share_BK).sum(1)
    features = total_BK.shape[1]
    return entropy_B / torch.tensor(float(features)).log() if features > 1 else torch.zeros_like(entropy_B)


def reward_variance_penalty(
    reward_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"] | None = None
) -> Float[Tensor, " b"]:
    """Variance of a completion's token rewards: large where a few tokens carry it all. 0 for an empty row."""
    mask_BT = torch.ones_like(reward_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    n_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    values_BT = reward_BT.detach().masked_fill(~mask_BT, 0.0)
    off_BT = (values_BT - values_BT.sum(1, keepdim=True) / n_B1).masked_fill(~mask_BT, 0.0)
    return off_BT.square().sum(1) / n_B1[:, 0]


def regularised(
    reward_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    weights: Regularizers,
    *,
    policy_logps_BT: Float[Tensor, "b t"] | None = None,
    ref_logps_BT: Float[Tensor, "b t"] | None = None,
    acts_BTK: Float[Tensor, "b t k"] | None = None,
) -> Float[Tensor, "b t"]:
    """Token rewards with every term whose weight is not 0; 0 where masked.

    Raises:
        InputError: if a term is asked for without what it is computed from.
    """
    total_BT = reward_BT.clone()
    if weights.variance:
        total_BT = total_BT - weights.variance * reward_variance_penalty(reward_BT, mask_BT)[:, None]
    if weights.diversity:
        total_BT = (
            total_BT + weights.diversity * feature_diversity_bonus(_there(acts_BTK, "diversity"), mask_BT)[:, None]
        )
    if weights.entropy:
        total_BT = total_BT + weights.entropy * entropy_bonus(_there(policy_logps_BT, "entropy"), "none")
    if weights.kl:
        apart_BT = kl_penalty(_there(policy_logps_BT, "kl"), _there(ref_logps_BT, "kl"), "none")
        total_BT = total_BT - weights.kl * apart_BT
    return total_BT.masked_fill(~mask_BT, 0.0)


def _there(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise InputError(f"regularizers.{name}: what it is computed from is not at hand; set it to 0")
    return values


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction: {reduction!r} is not one of none, mean, sum")
    return values.mean() if reduction == "mean" else values.sum()
