"""Schedules of lambda: every value by hand, and what a run records of them."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.reward import ConstantSchedule, CosineSchedule, LinearAnnealSchedule, StepSchedule, WeightSchedule


def test_constant() -> None:
    assert [ConstantSchedule(0.3)(step, 10) for step in (0, 5, 10)] == [0.3, 0.3, 0.3]
    assert ConstantSchedule()(3, 4) == 1.0


def test_linear_with_and_without_warmup() -> None:
    straight = LinearAnnealSchedule(0.2, 0.6)
    assert [straight(step, 4) for step in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    late = LinearAnnealSchedule(start=1.0, end=0.0, warmup_steps=2)
    assert [late(step, 6) for step in range(7)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_cosine_with_and_without_warmup() -> None:
    half = CosineSchedule(1.0, 0.0)
    assert [half(step, 4) for step in range(5)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    )
    late = CosineSchedule(start=0.2, end=0.6, warmup_steps=3)
    assert [late(step, 5) for step in range(6)] == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.4, 0.6])


@pytest.mark.parametrize("kind", [LinearAnnealSchedule, CosineSchedule])
def test_outside_the_run(kind: type) -> None:
    assert kind(0.5, 0.1)(99, 10) == pytest.approx(0.1)  # held at the end
    no_longer_than_warmup = kind(0.5, 0.1, warmup_steps=10)
    assert [no_longer_than_warmup(step, 10) for step in (0, 9, 10)] == pytest.approx([0.5, 0.5, 0.1])


def test_step_changes_at_its_boundaries() -> None:
    schedule = StepSchedule(values=[0.0, 0.3, 1.0], boundaries=[2, 5])
    assert [schedule(step, 8) for step in range(8)] == [0.0, 0.0, 0.3, 0.3, 0.3, 1.0, 1.0, 1.0]
    assert StepSchedule([0.7], [])(3, 4) == 0.7


@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 5), st.integers(0, 20), st.integers(1, 20))
def test_between_start_and_end_and_one_way(start: float, end: float, warmup: int, step: int, total: int) -> None:
    for kind in (LinearAnnealSchedule, CosineSchedule):
        schedule = kind(start, end, warmup)
        now, then = schedule(step, total), schedule(step + 1, total)
        assert min(start, end) - 1e-9 <= now <= max(start, end) + 1e-9
        assert (then - now) * (end - start) >= -1e-9


def test_a_record_tells_linear_from_cosine() -> None:
    records = [
        asdict(schedule)
        for schedule in (LinearAnnealSchedule(0.1, 0.2), CosineSchedule(0.1, 0.2), StepSchedule([0.1, 0.2], [4]))
    ]
    assert records[0] == {"kind": "linear", "start": 0.1, "end": 0.2, "warmup_steps": 0}
    assert records[1] == records[0] | {"kind": "cosine"}
    assert records[2] == {"kind": "step", "values": [0.1, 0.2], "boundaries": [4]}
    assert isinstance(ConstantSchedule(), WeightSchedule)
    with pytest.raises(FrozenInstanceError):
        ConstantSchedule(0.1).value = 0.2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConstantSchedule(-0.1), "value: -0.1 is not allowed; a weight must be a number of 0 or more"),
        (lambda: LinearAnnealSchedule(-1.0, 0.0), "start: -1.0 is not allowed"),
        (lambda: CosineSchedule(0.1, math.nan), "end: nan is not allowed"),
        (lambda: CosineSchedule(0.1, math.inf), "end: inf is not allowed"),
        (lambda: LinearAnnealSchedule(0.1, 0.2, -1), "warmup_steps: -1 is negative"),
        (lambda: StepSchedule([0.1], [3]), "values: 1 for 1 boundaries; give one value more"),
        (lambda: StepSchedule([0.1, 0.2, 0.3], [5, 5]), r"boundaries: \[5, 5\] do not rise"),
        (lambda: StepSchedule([0.1, -0.2], [5]), "values: -0.2 is not allowed"),
        (lambda: ConstantSchedule()(-1, 10), "step: -1 of 10 is not allowed"),
        (lambda: CosineSchedule(0.1, 0.2)(0, 0), "step: 0 of 0 is not allowed"),
        (lambda: StepSchedule([0.1], [])(-1, 5), "step: -1 of 5 is not allowed"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
