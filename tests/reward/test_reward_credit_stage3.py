"""The seed's own formula against a loop written from its description, and each of its four defects as a number."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.reward import stage3_advantages, token_credit


def naive(
    outcomes: list[float], rewards: list[list[float]], prompts: list[int], group: int, weight: float
) -> list[list[float]]:
    """Whole padded rows, prompt and padding as zeros, position 0 cut off; rows hold completion tokens only."""
    width = max(p + len(r) for p, r in zip(prompts, rewards, strict=True))
    padded = [[0.0] * p + r + [0.0] * (width - p - len(r)) for p, r in zip(prompts, rewards, strict=True)]
    totals = []
    for start in range(0, len(rewards), group):
        rows = range(start, start + group)
        paid = [outcomes[i] + weight * (sum(rewards[i]) / max(1, len(rewards[i]))) for i in rows]
        places = [value for i in rows for value in padded[i][1:]]
        mean, std = statistics.mean(places), statistics.stdev(places)
        for i in rows:
            advantage = (paid[i - start] - statistics.mean(paid)) / (statistics.stdev(paid) + 1e-8)
            row = [(value - mean) / (std + 1e-8) for value in padded[i]][prompts[i] : prompts[i] + len(rewards[i])]
            totals.append([advantage + weight * z for z in row])
    return totals


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4]), st.floats(0.0, 2.0))
def test_against_a_loop(seed: int, group: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (8,), generator=generator).tolist()
    prompts = torch.randint(1, 5, (8,), generator=generator)
    outcomes = torch.randint(0, 2, (8,), generator=generator).float()
    reward = torch.randn(8, 7, generator=generator)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    result = stage3_advantages(outcomes, reward.masked_fill(~mask, math.nan), mask, prompts, group, weight)
    rows = [reward[i, :n].tolist() for i, n in enumerate(lengths)]
    expected = naive(outcomes.tolist(), rows, prompts.tolist(), group, weight)
    for row, values in enumerate(expected):
        assert result.total_BT[row, : len(values)].tolist() == pytest.approx(values, abs=1e-5)
        assert not result.total_BT[row, len(values) :].any() and not result.dense_BT[row, len(values) :].any()


def test_by_hand() -> None:
    # Prompts 1 and 2, completions 2 and 1: width 3. Positions 1 and 2 hold 3, 1 and 0, 4: mean 2, deviation sqrt(10/3).
    reward, mask = torch.tensor([[3.0, 1.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]]).bool()
    result = stage3_advantages(torch.tensor([1.0, 0.0]), reward, mask, torch.tensor([1, 2]), 2, weight=0.5)
    # R = 1 + .5 * 2 and 0 + .5 * 4: equal, so A = 0.
    s = math.sqrt(10 / 3)
    assert result.total_BT.tolist() == [pytest.approx([0.5 / s, -0.5 / s]), pytest.approx([1 / s, 0])]
    assert torch.equal(result.dense_BT, result.total_BT)
    assert (result.outcome_rms, result.degenerate_share) == (0.0, 0.0)
    assert result.dense_rms == pytest.approx(math.sqrt((0.25 + 1) / 2 * 0.3))


def test_rms_and_degenerate_share() -> None:
    mask = torch.ones(4, 1).bool()
    outcomes = torch.tensor([1.0, 0.0, 1.0, 1.0])
    result = stage3_advantages(outcomes, torch.zeros(4, 1), mask, torch.ones(4, dtype=torch.long), 2, weight=0.1)
    # z over two rows with n - 1: +-1/sqrt(2); the second group has no spread at all.
    assert result.total_BT.flatten().tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0, 0])
    assert result.outcome_rms == pytest.approx(math.sqrt(0.5)) and result.dense_rms == 0.0
    assert result.degenerate_share == 0.5


def test_a_row_without_a_verdict_is_left_out() -> None:
    mask, prompts = torch.ones(3, 1).bool(), torch.ones(3, dtype=torch.long)
    outcomes = torch.tensor([1.0, math.nan, 0.0])
    result = stage3_advantages(outcomes, torch.zeros(3, 1), mask, prompts, 3, weight=0.1)
    assert result.total_BT.flatten().tolist() == pytest.approx([math.sqrt(0.5), 0, -math.sqrt(0.5)])
    assert result.outcome_rms == pytest.approx(math.sqrt(0.5)) and result.degenerate_share == 0.0


def advantages(outcomes: list[float], reward: list[list[float]], prompt: int = 1, weight: float = 0.1) -> torch.Tensor:
    reward_BT = torch.tensor(reward)
    lengths = torch.full((len(outcomes),), prompt)
    mask = torch.ones_like(reward_BT).bool()
    return stage3_advantages(torch.tensor(outcomes), reward_BT, mask, lengths, len(outcomes), weight).total_BT


def test_defect_1_lambda_cancels_where_all_are_right() -> None:
    hair = [[0.0], [0.0], [0.0], [0.01]]
    for weight in (0.1, 1e-3):
        total = advantages([1.0] * 4, hair, weight=weight)[3].item()
        assert total - weight * 1.5 == pytest.approx(1.5, abs=5e-3)  # (n - 1) / sqrt(n), whatever lambda is


def test_defect_2_a_constant_reward_pays_for_being_there() -> None:
    # Share p of the positions holds c, the others 0: z = (1 - p) / sqrt(p (1 - p)), with n - 1 in the deviation.
    for prompt, sign in ((3, 1.0), (9, -1.0)):
        total = advantages([1.0, 1.0], [[sign] * 2] * 2, prompt=prompt, weight=1.0)
        n = 2 * (prompt + 1)
        p = 4 / n
        assert total.flatten().tolist() == pytest.approx([sign * math.sqrt((1 - p) / p * (n - 1) / n)] * 4, rel=1e-5)
    # Without prompt and padding there would be nothing to pay: every token has the same reward.
    assert not advantages([1.0, 1.0], [[5.0] * 2] * 2, prompt=1).any()


def test_defect_3_features_count_twice() -> None:
    total = advantages([0.0, 0.0], [[1.0], [-1.0]], weight=0.5)
    once = math.sqrt(0.5)  # a z-score of +-1 among two
    assert total.flatten().tolist() == pytest.approx([once + 0.5 * once, -once - 0.5 * once])


def test_defect_4_no_token_answers_for_what_comes_later() -> None:
    total = advantages([0.0, 0.0], [[0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    assert total[:, 0].tolist() == pytest.approx([total[0, 2].item()] * 2)  # before the rise or after it: the same
    assert total[0, 1] > total[0, 0]


@pytest.mark.parametrize(
    ("group", "weight", "prompt", "message"),
    [
        (1, 0.1, 1, "group_size: 1; credit 'stage3' needs groups of at least 2"),
        (4, 0.1, 1, "group_size: 6 rows are not whole groups of 4"),
        (2, -0.1, 1, "weight: -0.1 is negative"),
        (2, 0.1, 0, "prompt_lengths: a prompt has no tokens"),
    ],
)
def test_bad_input_is_named(group: int, weight: float, prompt: int, message: str) -> None:
    lengths = torch.full((6,), 3)
    lengths[4] = prompt
    with pytest.raises(InputError, match=message):
        stage3_advantages(torch.zeros(6), torch.zeros(6, 2), torch.ones(6, 2).bool(), lengths, group, weight)


def test_it_is_no_credit() -> None:
    with pytest.raises(InputError, match="credit: 'stage3' replaces the outcome advantage too"):
        token_credit(torch.zeros(1, 1), torch.ones(1, 1).bool(), "stage3")
