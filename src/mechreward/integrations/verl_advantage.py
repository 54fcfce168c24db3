"""verl's advantage estimator `mechreward`: `algorithm.adv_estimator=mechreward`, for rows of `MechRewardAgentLoop`.

The outcome's advantage is verl's own GRPO advantage (`norm_adv_by_std_in_grpo` holds); the dense part is ours,
`A = A_outcome + A_dense` with the credit, the centring and the scale of `reward.credit`. A row's last token carries
its outcome and has no token reward. Options, each with a `+` before it on verl's command line:

    algorithm.mechreward.weight   lambda, the dense share of the outcome advantage's RMS (0.1)
    algorithm.mechreward.credit   per_token, return_to_go, potential or trajectory (per_token)
    algorithm.gamma               discount of return_to_go and potential

verl loads this module by the entry point `verl.plugins` in each of its processes; what costs time is imported when the
first advantage is wanted. The outcome's RMS, for batches in which no group has a spread, starts at 1 in each run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est

from mechreward.errors import InputError
from mechreward.integrations.token_scores import unpack

NAME = "mechreward"
CREDITS = ("per_token", "return_to_go", "potential", "trajectory")


class Estimator:
    """Remembers the outcome advantage's last RMS from batch to batch."""

    def __init__(self) -> None:
        self.outcome_rms = 1.0

    def __call__(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any,
        index: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Advantages [B, T], twice: verl wants returns too, and nothing here has a critic.

        Raises:
            InputError: for groups of different sizes, an unknown option, or KL in the reward, which would change it.
        """
        from mechreward.reward import dense_advantages, token_credit

        weight, credit = _options(config)
        mask_BT = response_mask.bool()
        outcome_B, reward_BT, has_BT = unpack(token_level_rewards.float(), mask_BT)
        order_B, size = _groups(index, len(mask_BT))
        column_B1 = outcome_B[:, None]
        normalise = bool(config.get("norm_adv_by_std_in_grpo", True))
        advantage_B1, _same = compute_grpo_outcome_advantage(
            column_B1.clone(), torch.ones_like(column_B1), index, norm_adv_by_std_in_grpo=normalise
        )
        credit_BT = token_credit(reward_BT, has_BT, credit, float(config.get("gamma", 1.0)))
        found = dense_advantages(
            advantage_B1[order_B, 0],
            credit_BT[order_B],
            has_BT[order_B],
            mask_BT[order_B],
            size,
            weight,
            self.outcome_rms,
        )
        self.outcome_rms = found.outcome_rms
        total_BT = torch.empty_like(found.total_BT)
        total_BT[order_B] = found.total_BT
        return total_BT, total_BT


def _options(config: Any) -> tuple[float, str]:
    if config.get("use_kl_in_reward", False):
        raise InputError("use_kl_in_reward: true would be added to the token rewards; use actor.use_kl_loss=true")
    given = dict(config.get(NAME) or {})
    weight, credit = given.pop("weight", 0.1), given.pop("credit", "per_token")
    if given:
        raise InputError(f"{NAME}.{min(given)}: there is no such option; there are weight and credit")
    if credit not in CREDITS:
        raise InputError(f"{NAME}.credit: {credit!r} is not one of {', '.join(CREDITS)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise InputError(f"{NAME}.weight: {weight!r} is not a number of 0 or more")
    return float(weight), credit


def _groups(index: Any, rows: int) -> tuple[Tensor, int]:
    """Places of the rows so that those of one prompt are neighbours, and how many each prompt has."""
    if index is None or len(index) != rows:
        raise InputError("uid: is missing; a group baseline needs to know which rows share a prompt")
    _, group_B, counts = np.unique(np.asarray(index).astype(str), return_inverse=True, return_counts=True)
    if counts.min() != counts.max():
        raise InputError(f"uid: groups have {counts.min()} to {counts.max()} rows; all must have rollout.n")
    return torch.from_numpy(np.argsort(group_B, kind="stable")), int(counts[0])


register_adv_est(NAME)(Estimator())
