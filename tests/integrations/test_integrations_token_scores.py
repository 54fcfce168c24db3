"""Outcome and token rewards in one row of numbers, and out of it again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.integrations.token_scores import UNIT, pack_row, unpack


def test_by_hand() -> None:
    row_T = pack_row(1.0, [3.0, None, 5.0, -2.0, 7.0, 9.0], [1, 1, 0, 1, 1, 0])
    assert row_T.tolist() == [3.0 * UNIT, 0.0, 0.0, -2.0 * UNIT, 1.0, 0.0]
    assert row_T.signbit().tolist() == [False, True, False, True, False, False]
    outcome_B, reward_BT, has_BT = unpack(row_T[None], torch.tensor([[True, True, False, True, True, False]]))
    assert outcome_B.tolist() == [1.0]
    assert reward_BT.tolist() == [[3.0, 0.0, 0.0, -2.0, 0.0, 0.0]]
    assert has_BT.tolist() == [[True, False, False, True, False, False]]


def test_what_the_trainer_sums_is_the_outcome() -> None:
    for outcome in (0.0, 1.0):
        row_T = pack_row(outcome, [40.0] * 250, [1] * 250)
        assert row_T.sum().item() == pytest.approx(outcome, abs=0.01)


def test_a_reward_of_zero_is_not_a_missing_one() -> None:
    row_T = pack_row(0.0, [0.0, -0.0, None, 1.0], [1, 1, 1, 1])
    assert unpack(row_T[None], torch.ones(1, 4, dtype=torch.bool))[2].tolist() == [[True, True, False, False]]


def test_an_outcome_of_minus_zero_stays_an_outcome() -> None:
    outcome_B, _, has_BT = unpack(torch.tensor([[UNIT, -0.0]]), torch.tensor([[True, True]]))
    assert outcome_B.tolist() == [0.0] and has_BT.tolist() == [[True, False]]


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.floats(-1e4, 1e4, width=32)), st.booleans()), min_size=1, max_size=12
    ).filter(lambda row: any(on for _, on in row)),
    st.floats(-10, 10, width=32),
    st.integers(0, 3),
)
def test_what_goes_in_comes_out(row, outcome, padding) -> None:
    values, mask = [value for value, _ in row], [int(on) for _, on in row]
    packed_T = torch.cat([pack_row(outcome, values, mask), torch.zeros(padding)])
    mask_T = torch.tensor([bool(on) for on in mask] + [False] * padding)
    outcome_B, reward_BT, has_BT = unpack(packed_T[None], mask_T[None])
    assert outcome_B.item() == outcome
    last = max(place for place, on in enumerate(mask) if on)
    for place, (value, on) in enumerate(row):
        has = bool(on and place != last and value is not None)
        assert has_BT[0, place].item() == has
        # Below the smallest normal float32 a power of two costs digits as well.
        assert reward_BT[0, place].item() == (pytest.approx(value, abs=1e-30) if has else 0.0)


def test_a_row_without_tokens_has_no_outcome() -> None:
    outcome_B, _, has_BT = unpack(torch.zeros(2, 3), torch.tensor([[False] * 3, [True] * 3]))
    assert outcome_B.isnan().tolist() == [True, False] and has_BT[0].tolist() == [False] * 3


def test_bad_rows() -> None:
    with pytest.raises(InputError, match="^token_rewards: 1 for 2 tokens"):
        pack_row(1.0, [0.5], [1, 1])
    with pytest.raises(InputError, match="^mask: no token is trained on"):
        pack_row(1.0, [0.5, 0.5], [0, 0])
