"""Handles of single features and ordered groups of them, to name features in edits and conditions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

from mechreward.errors import InputError
from mechreward.steering.conditions import Comparison, Number, Scaled, comparison


@dataclass(frozen=True)
class Feature:
    """One feature of an SAE; comparing it gives a condition: `f > .5`, `f < g`."""

    id: int
    label: str = ""

    def __gt__(self, other: Number | Feature) -> Comparison:
        return _compare(self, ">", other)

    def __ge__(self, other: Number | Feature) -> Comparison:
        return _compare(self, ">=", other)

    def __lt__(self, other: Number | Feature) -> Comparison:
        return _compare(self, "<", other)

    def __le__(self, other: Number | Feature) -> Comparison:
        return _compare(self, "<=", other)


@dataclass(frozen=True)
class FeatureGroup(Sequence[Feature]):
    """Features in an order, each once; `a | b` is their union, `a & b` what both have, `a - b` what only `a` has."""

    features: tuple[Feature, ...]

    def __post_init__(self) -> None:
        # By id: two handles of a feature may differ in their label.
        once: dict[int, Feature] = {}
        for feature in self.features:
            once.setdefault(feature.id, feature)
        object.__setattr__(self, "features", tuple(once.values()))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return FeatureGroup(self.features[index]) if isinstance(index, slice) else self.features[index]

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.features)

    @property
    def ids(self) -> list[int]:
        return [feature.id for feature in self.features]

    def pick(self, places: Iterable[int]) -> FeatureGroup:
        """Those at the given places."""
        return FeatureGroup(tuple(self.features[place] for place in places))

    def __or__(self, other: FeatureGroup) -> FeatureGroup:
        return FeatureGroup(self.features + other.features)

    def __and__(self, other: FeatureGroup) -> FeatureGroup:
        return FeatureGroup(tuple(feature for feature in self.features if feature.id in other.ids))

    def __sub__(self, other: FeatureGroup) -> FeatureGroup:
        return FeatureGroup(tuple(feature for feature in self.features if feature.id not in other.ids))


Named = SupportsIndex | Feature | Sequence[SupportsIndex] | Sequence[Feature] | FeatureGroup
"""Every way to name one feature or several; ids may be numpy's."""
Strength = Named | Mapping[int, Number] | Mapping[Feature, Number]
"""Features with one value for all, or a mapping from features to values."""


def feature_ids(named: Named, d_sae: int) -> list[int]:
    """The ids that `named` names, in order.

    Raises:
        InputError: if one is no feature of an SAE of `d_sae`, or none is named.
    """
    listed: list[Any] = list(named) if isinstance(named, Iterable) else [named]
    if not listed:
        raise InputError("feature: none is named; name at least one")
    return [_feature_id(item.id if isinstance(item, Feature) else item, d_sae) for item in listed]


def _feature_id(item: Any, d_sae: int) -> int:
    try:
        feature = -1 if isinstance(item, bool) else index(item)  # whole numbers of numpy too
    except TypeError:
        feature = -1
    if not 0 <= feature < d_sae:
        raise InputError(f"feature: {item!r} is not a feature of this SAE; ids go from 0 to {d_sae - 1}")
    return feature


def strengths(named: Strength, value: Number | None, d_sae: int) -> dict[int, float]:
    """Strength by feature id, from a mapping or from features and one value for all.

    Raises:
        InputError: as `feature_ids`; if a value is missing, given twice, not finite, or differs for one feature.
    """
    if isinstance(named, Mapping):
        if value is not None:
            raise InputError(f"value: {value} is given beside a mapping, which holds each feature's own; give one")
        pairs = list(zip(feature_ids(list[Any](named), d_sae), named.values(), strict=True))
    else:
        if value is None:
            raise InputError("value: is missing; give one number, or a mapping from features to numbers")
        pairs = [(feature, value) for feature in feature_ids(named, d_sae)]
    found: dict[int, float] = {}
    for feature, strength in pairs:
        if isinstance(strength, bool) or not isinstance(strength, float | int) or not abs(strength) < float("inf"):
            raise InputError(f"value: {strength!r} for feature {feature} is not allowed; it must be a finite number")
        if found.setdefault(feature, float(strength)) != strength:
            raise InputError(
                f"value: feature {feature} is given both {found[feature]:g} and {strength:g}; give it one value"
            )
    return found


def check_k(k: int) -> None:
    """Raises InputError if fewer than one of something is asked for."""
    if k < 1:
        raise InputError(f"k: {k} is too small; it must be at least 1")


def _compare(left: Feature, op: str, right: Number | Feature) -> Comparison:
    if isinstance(right, Feature):
        return Comparison(Scaled(left.id), op, Scaled(right.id))
    return comparison(left.id, op, right)
