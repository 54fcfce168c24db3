"""Normalisations: hand-worked numbers, scipy's ranks, order kept, and missing rewards without a say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from mechreward.errors import InputError
from mechreward.reward import NoopNormalization, SigmoidSquash, ZScoreNormalization, build_normalization

NAMES = ["zscore", "rank", "sigmoid", "minmax", "noop"]
# Mean 3, population variance (4 + 1 + 0 + 9) / 4.
REWARDS = torch.tensor([1.0, math.nan, 2.0, 3.0, 6.0])


def seen(name: str, rewards: torch.Tensor = REWARDS, **options) -> list[float]:
    values = build_normalization(name, **options)(rewards)
    assert torch.equal(values.isnan(), rewards.isnan()) and values.dtype == rewards.dtype
    return values[~values.isnan()].tolist()


def test_zscore_by_hand() -> None:
    s = math.sqrt(3.5)
    assert seen("zscore") == pytest.approx([-2 / s, -1 / s, 0, 3 / s], abs=1e-6)
    assert seen("zscore", clip=1.0) == pytest.approx([-1, -1 / s, 0, 1], abs=1e-6)
    assert seen("zscore", eps=10.0) == pytest.approx([-0.2, -0.1, 0, 0.3], abs=1e-6)


def test_zscore_is_clipped_at_five_unless_told_otherwise() -> None:
    one_of_hundred = torch.tensor([0.0] * 99 + [1.0])
    assert seen("zscore", one_of_hundred)[-1] == 5.0
    assert seen("zscore", one_of_hundred, clip=None)[-1] == pytest.approx(0.99 / math.sqrt(0.01 * 0.99), rel=1e-5)


def test_rank_averages_ties() -> None:
    assert seen("rank") == pytest.approx([0, 1 / 3, 2 / 3, 1])
    tied = torch.tensor([2.0, 7.0, 2.0, math.nan, -1.0, 2.0])
    assert seen("rank", tied) == [0.5, 1.0, 0.5, 0.0, 0.5]
    assert seen("rank", torch.tensor([3.0, 3.0])) == [0.5, 0.5]
    assert seen("rank", torch.tensor([3.0, math.nan])) == [0.5]


def test_minmax_by_hand() -> None:
    assert seen("minmax") == pytest.approx([0, 0.2, 0.4, 1], abs=1e-5)
    assert seen("minmax", eps=5.0) == pytest.approx([0, 0.1, 0.2, 0.5])
    assert seen("minmax", torch.tensor([4.0, 4.0])) == [0.0, 0.0]


def test_sigmoid_looks_at_one_reward() -> None:
    assert seen("sigmoid", temperature=2.0)[3] == pytest.approx(1 / (1 + math.exp(-3)))
    assert seen("sigmoid")[0] == seen("sigmoid", REWARDS[:1])[0] == pytest.approx(1 / (1 + math.exp(-1)))


def test_noop_and_its_other_names() -> None:
    assert seen("noop") == [1.0, 2.0, 3.0, 6.0]
    assert build_normalization("none") == build_normalization("identity") == NoopNormalization()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen(name: str) -> None:
    assert seen(name, torch.full((3,), math.nan)) == [] and seen(name, torch.zeros(0)) == []


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=12),
)
def test_order_is_kept_and_what_is_missing_has_no_say(name: str, rewards: list[float | None]) -> None:
    there = [value for value in rewards if value is not None]
    whole = torch.tensor([math.nan if value is None else value for value in rewards])
    alone = seen(name, torch.tensor(there, dtype=torch.float32))
    assert seen(name, whole) == alone
    ordered = [value for _, value in sorted(zip(there, alone, strict=True))]
    assert ordered == sorted(ordered)
    if name == "rank" and len(there) > 1:
        assert alone == pytest.approx([(rank - 1) / (len(there) - 1) for rank in rankdata(there)])


def test_large_rewards_do_not_lose_their_spread() -> None:
    # Their mean, 1e7 + .5, is no float32.
    assert seen("zscore", torch.tensor([1e7, 1e7 + 1])) == pytest.approx([-1, 1])


def test_objects_are_given_back() -> None:
    squash = SigmoidSquash(3.0)
    assert build_normalization(squash) is squash


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_normalization("z"), "normalization: 'z' is not one of zscore, rank, sigmoid, minmax, noop"),
        (lambda: build_normalization("rank", clip=3.0), "normalization: 'rank' takes no clip"),
        (lambda: ZScoreNormalization(eps=0.0), "eps: 0.0 is not allowed; it must be more than 0"),
        (lambda: ZScoreNormalization(clip=-1.0), "clip: -1.0 is not allowed"),
        (lambda: SigmoidSquash(math.nan), "temperature: nan is not allowed"),
        (lambda: build_normalization("minmax", eps=-1.0), "eps: -1.0 is not allowed"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
