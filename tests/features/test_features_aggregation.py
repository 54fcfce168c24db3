"""Aggregations: hand-worked numbers, a loop over rows, names that come back, and what is masked has no say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.features.aggregation import (
    Aggregation,
    LastKAggregation,
    MaxAggregation,
    MeanAggregation,
    PerTokenAggregation,
    StepEndAggregation,
    WeightedMeanAggregation,
    build_aggregation,
    pooling_spec,
)

VALUES = torch.tensor([[1.0, 5.0, 3.0, 99.0], [-4.0, -2.0, -6.0, -1.0], [7.0, 7.0, 7.0, 7.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
ENDS = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
SPECS = ["mean", "max", "last", "last_2", "weighted_mean", "step_end:;", "per_token"]


def naive(values: list[float], name: str, ends: list[bool]) -> float:
    """One row without masked tokens."""
    n = len(values)
    if n == 0:
        return math.nan
    if name == "max":
        return max(values)
    if name == "last":
        return values[-1]
    if name == "last_2":
        return sum(values[-2:]) / len(values[-2:])
    if name == "weighted_mean":
        weights = [0.1 + 0.9 * i / (n - 1) for i in range(n)] if n > 1 else [1.0]
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    if name.startswith("step_end"):
        kept = [x for x, end in zip(values, ends, strict=True) if end]
        return sum(kept) / len(kept)
    return sum(values) / n


def ended(mask: list[bool], ends: list[bool]) -> list[bool]:
    """Which of the unmasked tokens are the last of their step."""
    found: list[bool] = []
    open_step = False
    for shown, end in zip(mask, ends, strict=True):
        if shown:
            found.append(False)
            open_step = True
        if end and open_step:
            found[-1] = True
            open_step = False
    return [*found[:-1], True] if found else found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", [3.0, -5.0]),
        ("per_token", [3.0, -5.0]),
        ("max", [5.0, -4.0]),
        ("last", [3.0, -6.0]),
        ("last_1", [3.0, -6.0]),
        ("last_2", [4.0, -5.0]),
        ("last_3", [3.0, -5.0]),
        ("last_k", [3.0, -5.0]),
        # Weights .1, .55, 1 and .1, 1.
        ("weighted_mean", [(0.1 + 2.75 + 3.0) / 1.65, -6.4 / 1.1]),
        # Row 0: its first token, and its last. Row 1: the one before the end under the mask, and its last.
        ("step_end", [2.0, -5.0]),
    ],
)
def test_pools_unmasked_tokens_only(name: str, expected: list[float]) -> None:
    pooled = build_aggregation(name)(VALUES, MASK, ENDS)
    assert pooled.dtype == torch.float32
    assert pooled[:2].tolist() == pytest.approx(expected, rel=1e-6)
    assert pooled[2].isnan()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SPECS), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_against_a_loop_over_rows(seed: int, name: str, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < share
    ends = torch.rand(4, 6, generator=generator) < 0.4
    pooled = build_aggregation(name)(values, mask, ends).tolist()
    for row in range(4):
        shown = ended(mask[row].tolist(), ends[row].tolist())
        expected = naive(values[row, mask[row]].tolist(), name, shown)
        assert pooled[row] == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_masked_never_shows(name: str) -> None:
    aggregation = build_aggregation(name)
    for spoil in (math.nan, math.inf, -math.inf, 1e30):
        pooled = aggregation(VALUES.masked_fill(~MASK, spoil), MASK, ENDS)
        assert torch.equal(pooled[:2], aggregation(VALUES, MASK, ENDS)[:2])


@pytest.mark.parametrize("name", ["last", "last_2", "step_end:;"])
def test_tokens_without_weight_never_show(name: str) -> None:
    spoiled = VALUES.clone()
    spoiled[0, 0] = math.nan
    aggregation, no_ends = build_aggregation(name), torch.zeros_like(ENDS)
    assert torch.equal(aggregation(spoiled, MASK, no_ends)[:1], aggregation(VALUES, MASK, no_ends)[:1])


@pytest.mark.parametrize("name", SPECS)
def test_padding_changes_nothing(name: str) -> None:
    """The older library's weighted mean fell with the width of the batch."""
    aggregation = build_aggregation(name)
    wide, mask, ends = (torch.cat([part, torch.zeros_like(part)], dim=1) for part in (VALUES, MASK, ENDS))
    assert torch.equal(aggregation(wide, mask, ends)[:2], aggregation(VALUES, MASK, ENDS)[:2])


