"""Conditions on features as an expression tree: `(f > .5) & ~(g < .1)`, evaluated token by token.

A comparison keeps its thresholds in the units they were written in and the size of one such unit (`Scaled`), so that
the tree can be shown and stored as it was meant. Python's `and`, `or` and chained comparisons would silently drop a
side, so a condition has no truth value.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from mechreward.errors import InputError

Number = float | int
Size = Callable[[int], float]
"""From a feature to the size of one unit of it, in the SAE's own units."""
OPERATORS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


class Condition(ABC):
    """Something that holds on a token or does not; combine with `&`, `|` and `~`, each side in brackets."""

    def __and__(self, other: Condition) -> Condition:
        return Joined("every", (self, _checked(other)))

    def __or__(self, other: Condition) -> Condition:
        return Joined("some", (self, _checked(other)))

    def __invert__(self) -> Condition:
        return Not(self)

    def __bool__(self) -> bool:
        raise InputError(
            f"condition: {self} has no truth value outside a model; combine with & | ~, each side in brackets"
        )

    @abstractmethod
    def features(self) -> set[int]:
        """Ids of all features it reads."""

    @abstractmethod
    def scaled(self, size: Size) -> Condition:
        """The same condition with its thresholds in units of `size`."""

    @abstractmethod
    def holds(self, acts: Mapping[int, Tensor]) -> Tensor:
        """Where it holds: activations [N] by feature, in the SAE's own units -> bool [N]."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """As plain values; `condition_from_json` gives back an equal one."""


@dataclass(frozen=True)
class Scaled:
    """A feature's activation in units of `size`."""

    id: int
    size: float = 1.0

    def of(self, acts: Mapping[int, Tensor]) -> Tensor:
        return acts[self.id] if self.size == 1.0 else acts[self.id] / self.size


@dataclass(frozen=True)
class Comparison(Condition):
    """A feature against a number or another feature."""

    left: Scaled
    op: str
    right: float | Scaled

    def __str__(self) -> str:
        right = f"feature {self.right.id}" if isinstance(self.right, Scaled) else f"{self.right:g}"
        return f"(feature {self.left.id} {self.op} {right})"

    def features(self) -> set[int]:
        return {side.id for side in (self.left, self.right) if isinstance(side, Scaled)}

    def scaled(self, size: Size) -> Condition:
        sides = {
            name: replace(side, size=size(side.id))
            for name, side in (("left", self.left), ("right", self.right))
            if isinstance(side, Scaled)
        }
        return replace(self, **sides)  # type: ignore[arg-type]

    def holds(self, acts: Mapping[int, Tensor]) -> Tensor:
        right = self.right.of(acts) if isinstance(self.right, Scaled) else self.right
        return OPERATORS[self.op](self.left.of(acts), right)

    def to_json(self) -> dict[str, Any]:
        right: Any = [self.right.id, self.right.size] if isinstance(self.right, Scaled) else self.right
        return {"left": [self.left.id, self.left.size], "op": self.op, "right": right}


@dataclass(frozen=True)
class Joined(Condition):
    """Holds where every part does, or where some part does."""

    kind: Literal["every", "some"]
    parts: tuple[Condition, ...]

    def __str__(self) -> str:
        return "(" + {"every": " & ", "some": " | "}[self.kind].join(map(str, self.parts)) + ")"

    def features(self) -> set[int]:
        return {feature for part in self.parts for feature in part.features()}

    def scaled(self, size: Size) -> Condition:
        return replace(self, parts=tuple(part.scaled(size) for part in self.parts))

    def holds(self, acts: Mapping[int, Tensor]) -> Tensor:
        holds_PN = torch.stack([part.holds(acts) for part in self.parts])
        return holds_PN.all(0) if self.kind == "every" else holds_PN.any(0)

    def to_json(self) -> dict[str, Any]:
        return {self.kind: [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Not(Condition):
    """Holds where its part does not."""

    part: Condition

    def __str__(self) -> str:
        return f"~{self.part}"

    def features(self) -> set[int]:
        return self.part.features()

    def scaled(self, size: Size) -> Condition:
        return Not(self.part.scaled(size))

    def holds(self, acts: Mapping[int, Tensor]) -> Tensor:
        return ~self.part.holds(acts)

    def to_json(self) -> dict[str, Any]:
        return {"not": self.part.to_json()}


def condition_from_json(value: Any) -> Condition:
    """Reads what `Condition.to_json` wrote.

    Raises:
        InputError: naming the part that is no condition.
    """
    match value:
        case {"every": [_, *_] as parts, **rest} if not rest:
            return Joined("every", tuple(map(condition_from_json, parts)))
        case {"some": [_, *_] as parts, **rest} if not rest:
            return Joined("some", tuple(map(condition_from_json, parts)))
        case {"not": part, **rest} if not rest:
            return Not(condition_from_json(part))
        case {"left": [_, _] as left, "op": str(op), "right": right, **rest} if not rest and op in OPERATORS:
            return Comparison(_scaled(left), op, _side(right))
    raise InputError(f"condition: {value!r} is none; allowed are every, some, not, and left op right")


def _side(value: Any) -> float | Scaled:
    return float(value) if is_finite(value) else _scaled(value)


def _scaled(value: Any) -> Scaled:
    match value:
        case [int(feature), size] if is_finite(size) and size > 0 and not isinstance(feature, bool):
            return Scaled(feature, float(size))
    raise InputError(
        f"condition: {value!r} is no side of a comparison; allowed are a finite number and [feature, size above 0]"
    )


def is_finite(value: object) -> bool:
    """Whether it is a number as JSON has them: finite, and neither text nor truth value."""
    return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)


def _checked(value: object) -> Condition:
    if not isinstance(value, Condition):
        raise InputError(f"condition: {value!r} is none; put each side of & and | in brackets, such as (f > .5)")
    return value


def comparison(feature: int, op: str, other: Number) -> Comparison:
    """`feature op other`, in the SAE's own units.

    Raises:
        InputError: if `other` is no finite number.
    """
    if not is_finite(other):
        raise InputError(f"condition: {other!r} is no threshold; allowed are finite numbers and features")
    return Comparison(Scaled(feature), op, float(other))


def features_of(conditions: Sequence[Condition | None]) -> set[int]:
    """Ids of all features that any of the conditions reads."""
    return {feature for condition in conditions if condition is not None for feature in condition.features()}
