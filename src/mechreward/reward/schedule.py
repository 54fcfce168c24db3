"""How the weight of the dense reward (lambda) moves over a run: a number for each step.

A schedule is called with the steps already taken and the steps of the whole run. With
p = (step - warmup_steps) / (total_steps - warmup_steps), held within 0 ... 1:

- constant:  value
- linear:    start + p (end - start)
- cosine:    end + (start - end) (1 + cos(pi p)) / 2
- step:      values[i], i the number of boundaries that `step` has reached

Before `warmup_steps` linear and cosine stand at `start`; where the run is no longer than its warm-up, they stand at
`end` after it. Lambda is a share of the outcome advantage's size, so no schedule may go below 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from mechreward.errors import InputError


@dataclass(frozen=True)
class WeightSchedule(ABC):
    """A weight a step. Subclass it as a frozen dataclass for one of your own, with a `kind` that no other has."""

    kind: str = field(default="", init=False)
    """Names the schedule where a run records its settings."""

    @abstractmethod
    def __call__(self, step: int, total_steps: int) -> float:
        """The weight at `step`, 0 ... `total_steps`.

        Raises:
            InputError: if `step` is negative or `total_steps` less than 1.
        """


@dataclass(frozen=True)
class ConstantSchedule(WeightSchedule):
    """The same weight at every step."""

    value: float = 1.0
    kind: str = field(default="constant", init=False)

    def __post_init__(self) -> None:
        check_weight("value", self.value)

    def __call__(self, step: int, total_steps: int) -> float:
        _check_step(step, total_steps)
        return self.value


@dataclass(frozen=True)
class _Ramp(WeightSchedule):
    start: float
    end: float
    warmup_steps: int = 0
    """Steps at `start` before anything moves."""

    def __post_init__(self) -> None:
        check_weight("start", self.start)
        check_weight("end", self.end)
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps: {self.warmup_steps} is negative; it must be 0 or more")

    def _progress(self, step: int, total_steps: int) -> float:
        _check_step(step, total_steps)
        if step < self.warmup_steps:
            return 0.0
        if total_steps <= self.warmup_steps:
            return 1.0
        return min(1.0, (step - self.warmup_steps) / (total_steps - self.warmup_steps))


@dataclass(frozen=True)
class LinearAnnealSchedule(_Ramp):
    """From `start` to `end` in a straight line."""

    kind: str = field(default="linear", init=False)

    def __call__(self, step: int, total_steps: int) -> float:
        return self.start + self._progress(step, total_steps) * (self.end - self.start)


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    """From `start` to `end` along half a cosine: slow at both ends."""

    kind: str = field(default="cosine", init=False)

    def __call__(self, step: int, total_steps: int) -> float:
        still = 0.5 * (1.0 + math.cos(math.pi * self._progress(step, total_steps)))
        return self.end + still * (self.start - self.end)


@dataclass(frozen=True)
class StepSchedule(WeightSchedule):
    """`values[0]` before `boundaries[0]`, `values[i]` from step `boundaries[i - 1]` on."""

    values: list[float]
    boundaries: list[int]
    kind: str = field(default="step", init=False)

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise InputError(
                f"values: {len(self.values)} for {len(self.boundaries)} boundaries; give one value more than boundaries"
            )
        if any(first >= second for first, second in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise InputError(f"boundaries: {self.boundaries} do not rise from step to step")
        for value in self.values:
            check_weight("values", value)

    def __call__(self, step: int, total_steps: int) -> float:
        _check_step(step, total_steps)
        return self.values[sum(step >= boundary for boundary in self.boundaries)]


def check_weight(name: str, value: float) -> None:
    """Raises InputError unless `value` is a finite number of 0 or more."""
    number = isinstance(value, float | int) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 0):
        raise InputError(f"{name}: {value!r} is not allowed; a weight must be a number of 0 or more")


def _check_step(step: int, total_steps: int) -> None:
    if step < 0 or total_steps < 1:
        raise InputError(f"step: {step} of {total_steps} is not allowed; it counts from 0 in a run of 1 step or more")
