"""A batch as TRL hands it out of generation and scoring: what the dense trainer takes from it, and a sample of it.

`out` is the dict that `GRPOTrainer._generate_and_score_completions` returns: prompts padded on the left, completions on
the right. TRL's log buffers hold the text of the rows of all processes, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
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


def totals(rewards_BN: Tensor, weights_N: Tensor) -> list[float | None]:
    """By row, the weighted sum of the scalar rewards that are there (not NaN); None if there are none."""
    weights = weights_N.tolist()
    rows = [[w * value for w, value in zip(weights, row, strict=True) if value == value] for row in rewards_BN.tolist()]
    return [sum(seen) if seen else None for seen in rows]


def sample(
    accelerator: Accelerator,
    inputs: Sequence[dict[str, Any]],
    out: Out,
    reward_BT: Tensor,
    mask_BT: Tensor,
    *,
    count: int,
    step: int,
    prompts: Sequence[Any],
    texts: Sequence[Any],
    outcomes: Sequence[float | None],
    token_text: Callable[[int], str],
) -> Rollouts:
    """Rows spread evenly over the batch of all processes, the same on each.

    Args:
        step: counts the steps done; it moves the rows, so that not every sample is the first of its group.
        prompts: of all processes, as `texts` and `outcomes` are; an environment may have written them.
    """
    first, total = accelerator.process_index * len(inputs), accelerator.num_processes * len(inputs)
    count = min(count, total)
    chosen = sorted({(i * total // count + step) % total for i in range(count)}) if count else []
    rows = [row - first for row in chosen if first <= row < first + len(inputs)]
    completions, pooled_B = completions_of(out), pool(reward_BT, mask_BT, "mean").tolist()
    own = Rollouts(
        step=step + 1,
        question_ids=[str(inputs[row].get("question_id", "")) for row in rows],
        prompts=[prompts[first + row] for row in rows],
        completions=[texts[first + row] for row in rows],
        tokens=[[token_text(token) for token in completions[row]] for row in rows],
        token_rewards=[reward_BT[row, : len(completions[row])].tolist() for row in rows],
        outcomes=[outcomes[first + row] for row in rows],
        feature_rewards=[pooled_B[row] for row in rows],
    )
    return _joined(gather_object([own]))


def _joined(parts: Sequence[Rollouts]) -> Rollouts:
    names = [field.name for field in fields(Rollouts) if field.name != "step"]
    lists: dict[str, Any] = {name: [value for part in parts for value in getattr(part, name)] for name in names}
    return replace(parts[0], **lists)


def _unpadded(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT.bool(), strict=True)]