@pytest.mark.parametrize("name", SPECS)
def test_features_are_pooled_one_by_one(name: str) -> None:
    acts_BTF = torch.stack([VALUES, -2 * VALUES, VALUES.square()], dim=-1)
    pooled_BF = build_aggregation(name)(acts_BTF, MASK, ENDS)
    assert pooled_BF.shape == (3, 3) and pooled_BF[2].isnan().all()
    for feature in range(3):
        alone = build_aggregation(name)(acts_BTF[..., feature], MASK, ENDS)
        assert pooled_BF[:2, feature].tolist() == pytest.approx(alone[:2].tolist(), rel=1e-6)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tail", [(), (5,)])
def test_no_columns_at_all(name: str, tail: tuple[int, ...]) -> None:
    empty = torch.zeros(2, 0, dtype=torch.bool)
    pooled = build_aggregation(name)(torch.zeros(2, 0, *tail), empty, empty)
    assert pooled.shape == (2, *tail) and pooled.isnan().all()


def test_no_mask_is_all_tokens_and_integers_are_a_mask() -> None:
    """The older library's call: `(activations, attention_mask=None)`, with a mask of 0 and 1."""
    assert MeanAggregation()(VALUES).tolist() == [27.0, -3.25, 7.0]
    assert MaxAggregation()(VALUES, MASK.long())[:2].tolist() == [5.0, -4.0]
    assert LastKAggregation(k=2)(VALUES).tolist() == [51.0, -3.5, 7.0]
    assert LastKAggregation().k == 16


@pytest.mark.parametrize("name", ["mean", "last", "last_k", "weighted_mean", "step_end"])
def test_weights_are_at_least_one_in_sum(name: str) -> None:
    aggregation = build_aggregation(name)
    weight_BT = aggregation.weights(aggregation.counted(MASK, ENDS))
    assert (weight_BT[:2].sum(1) >= 1).all() and not weight_BT[~MASK].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", MeanAggregation()),
        ("max", MaxAggregation()),
        ("last", LastKAggregation(1)),
        ("last_k", LastKAggregation(16)),
        ("last_16", LastKAggregation(16)),
        ("mean_last_32_tokens", LastKAggregation(32)),
        ("mean_last_1_token", LastKAggregation(1)),
        ("weighted_mean", WeightedMeanAggregation()),
        ("step_end", StepEndAggregation("\n")),
        ("step_end:. ", StepEndAggregation(". ")),
        ("per_token", PerTokenAggregation()),
    ],
)
def test_names_and_specs(name: str, expected: Aggregation) -> None:
    built = build_aggregation(name)
    assert built == expected and type(built) is type(expected)
    assert build_aggregation(built.spec) == built
    assert build_aggregation(built) is built


def test_specs_tell_every_parameter() -> None:
    built = [
        build_aggregation("last_k", k=8),
        build_aggregation("last_k", k=9),
        build_aggregation("last_1"),
        build_aggregation("step_end", step_end="."),
        build_aggregation("step_end"),
        build_aggregation("per_token"),
    ]
    assert [aggregation.spec for aggregation in built] == [
        "last_8", "last_9", "last", "step_end:.", "step_end:\n", "per_token",
    ]  # fmt: skip
    assert [pooling_spec(aggregation) for aggregation in built[:1] + built[-1:]] == ["last_8", "mean"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_aggregation("median"),
            "'median' is not one of mean, max, last, last_k, weighted_mean, step_end, per_token",
        ),
        (lambda: build_aggregation("last_0"), "k: 0 is not allowed; the last k tokens must be at least 1"),
        (lambda: build_aggregation("last_k", k=-2), "k: -2 is not allowed"),
        (lambda: LastKAggregation(0), "k: 0 is not allowed"),
        (lambda: build_aggregation("last_-3"), "'last_-3' is not one of"),
        (lambda: build_aggregation("last_16 "), "'last_16 ' is not one of"),
        (lambda: build_aggregation("mean", k=3), "aggregation: 'mean' takes no k = 3"),
        (lambda: build_aggregation("last_8", k=3), "'last_8' takes no k = 3"),
        (lambda: build_aggregation("last_k", step_end="."), "'last_k' takes no step_end = '.'"),
        (lambda: build_aggregation("step_end:"), "step_end: is empty"),
        (lambda: build_aggregation("step_end", step_end=""), "step_end: is empty"),
        (lambda: StepEndAggregation()(VALUES, MASK), "step_end: this aggregation needs a mask of the tokens"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
