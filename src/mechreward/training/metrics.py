"""The numbers of the dense part that the trainer logs beside TRL's own, each over the rows of all processes.

Every function is called by all processes, at the same time: they exchange what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from accelerate.utils import gather
from torch import Tensor

from mechreward.reward import Advantages, FeatureReward, pool

Metrics = dict[str, float]


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number behind one that came before: `a`, `b`, `a_2`."""
    found: list[str] = []
    for name in names:
        again = (f"{name}_{number}" for number in count(2))
        found.append(name if name not in found else next(other for other in again if other not in found))
    return found


def component_metrics(
    reward: FeatureReward, name: str, reward_BT: Tensor, mask_BT: Tensor, step_end_BT: Tensor | None
) -> Metrics:
    """Mean and standard deviation (of the rows at hand) of a reward's trajectory value; nothing if no row has one."""
    pooled_B = gather(pool(reward_BT, mask_BT, reward.aggregation, step_end_BT))
    seen_B = pooled_B[~pooled_B.isnan()]
    if not len(seen_B):
        return {}
    mean, std = seen_B.mean().item(), seen_B.std(correction=0).item()
    return {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}


def dense_metrics(advantages: Advantages) -> Metrics:
    """Sizes of the two advantages, the groups without a spread in outcomes, and the dense share of the total: of its
    squared length the part along the dense advantages, 0 if they do nothing, 1 if they are all there is."""
    along, total = (
        gather((part_BT * advantages.total_BT).sum()).sum().item()
        for part_BT in (advantages.dense_BT, advantages.total_BT)
    )
    return {
        "dense/advantage_rms": advantages.dense_rms,
        "dense/outcome_advantage_rms": advantages.outcome_rms,
        "dense/zero_variance_groups": advantages.degenerate_share,
        "dense/share": along / total if total > 0 else 0.0,
    }


def gap_metrics(policy_BT: Tensor, frozen_BT: Tensor, mask_BT: Tensor) -> Metrics:
    """What the policy's own states add to the reward of its text: live minus frozen reader, over all tokens."""
    gap_N = (policy_BT - frozen_BT)[mask_BT].double()
    sums = torch.stack([gap_N.sum(), gap_N.square().sum(), mask_BT.sum().double()])
    total, squares, count = gather(sums[None]).sum(0).tolist()
    if not count:
        return {}
    return {"dense/reader_gap": total / count, "dense/reader_gap_rms": (squares / count) ** 0.5}
