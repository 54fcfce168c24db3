"""Credit: hand-worked numbers, naive loops, the four facts about potentials, and what normalisation must not do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.reward import dense_advantages, token_credit
from mechreward.reward.credit import centre_groups, return_to_go, row_weighted_rms, shaping

R = torch.tensor([[1.0, 2.0, 4.0, 50.0], [8.0, 50.0, 2.0, 6.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]]).bool()


def credit(mode: str, **options) -> list[list[float]]:
    return token_credit(R, MASK, mode, **options).tolist()


def test_per_token_is_the_reward_itself() -> None:
    assert credit("per_token") == [[1, 2, 4, 0], [8, 0, 2, 6]]


def test_return_to_go_by_hand() -> None:
    assert credit("return_to_go") == [[7, 6, 4, 0], [16, 0, 8, 6]]
    # gamma 1/2: 4; 2 + 2; 1 + 2. The masked token of row 1 costs no discount: 6; 2 + 3; 8 + 2.5.
    assert credit("return_to_go", gamma=0.5) == [[3, 4, 4, 0], [10.5, 0, 5, 6]]
    assert credit("return_to_go", gamma=0.0) == credit("per_token")


def test_potential_by_hand() -> None:
    # Phi before tokens 0, 1, 2: 0, 1, 1.5; after the last token 0.
    # Row 1, its masked token stepped over: 0, 8, 5.
    assert credit("potential") == [[1.0, 0.5, -1.5, 0.0], [8.0, 0.0, -3.0, -5.0]]
    assert credit("potential", gamma=0.5) == [[0.5, -0.25, -1.5, 0.0], [4.0, 0.0, -5.5, -5.0]]


def test_trajectory_is_the_masked_mean_on_every_token() -> None:
    third = pytest.approx(7 / 3)
    assert credit("trajectory")[0] == [third, third, third, 0]
    assert credit("trajectory")[1] == pytest.approx([16 / 3, 0, 16 / 3, 16 / 3])


def test_step_takes_the_value_at_its_end() -> None:
    ends = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    # Row 0: step (0, 1), then the unfinished step (2). Row 1: step (0), then (2, 3).
    assert credit("step", step_end_BT=ends) == [[2, 2, 4, 0], [8, 0, 6, 6]]
    on_masked = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]]).bool()  # ends before it, then
    assert credit("step", step_end_BT=on_masked) == [[4, 4, 4, 0], [8, 0, 2, 6]]
    assert credit("step", step_end_BT=torch.zeros_like(ends)) == [[4, 4, 4, 0], [6, 0, 6, 6]]
    assert credit("step", step_end_BT=torch.ones_like(ends)) == credit("per_token")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_returns_and_potentials_against_a_naive_loop(seed: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    r_BT = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(3, 6, generator=generator) < 0.7
    for row in range(3):
        places = [t for t in range(6) if mask_BT[row, t]]
        values = [r_BT[row, t].item() for t in places]
        n = len(values)
        phi = [0.0, *(sum(values[:i]) / i for i in range(1, n)), 0.0]
        for i, t in enumerate(places):
            to_go = sum(gamma ** (j - i) * values[j] for j in range(i, n))
            assert return_to_go(r_BT, mask_BT, gamma)[row, t].item() == pytest.approx(to_go, abs=1e-12)
            shaped = gamma * phi[i + 1] - phi[i]
            assert shaping(r_BT, mask_BT, gamma)[row, t].item() == pytest.approx(shaped, abs=1e-12)


def test_four_facts_about_potentials() -> None:
    shaped = shaping(R.double(), MASK, gamma=1.0)
    # 1. Over the whole return-to-go it is -Phi_t, a baseline that the action at t cannot change ...
    assert return_to_go(shaped, MASK, 1.0)[0].tolist() == [0.0, -1.0, -1.5, 0.0]
    # ... also with a discount, if the return has the same one.
    assert return_to_go(shaping(R.double(), MASK, 0.5), MASK, 0.5)[1].tolist() == [0.0, 0.0, -8.0, -5.0]
    # 2. Broadcast as a trajectory sum it is 0 in every row: no effect at all.
    assert shaped.sum(dim=1).tolist() == [0.0, 0.0]
    # 3. The last token pays back what Phi had reached (without it the row would be paid its final mean, 7/3) ...
    assert shaped[:, -1].tolist() == [0.0, -5.0] and shaped[0, 2].item() == -1.5
    # 4. ... and so does the last token of a row that was cut at the length limit.
    cut = shaping(R.double()[:, :2], MASK[:, :2], 1.0)
    assert cut[0].tolist() == [1.0, -1.0]


def test_centring_weighs_rows_not_tokens() -> None:
    values = torch.tensor([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    # Row means 2 and 8: baseline 5, not the token mean 3.2.
    assert centre_groups(values, mask, 2).tolist() == [[-3.0] * 4, [3.0, 0.0, 0.0, 0.0]]


def test_groups_are_centred_apart_and_empty_rows_have_no_say() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [10.0], [99.0], [20.0]])
    mask = torch.tensor([[1], [1], [1], [1], [0], [1]]).bool()
    assert centre_groups(values, mask, 3).flatten().tolist() == [-2.0, 0.0, 2.0, -5.0, 0.0, 5.0]


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3e5])
def test_equal_groups_get_exactly_zero(value: float) -> None:
    values = torch.full((6, 5), value)
    values[0] *= 1 + 1e-7  # float32 noise is not a spread
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.8
    assert centre_groups(values, mask, 3).count_nonzero() == 0
    result = dense_advantages(torch.zeros(6), values, mask, mask, 3, weight=1.0)
    assert result.total_BT.count_nonzero() == 0 and result.dense_rms == 0.0


def test_rms_is_row_weighted_over_groups_with_a_spread() -> None:
    values = torch.tensor([[3.0, 3.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    assert row_weighted_rms(values, mask, 2) == pytest.approx(math.sqrt((9 + 1) / 2))
    mask[1] = False  # an empty row has no say
    assert row_weighted_rms(values.masked_fill(~mask, 0.0), mask, 2) == 3.0


def test_dense_advantages_by_hand() -> None:
    outcome = torch.tensor([2.0, -2.0, 0.0, 0.0])  # the second group has no spread: RMS 2 over the first
    values = torch.tensor([[4.0, 4.0], [0.0, 9.0], [1.0, 5.0], [3.0, 3.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    result = dense_advantages(outcome, values, mask, mask, 2, weight=0.5, last_outcome_rms=77.0)
    # Centred: [2, 2], [-2, .]; [-2, 2], [0, 0]. Row mean squares 4, 4, 4, 0: RMS sqrt(3). Scale .5 * 2 / sqrt(3).
    s = 1 / math.sqrt(3)
    dense = [[2 * s, 2 * s], [-2 * s, 0], [-2 * s, 2 * s], [0, 0]]
    assert result.dense_BT.tolist() == [pytest.approx(row) for row in dense]
    assert result.total_BT[1].tolist() == pytest.approx([-2 - 2 * s, 0])
    assert (result.outcome_rms, result.degenerate_share) == (2.0, 0.5)
    assert result.dense_rms == pytest.approx(1.0)


def test_all_right_batch_keeps_the_last_outcome_rms() -> None:
    values, mask = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1).bool()
    result = dense_advantages(torch.zeros(2), values, mask, mask, 2, weight=0.1, last_outcome_rms=0.8)
    assert result.outcome_rms == 0.8 and result.degenerate_share == 1.0
    assert result.total_BT.tolist() == [[pytest.approx(-0.08)], [pytest.approx(0.08)]]


def test_a_small_spread_is_not_blown_up_against_the_batch() -> None:
    """A group with a hundredth of another's spread keeps a hundredth of its advantage (no per-group deviation)."""
    values, mask = torch.tensor([[0.0], [1.0], [0.5], [0.51]]), torch.ones(4, 1).bool()
    dense = dense_advantages(torch.zeros(4), values, mask, mask, 2, weight=1.0).dense_BT[:, 0]
    assert (dense[3] / dense[1]).item() == pytest.approx(0.01, rel=1e-4)


