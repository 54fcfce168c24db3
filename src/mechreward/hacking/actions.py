"""What is done to a flagged rollout, where group normalisation cannot undo it.

Scaling a rollout's *reward* before GRPO centres it does something else than it says: scaling a whole batch cancels, and
scaling one reward of a group moves the baseline of all others. So the actions work on advantages, after centring and
scaling:

- `zero`: all its advantages become 0: it neither teaches nor is untaught (ProFIL, 2605.11467). The others keep theirs.
- `downweight`: its advantages are multiplied by a factor. The others keep theirs.
- `drop`: as if it had not been sampled: its advantages become 0, its tokens leave the loss and the count of tokens
  that the loss is divided by (a loss that is divided by rows, as `grpo` and `dr_grpo`, still counts its row), and the
  others are centred anew, A_i - mean over the kept rows of their mean advantage, which equals centring their rewards
  without it. What the group was divided by, if anything, stays.

`neutral_rewards` is for trainers that are handed rewards alone: the flagged reward becomes the mean of its group's
unflagged ones, whose centred advantage is 0 whatever the group is then divided by.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError

Action = str
ACTIONS = ("zero", "downweight", "drop")


def check_action(action: str, factor: float) -> None:
    """Raises InputError for an unknown action, or a factor outside 0 ... 1."""
    if action not in ACTIONS:
        raise InputError(f"action: {action!r} is not one of {', '.join(ACTIONS)}")
    if not 0 <= factor <= 1:
        raise InputError(f"downweight_factor: {factor} is outside 0 ... 1")


def act_on_rollouts(
    advantages_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    flagged_B: Bool[Tensor, " b"],
    action: Action,
    *,
    group_size: int,
    factor: float = 0.2,
) -> tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Advantages and loss mask after the action.

    Args:
        advantages_BT: centred and scaled, in group order; [B, 1] for one a rollout.
        mask_BT: the tokens that are trained on.
        group_size: completions a prompt.

    Raises:
        InputError: an unknown action, or rows that are not whole groups.
    """
    check_action(action, factor)
    if group_size < 1 or len(advantages_BT) % group_size:
        raise InputError(f"group_size: {len(advantages_BT)} rows are not whole groups of {group_size}")
    if action != "drop":
        share_B = torch.where(flagged_B, 0.0 if action == "zero" else factor, 1.0)
        return advantages_BT * share_B.to(advantages_BT)[:, None], mask_BT
    kept_BT = mask_BT & ~flagged_B[:, None]
    mean_B = advantages_BT.masked_fill(~kept_BT, 0.0).sum(1) / kept_BT.sum(1).clamp(min=1)
    rows_G = kept_BT.any(1).view(-1, group_size).sum(1).clamp(min=1)
    baseline_B = (mean_B.view(-1, group_size).sum(1) / rows_G).repeat_interleave(group_size)
    changed_B = flagged_B.view(-1, group_size).any(1).repeat_interleave(group_size)
    centred_BT = advantages_BT - (baseline_B * changed_B)[:, None]
    return centred_BT.masked_fill(~kept_BT, 0.0), kept_BT


def neutral_rewards(
    rewards_B: Float[Tensor, " b"], flagged_B: Bool[Tensor, " b"], group_B: Tensor, share: float = 0.0
) -> Float[Tensor, " b"]:
    """Rewards in which a flagged one is moved to the mean of its group's unflagged ones, but for `share` of its
    distance from it; in a group without unflagged rewards all become the group's mean. NaN stays, and counts nowhere.

    Args:
        group_B: number of each row's group, from 0.
    """
    seen_B = ~rewards_B.isnan()
    kept_B = seen_B & ~flagged_B
    n_groups = int(group_B.max()) + 1 if len(group_B) else 0

    def mean(of_B: Tensor) -> Tensor:
        zeros_G = torch.zeros(n_groups, dtype=torch.float64, device=rewards_B.device)
        total_G = zeros_G.index_add(0, group_B, rewards_B.masked_fill(~of_B, 0.0).double())
        count_G = zeros_G.index_add(0, group_B, of_B.double())
        return torch.where(count_G > 0, total_G / count_G.clamp(min=1), torch.nan)

    of_kept_G, of_all_G = mean(kept_B), mean(seen_B)
    target_B = torch.where(of_kept_G.isnan(), of_all_G, of_kept_G)[group_B]
    moved_B = target_B + share * (rewards_B.double() - target_B)
    return torch.where(flagged_B & seen_B, moved_B, rewards_B.double()).to(rewards_B.dtype)
