"""The edits of a variant: adding rules, with units and checks, and taking them away.

A feature has one unconditional edit at a time; `clear` it to set another. Rules apply in the order they were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import SAE
from mechreward.steering.conditions import Condition, Number
from mechreward.steering.edits import Edit, Mode, Rule, check_known, check_pins, make_edits, rule_from_json
from mechreward.steering.features import Named, Strength, feature_ids, strengths
from mechreward.steering.scales import Scales

Where = Literal["all", "completion"]
Unit = Literal["p99", "raw"]


class Rulebook:
    """Rules for one SAE, and the units that strengths are given in.

    Args:
        sae: whose features are edited.
        scales: the features' units; without them strengths have to be raw.
        where: "all" edits prompt and completion; "completion" starts at the last token of the prompt.

    Raises:
        InputError: if the scales belong to another SAE, or `where` is not known.
    """

    def __init__(self, sae: SAE, scales: Scales | None = None, where: Where = "all") -> None:
        if where not in get_args(Where):
            raise InputError(f"where: {where!r} is not known; use one of {', '.join(get_args(Where))}")
        if scales is not None and scales.weights_hash != sae.weights_hash:
            raise InputError(f"scales: they were measured with SAE {scales.weights_hash[:12]}, not with this one")
        self.sae, self.scales, self.where = sae, scales, where
        self.norm_limit = None if scales is None else scales.norm_limit
        self.rules: list[Rule] = []

    def set(self, features: Strength, value: Number | None = None, mode: Mode = "nudge", unit: Unit = "p99") -> None:
        """Edits features everywhere: nudge f' = f + value, pin f' = value, scale f' = value * f.

        Args:
            features: one, several with the same value, or a mapping from features to values.
            value: in units of the feature's 99th percentile, or with `unit="raw"` in the SAE's own; a factor for scale.

        Raises:
            InputError: for a feature out of range or with another edit already, or a unit that was not calibrated.
        """
        self._add(self._rule(features, value, mode, unit, None))

    def set_when(
        self,
        condition: Condition,
        features: Strength,
        value: Number | None = None,
        mode: Mode = "nudge",
        unit: Unit = "p99",
    ) -> None:
        """Edits features on the tokens where the condition holds; the edit acts on that same token.

        Thresholds are in `unit` as well. Rules apply in the order they were made; conditions read what was there before
        any edit.

        Raises:
            InputError: as `set`, for a condition on an unknown feature, or a pin that contradicts another.
        """
        self._add(self._rule(features, value, mode, unit, self._checked(condition, unit)))

    def add_vector(self, vector_D: Tensor, condition: Condition | None = None, unit: Unit = "p99") -> None:
        """Adds a vector to the residual, as CAA (2312.06681) does; see `steering_vector`. Its length is its strength.

        Raises:
            InputError: if it is not of the model's width or not finite.
        """
        if vector_D.shape != (self.sae.d_model,) or not vector_D.isfinite().all():
            raise InputError(f"vector: shape {tuple(vector_D.shape)} must be ({self.sae.d_model},), all finite")
        checked = None if condition is None else self._checked(condition, unit)
        self._add(Rule((), checked, vector_D.detach().clone()))

    def clear(self, features: Named) -> None:
        """Takes all edits of some features away, conditional ones too."""
        gone = set(feature_ids(features, self.sae.d_sae))
        self.rules = [rule for rule in (old.without(gone) for old in self.rules) if not rule.empty]

    def json(self) -> dict[str, Any]:
        """Edits and conditional edits as plain values, for `json.dumps`; handlers and controls are not among them."""
        return {
            "sae": self._reads(),
            "where": self.where,
            "norm_limit": self.norm_limit,
            "rules": [rule.to_json() for rule in self.rules],
        }

    def load(self, value: Mapping[str, Any]) -> None:
        """Adds the rules that `json` gave, and takes over where they apply; all of it, or where it is refused nothing.

        Raises:
            InputError: if they were made for another SAE, are not what `json` gives, or are refused as by `set`.
        """
        match value:
            case {
                "sae": made_for,
                "where": "all" | "completion" as where,
                "norm_limit": None | float() | int() as limit,
                "rules": list(rules),
                **rest,
            } if not rest and (limit is None or limit > 0) and not isinstance(limit, bool):
                pass
            case _:
                raise InputError(
                    f"variant: {_shortened(value)} is none; it needs sae, where, norm_limit and rules, and nothing else"
                )
        if made_for != self._reads():
            raise InputError(f"sae: the edits were made for SAE {made_for}, not for {self._reads()}")
        parsed = [rule_from_json(rule, self.sae.d_sae, self.sae.d_model) for rule in rules]
        before = list(self.rules)
        try:
            for rule in parsed:
                self._add(rule)
        except InputError:
            self.rules = before
            raise
        self.where, self.norm_limit = where, limit

    def _reads(self) -> dict[str, Any]:
        return {"weights_hash": self.sae.weights_hash, "layer": self.sae.meta.layer}

    def _rule(
        self, features: Strength, value: Number | None, mode: Mode, unit: Unit, condition: Condition | None
    ) -> Rule:
        strength = strengths(features, value, self.sae.d_sae)
        sizes = {} if mode == "scale" else {feature: self._size(feature, unit) for feature in strength}
        return Rule(make_edits(strength, mode, sizes), condition)

    def _add(self, rule: Rule) -> None:
        if rule.condition is None:
            rule = self._fresh(rule)
        if not rule.empty:
            check_pins([*self.rules, rule])
            self.rules.append(rule)

    def _fresh(self, rule: Rule) -> Rule:
        """The rule without the edits that there are already; another one of such a feature is refused."""
        present = {edit.feature: edit for old in self.rules if old.condition is None for edit in old.edits}
        for edit in rule.edits:
            if present.get(edit.feature, edit) != edit:
                old = _words(present[edit.feature])
                raise InputError(f"feature: {edit.feature} has {old} already; clear it before setting {_words(edit)}")
        return rule.without(set(present))

    def _checked(self, condition: Condition, unit: Unit) -> Condition:
        if not isinstance(condition, Condition):
            raise InputError(f"condition: {condition!r} is none; make one such as variant.feature(3) > 0.5")
        check_known(condition.features(), self.sae.d_sae)
        return condition.scaled(lambda feature: self._size(feature, unit))

    def _size(self, feature: int, unit: Unit) -> float:
        if unit not in get_args(Unit):
            raise InputError(f"unit: {unit!r} is not known; use one of {', '.join(get_args(Unit))}")
        if unit == "raw":
            return 1.0
        if self.scales is None:
            raise InputError('unit: p99 needs calibrate(responses) first; or give strengths with unit="raw"')
        return self.scales.unit(feature)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def _words(edit: Edit) -> str:
    return f"{edit.mode} {edit.value:g}"
