"""What is edited: nudge f' = f + a, pin f' = c, scale f' = k f, each always or where a condition holds.

All three are f' = factor * f + add, so that a list of rules is a list of affine maps. Rules apply in the order in which
they were made, each to what the one before left; conditions are always read from the activations before any edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.steering.conditions import Condition, condition_from_json, is_finite

Mode = Literal["nudge", "pin", "scale"]


@dataclass(frozen=True)
class Edit:
    """One feature's change; `value` counts in units of `size`, which is in the SAE's own units (1 for a factor)."""

    feature: int
    value: float
    mode: Mode
    size: float = 1.0

    @property
    def factor(self) -> float:
        """What the activation is multiplied by."""
        return {"nudge": 1.0, "pin": 0.0, "scale": self.value}[self.mode]

    @property
    def add(self) -> float:
        """What is added then, in the SAE's own units."""
        return 0.0 if self.mode == "scale" else self.value * self.size


@dataclass(frozen=True, eq=False)
class Rule:
    """Edits, and a vector added to the residual, where `condition` holds (None: everywhere)."""

    edits: tuple[Edit, ...]
    condition: Condition | None = None
    vector_D: Tensor | None = None

    def features(self) -> set[int]:
        """Features that are edited."""
        return {edit.feature for edit in self.edits}

    def without(self, features: set[int]) -> Rule:
        """The rule without its edits of some features."""
        return Rule(tuple(e for e in self.edits if e.feature not in features), self.condition, self.vector_D)

    @property
    def empty(self) -> bool:
        return not self.edits and self.vector_D is None

    def to_json(self) -> dict[str, Any]:
        edits = [{"feature": e.feature, "value": e.value, "mode": e.mode, "size": e.size} for e in self.edits]
        return {
            "edits": edits,
            "condition": None if self.condition is None else self.condition.to_json(),
            "vector": None if self.vector_D is None else self.vector_D.tolist(),
        }


def make_edits(strength: Mapping[int, float], mode: Mode, sizes: Mapping[int, float]) -> tuple[Edit, ...]:
    """An edit a feature.

    Raises:
        InputError: if there is no such mode.
    """
    check_mode(mode)
    return tuple(Edit(f, value, mode, 1.0 if mode == "scale" else sizes[f]) for f, value in strength.items())


def check_mode(mode: str) -> None:
    """Raises:
    InputError: if there is no such mode.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode: {mode!r} is not known; use one of {', '.join(get_args(Mode))}")


def check_pins(rules: Sequence[Rule]) -> None:
    """Refuses two pins of a feature to different values that hold on one token for certain: both everywhere, or one
    everywhere and one under a condition, or both under the same condition.

    Raises:
        InputError: naming the feature and both values.
    """
    pins: dict[int, list[tuple[Condition | None, float]]] = {}
    for rule in rules:
        for edit in rule.edits:
            if edit.mode != "pin":
                continue
            for condition, value in pins.setdefault(edit.feature, []):
                together = condition is None or rule.condition is None or condition == rule.condition
                if together and value != edit.add:
                    raise InputError(
                        f"feature: {edit.feature} is pinned to {value:g} already, not to {edit.add:g} as well, "
                        "in the SAE's own units; clear it first"
                    )
            pins[edit.feature].append((rule.condition, edit.add))


def rule_from_json(value: Any, d_sae: int, d_model: int) -> Rule:
    """Reads what `Rule.to_json` wrote.

    Raises:
        InputError: naming what is not a rule, a feature the SAE lacks, or a vector of another width.
    """
    match value:
        case {"edits": list(edits), "condition": condition, "vector": vector, **rest} if not rest:
            parsed = None if condition is None else condition_from_json(condition)
            check_known(set() if parsed is None else parsed.features(), d_sae)
            rule = Rule(tuple(map(_edit, edits)), parsed, None if vector is None else _vector(vector, d_model))
            check_known(rule.features(), d_sae)
            if len(rule.features()) < len(rule.edits):
                raise InputError(f"edits: {edits!r} change a feature twice in one rule; give each feature one edit")
            return rule
    raise InputError(f"rules: {value!r} is no rule; it needs edits, condition and vector, and nothing else")


def check_known(features: set[int], d_sae: int) -> None:
    """Raises:
    InputError: if one is not a feature of an SAE of `d_sae`.
    """
    strange = sorted(feature for feature in features if not 0 <= feature < d_sae)
    if strange:
        raise InputError(f"feature: {strange[0]} is not a feature of this SAE; ids go from 0 to {d_sae - 1}")


def _edit(value: Any) -> Edit:
    match value:
        case {
            "feature": int(feature),
            "value": strength,
            "mode": "nudge" | "pin" | "scale" as mode,
            "size": size,
            **rest,
        } if not rest and not isinstance(feature, bool) and is_finite(strength) and is_finite(size) and size > 0:
            return Edit(feature, float(strength), mode, float(size))
    raise InputError(
        f"edits: {value!r} is no edit; it needs feature, value, mode and size (finite, size above 0), and nothing else"
    )


def _vector(value: Any, d_model: int) -> Tensor:
    if not isinstance(value, list) or len(value) != d_model or not all(map(is_finite, value)):
        raise InputError(f"vector: {repr(value)[:60]} is none; it needs {d_model} finite numbers")
    return torch.tensor(value, dtype=torch.float32)
