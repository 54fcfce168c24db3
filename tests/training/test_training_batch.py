"""A batch as TRL hands it out, by hand: masks, unpadded rows, scalar rewards, and which rows are kept as a sample."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from mechreward.training.batch import (
    completions_of,
    like,
    loss_mask,
    prompts_of,
    rows_of_all,
    sample,
    totals,
)

OUT = {
    "prompt_ids": torch.tensor([[0, 0, 5], [6, 7, 8]]),
    "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
    "completion_ids": torch.tensor([[9, 10, 0, 0], [11, 12, 13, 1]]),
    "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
    "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]]),
}


def test_masks_and_unpadded_rows() -> None:
    assert loss_mask(OUT).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 1]]
    plain = {key: value for key, value in OUT.items() if key != "tool_mask"}
    assert loss_mask(plain).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert prompts_of(OUT) == [[5], [6, 7, 8]]
    assert completions_of(OUT) == [[9, 10], [11, 12, 13, 1]], "what a tool said is part of what was read"
    masked = {**OUT, "completion_mask": torch.zeros(2, 4)}
    assert completions_of(masked) == [[], []]


def test_values_are_padded_on_the_right() -> None:
    assert like(OUT, torch.tensor([[1.0], [2.0]])).tolist() == [[1.0, 0, 0, 0], [2.0, 0, 0, 0]]
    with pytest.raises(AssertionError):
        like(OUT, torch.zeros(2, 5))
    with pytest.raises(AssertionError):
        like(OUT, torch.zeros(3, 4))
    values = torch.tensor([[True, False]])
    assert rows_of_all(Accelerator(cpu=True), values) is values


def test_scalar_rewards_that_are_not_there_are_left_out() -> None:
    rewards_BN = torch.tensor([[1.0, 0.5], [math.nan, 3.0], [math.nan, math.nan]])
    assert totals(rewards_BN, torch.tensor([2.0, -1.0])) == [1.5, -3.0, None]


def taken(count: int, step: int, total: int = 8) -> list[str]:
    mask = torch.ones(total, 2, dtype=torch.long)
    out = {"completion_ids": torch.arange(2 * total).view(total, 2), "completion_mask": mask}
    rollouts = sample(
        Accelerator(cpu=True),
        [{"question_id": f"q{row}"} for row in range(total)],
        out,
        torch.arange(2.0 * total).view(total, 2),
        mask.bool(),
        count=count,
        step=step,
        prompts=[f"p{row}" for row in range(total)],
        texts=[f"t{row}" for row in range(total)],
        outcomes=[float(row) for row in range(total)],
        token_text=str,
    )
    for i, question in enumerate(rollouts.question_ids):
        row = int(question[1:])
        assert (rollouts.prompts[i], rollouts.completions[i], rollouts.outcomes[i]) == (f"p{row}", f"t{row}", row)
        assert rollouts.tokens[i] == [str(2 * row), str(2 * row + 1)]
        assert rollouts.token_rewards[i] == [2.0 * row, 2.0 * row + 1] and rollouts.feature_rewards[i] == 2 * row + 0.5
    assert rollouts.step == step + 1
    return rollouts.question_ids


def test_the_sample_is_spread_and_moves_with_the_step() -> None:
    assert taken(2, 0) == ["q0", "q4"]
    assert taken(2, 1) == ["q1", "q5"]
    assert taken(2, 5) == ["q1", "q5"]
    assert taken(99, 3) == [f"q{row}" for row in range(8)]
    assert taken(0, 3) == []