def test_tokens_trained_on_but_not_readable_get_the_outcome_alone() -> None:
    values, loss_mask = torch.tensor([[1.0, 5.0], [3.0, 3.0]]), torch.ones(2, 2).bool()
    readable = torch.tensor([[1, 0], [1, 1]]).bool()
    result = dense_advantages(torch.tensor([1.0, -1.0]), values, readable, loss_mask, 2, weight=1.0)
    assert result.total_BT[0, 1].item() == 1.0 and result.dense_BT[0, 1].item() == 0.0
    assert result.dense_BT[1].tolist() == pytest.approx([1.0, 1.0])


def test_weight_zero_is_the_outcome_bit_for_bit() -> None:
    outcome = torch.tensor([0.7, -0.7])
    result = dense_advantages(outcome, R, MASK, MASK, 2, weight=0.0)
    assert torch.equal(result.total_BT, outcome[:, None] * MASK)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["per_token", "return_to_go", "potential", "step", "trajectory"]))
def test_what_is_masked_never_matters(seed: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(4, 5, generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    ends = torch.rand(4, 5, generator=generator) < 0.4
    outcome = torch.randn(4, generator=generator)

    def run(rewards: torch.Tensor) -> torch.Tensor:
        values = token_credit(rewards, mask, mode, 0.9, ends)
        return dense_advantages(outcome, values.masked_fill(~mask, 1e6), mask, mask, 2, weight=0.3).total_BT

    spoiled = run(r.masked_fill(~mask, torch.nan))
    assert torch.equal(run(r), spoiled) and spoiled[~mask].count_nonzero() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_credit(R, MASK, "gae"), "credit: 'gae' is not one of per_token"),
        (lambda: token_credit(R, MASK, "return_to_go", gamma=1.5), "gamma: 1.5 is outside"),
        (lambda: token_credit(R, MASK, "step"), "step_end: credit 'step' needs a mask"),
        (
            lambda: dense_advantages(torch.zeros(2), R, MASK, MASK, 3, 0.1),
            "group_size: 2 rows are not whole groups of 3",
        ),
        (lambda: dense_advantages(torch.zeros(2), R, MASK, MASK, 2, -0.1), "weight: -0.1 is negative"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
