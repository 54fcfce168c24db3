"""A batch as TRL hands it out of generation and scoring: what the dense trainer takes from it, and a sample of it.

`out` is the dict that `GRPOTrainer._generate_and_score_completions` returns: prompts padded on the left, completions on
the right. TRL's log buffers hold text and scalar rewards of the rows of all processes, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor

from mechreward.reward import pool
from mechreward.training.logging import Rollouts

Out = dict[str, Any]


def loss_mask(out: Out) -> Tensor:
    """The completion tokens that are trained on: no padding, no tool output. [B, T] bool."""
    mask_BT = out["completion_mask"].bool()
    return mask_BT & out["tool_mask"].bool() if "tool_mask" in out else mask_BT


def prompts_of(out: Out) -> list[list[int]]:
    """Prompt ids without padding."""
    return _unpadded(out["prompt_ids"], out["prompt_mask"])


def completions_of(out: Out) -> list[list[int]]:
    """Completion ids without padding; none of a row that is masked as truncated."""
    return _unpadded(out["completion_ids"], out["completion_mask"])


def like(out: Out, values_BT: Tensor) -> Tensor:
    """Padded on the right with zeros to the batch's width (`pad_to_multiple_of`, truncated rows), on its device."""
    ids_BT = out["completion_ids"]
    short = ids_BT.shape[1] - values_BT.shape[1]
    assert len(values_BT) == len(ids_BT) and short >= 0, (values_BT.shape, ids_BT.shape)
    return torch.nn.functional.pad(values_BT, (0, short)).to(ids_BT.device)


def rows_of_all(accelerator: Accelerator, values_BT: Tensor) -> Tensor:
    """The rows of all processes in their order, padded on the right to the widest."""
    if accelerator.num_processes == 1:
        return values_BT
    numbers_BT = values_BT.long() if values_BT.dtype == torch.bool else values_BT
    return gather(accelerator.pad_across_processes(numbers_BT.contiguous(), dim=1)).to(values_BT.dtype)


@dataclass(frozen=True)
class Scalars:
    """Scalar rewards of the latest batch, of the rows of all processes."""

    columns: list[list[float]]
    """By reward function; NaN where it gave none."""
    weights: list[float]
    """By reward function."""

    def total(self, row: int) -> float | None:
        """The weighted sum of the rewards that are there; None if there are none."""
        values = [column[row] for column in self.columns]
        seen = [weight * value for weight, value in zip(self.weights, values, strict=True) if value == value]
        return sum(seen) if seen else None


def sample(
    inputs: Sequence[dict[str, Any]],
    out: Out,
    reward_BT: Tensor,
    mask_BT: Tensor,
    *,
    count: int,
    step: int,
    texts: Sequence[Any],
    outcomes: Sequence[float | None],
    token_text: Callable[[int], str],
) -> Rollouts:
    """Rows spread evenly over the batch. `step` counts the steps done: it moves the rows, so that not every sample is
    the first of its group."""
    total = len(inputs)
    count = min(count, total)
    rows = sorted({(i * total // count + step) % total for i in range(count)}) if count else []
    completions, pooled_B = completions_of(out), pool(reward_BT, mask_BT, "mean").tolist()
    return Rollouts(
        step=step + 1,
        question_ids=[str(inputs[row].get("question_id", "")) for row in rows],
        prompts=[inputs[row]["prompt"] for row in rows],
        completions=[texts[row] for row in rows],
        tokens=[[token_text(token) for token in completions[row]] for row in rows],
        token_rewards=[reward_BT[row, : len(completions[row])].tolist() for row in rows],
        outcomes=[outcomes[row] for row in rows],
        feature_rewards=[pooled_B[row] for row in rows],
    )


def _unpadded(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT.bool(), strict=True)]
