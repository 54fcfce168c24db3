"""Actions against GRPO's own group advantages, before and after: none is undone by the group's normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.hacking import act_on_rollouts, neutral_rewards

REWARDS = np.array([1.0, 0.0, 5.0, 0.0, 2.0, 2.5, 1.0, 0.5])
FLAGGED = torch.tensor([False, False, True, False, False, False, False, False])
LENGTHS = [3, 1, 2, 3, 1, 2, 3, 2]
MASK_BT = torch.arange(3) < torch.tensor(LENGTHS)[:, None]


def grpo(rewards, size=4, std=True, skip=()) -> np.ndarray:
    """Group advantages as GRPO makes them, in a loop, rows in `skip` left out of everything."""
    advantages = np.zeros(len(rewards))
    for start in range(0, len(rewards), size):
        rows = [row for row in range(start, start + size) if row not in skip]
        values = rewards[rows]
        advantages[rows] = (values - values.mean()) / (values.std(ddof=1) + 1e-4 if std else 1.0)
    return advantages


def spread(advantages_B) -> torch.Tensor:
    return torch.tensor(advantages_B, dtype=torch.float32)[:, None] * MASK_BT


def test_scaling_rewards_would_be_undone() -> None:
    # What the actions are there for: a batch of rewards times .2 has the same normalised advantages.
    np.testing.assert_allclose(grpo(REWARDS * 0.2), grpo(REWARDS), rtol=1e-2)
    # And scaling one reward moves all others of its group.
    scaled = REWARDS.copy()
    scaled[2] *= 0.2
    assert not np.allclose(grpo(scaled)[[0, 1, 3]], grpo(REWARDS)[[0, 1, 3]], atol=0.1)


@pytest.mark.parametrize(("action", "share"), [("zero", 0.0), ("downweight", 0.2)])
def test_zero_and_downweight_leave_all_others_as_they_are(action, share) -> None:
    before = spread(grpo(REWARDS))
    after, mask = act_on_rollouts(before, MASK_BT, FLAGGED, action, group_size=4, factor=0.2)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(after[others], before[others]) and torch.equal(mask, MASK_BT)
    torch.testing.assert_close(after[2], share * before[2])
    assert before[2].abs().max() > 1


def test_drop_is_grpo_without_the_rollout() -> None:
    before = spread(grpo(REWARDS, std=False))
    after, mask = act_on_rollouts(before, MASK_BT, FLAGGED, "drop", group_size=4)
    expected = spread(grpo(REWARDS, std=False, skip=(2,)))
    torch.testing.assert_close(after, expected)
    assert mask[2].sum() == 0 and torch.equal(mask[[0, 1, 3, 4]], MASK_BT[[0, 1, 3, 4]])
    assert torch.equal(after[4:], before[4:])  # another group is not touched


def test_drop_centres_dense_advantages_by_row_means() -> None:
    dense = torch.tensor([[1.0, 3.0, 5.0], [7.0, 0.0, 0.0], [9.0, 9.0, 0.0], [-1.0, -2.0, -3.0]])
    mask = MASK_BT[:4]
    after, _ = act_on_rollouts(dense, mask, FLAGGED[:4], "drop", group_size=4)
    baseline = (3.0 + 7.0 - 2.0) / 3
    assert after[0].tolist() == pytest.approx([1 - baseline, 3 - baseline, 5 - baseline])
    assert after[1].tolist() == pytest.approx([7 - baseline, 0, 0]) and after[2].tolist() == [0, 0, 0]


def test_drop_leaves_a_group_without_flags_as_it_is_centred_or_not() -> None:
    shifted = spread(grpo(REWARDS, std=False) + 0.5)
    after, _ = act_on_rollouts(shifted, MASK_BT, FLAGGED, "drop", group_size=4)
    assert torch.equal(after[4:], shifted[4:])
    assert after[:2].sum(1).tolist() != shifted[:2].sum(1).tolist()


def test_a_group_that_is_dropped_whole_is_gone() -> None:
    flagged = torch.tensor([True] * 4 + [False] * 4)
    after, mask = act_on_rollouts(spread(grpo(REWARDS)), MASK_BT, flagged, "drop", group_size=4)
    assert after[:4].count_nonzero() == 0 and mask[:4].sum() == 0 and after[4:].count_nonzero() > 0


@given(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), st.integers(0, 14))
def test_kept_advantages_of_a_dropped_group_sum_to_zero(values, bits) -> None:
    flagged = torch.tensor([bool(bits >> row & 1) for row in range(4)])
    after, _ = act_on_rollouts(torch.tensor(values)[:, None], torch.ones(4, 1).bool(), flagged, "drop", group_size=4)
    if flagged.any():
        assert after.sum().item() == pytest.approx(0.0, abs=1e-4)
    assert after[flagged].count_nonzero() == 0


def test_neutral_rewards_have_advantage_zero_whatever_the_group_is_divided_by() -> None:
    group = torch.tensor([0] * 4 + [1] * 4)
    neutral = neutral_rewards(torch.tensor(REWARDS), FLAGGED, group)
    assert neutral.tolist() == pytest.approx([1.0, 0.0, 1 / 3, 0.0, 2.0, 2.5, 1.0, 0.5])
    assert grpo(neutral.numpy())[2] == pytest.approx(0.0, abs=1e-6)
    without = grpo(REWARDS, std=False, skip=(2,))
    np.testing.assert_allclose(grpo(neutral.numpy(), std=False)[[0, 1, 3]], without[[0, 1, 3]], atol=1e-6)


def test_neutral_rewards_with_a_share_none_and_whole_groups() -> None:
    group, nan = torch.tensor([0, 0, 0, 1, 1]), float("nan")
    rewards = torch.tensor([1.0, 4.0, nan, 2.0, 6.0])
    found = neutral_rewards(rewards, torch.tensor([False, True, True, True, True]), group, share=0.5)
    assert found.tolist()[:2] == [1.0, 2.5] and found[2].isnan()
    assert found.tolist()[3:] == [3.0, 5.0]  # a group flagged whole goes halfway to its own mean
    assert len(neutral_rewards(rewards[:0], torch.zeros(0).bool(), group[:0])) == 0


def test_bad_input() -> None:
    with pytest.raises(InputError, match="action: 'forget' is not one of zero, downweight, drop"):
        act_on_rollouts(torch.zeros(4, 1), torch.ones(4, 1).bool(), torch.zeros(4).bool(), "forget", group_size=4)
    with pytest.raises(InputError, match="group_size: 4 rows are not whole groups of 3"):
        act_on_rollouts(torch.zeros(4, 1), torch.ones(4, 1).bool(), torch.zeros(4).bool(), "zero", group_size=3)
    with pytest.raises(InputError, match="downweight_factor: 2.0 is outside"):
        act_on_rollouts(
            torch.zeros(4, 1), torch.ones(4, 1).bool(), torch.zeros(4).bool(), "downweight", group_size=4, factor=2.0
        )
