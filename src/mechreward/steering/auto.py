"""AutoSteer and AutoConditional: from examples to edits whose strength, and to a condition whose errors, were measured.

The hosted SDK's algorithm of that name is not published; this one is our own:

1. Features. From pairs of wanted and unwanted texts: the sparse fit of `examples.sparse_fit`, with its weights. From
   a description: the features whose labels are nearest to it, with weight 1 each.
2. Strength. `sweep.sweep` on prompts that were not among the examples, scored by the caller: the knee, or nothing at
   all where no fluent strength gains anything. A description that finds the wrong features fails here, visibly.

Nor is that of AutoConditional. Ours: one half of the texts on either side gives the features (`examples.contrast`,
those stronger in the wanted texts) and each one's threshold, a quantile of its largest activations which no more than
share / k of the unwanted texts exceed, so that `f > a | g > b | ...` is met in no more than the share of them. The
other half says how often the condition is met on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np
from numpy.typing import NDArray

from mechreward.errors import InputError
from mechreward.gates import wilson
from mechreward.steering.conditions import Condition
from mechreward.steering.examples import contrast, sparse_fit
from mechreward.steering.sweep import Curve, Protocol, sweep
from mechreward.steering.variant import Text, Variant

STRENGTHS = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class AutoSteer:
    """What was found."""

    weights: dict[int, float]
    """By feature; the largest is 1 in size."""
    curve: Curve

    @property
    def edits(self) -> dict[int, float]:
        """Strength of the nudge of each feature, in its own units; empty if no strength is worth having."""
        knee = self.curve.knee
        return {} if knee is None else {feature: knee * weight for feature, weight in self.weights.items()}


def autosteer(
    variant: Variant,
    wanted: str | Sequence[tuple[Text, Text]],
    protocol: Protocol,
    *,
    k: int = 5,
    strengths: Sequence[float] = STRENGTHS,
) -> AutoSteer:
    """Features and strength for a behaviour, found but not set: `variant.set(found.edits)` does that.

    Args:
        wanted: a description, for which the variant needs labels; or pairs of (wanted, unwanted) texts.
        protocol: held-out prompts, and the score of a response to one.
        k: most features.

    Raises:
        InputError: as `sparse_fit`, `Variant.search` and `sweep`; or if no label has anything in common with
            the description.
    """
    if isinstance(wanted, str):
        weights = dict.fromkeys(variant.search(wanted, k).ids, 1.0)
    else:
        weights = sparse_fit(variant, wanted, k)
    return AutoSteer(weights, sweep(variant, weights, strengths, protocol))


@dataclass(frozen=True)
class Met:
    """In how many of some texts a condition is met on a token or more, with Wilson's 95 % interval of the share."""

    count: int
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class AutoConditional:
    """A condition, and how it does on texts that it was not made from."""

    condition: Condition
    """In the SAE's own units: give it to `set_when`, `abort_when` or `handle_when` with `unit="raw"`."""
    thresholds: dict[int, float]
    wanted: Met
    unwanted: Met


def autoconditional(
    variant: Variant, wanted: Sequence[Text], unwanted: Sequence[Text], *, k: int = 3, share: float = 0.05
) -> AutoConditional:
    """A condition that is met in wanted texts and seldom in others.

    Args:
        wanted, unwanted: texts; every second one is held out.
        k: most features.
        share: of unwanted texts in which it may be met; no threshold can hold it below 1 / their number.

    Raises:
        InputError: for fewer than four texts on a side, k below 1, a share outside (0, 1), a text of BOS alone, or if
            no feature is stronger in the wanted texts.
    """
    if k < 1 or not 0 < share < 1:
        raise InputError(f"k, share: {k}, {share} are not allowed; k is 1 or more and share lies between 0 and 1")
    for name, texts in (("wanted", wanted), ("unwanted", unwanted)):
        if len(texts) < 4:
            raise InputError(f"{name}: {len(texts)} texts are given; half of them are held out, so give at least 4")
    features = contrast(variant, wanted[::2], unwanted[::2], k).first.ids
    if not features:
        raise InputError("wanted: no feature is stronger in these texts than in the unwanted ones")
    limits_K = np.quantile(_peaks(variant, unwanted[::2], features), 1 - share / len(features), axis=0, method="higher")
    thresholds = {feature: float(limit) for feature, limit in zip(features, limits_K, strict=True)}
    parts: list[Condition] = [variant.feature(feature) > limit for feature, limit in thresholds.items()]
    held_out = (_peaks(variant, texts[1::2], features) for texts in (wanted, unwanted))
    counts = [_met([any(row) for row in (peaks_TK > limits_K).tolist()]) for peaks_TK in held_out]
    return AutoConditional(reduce(or_, parts), thresholds, *counts)


def _peaks(variant: Variant, texts: Sequence[Text], features: Sequence[int]) -> NDArray[np.float32]:
    """[texts, K]: each feature's largest activation over the tokens that edits would touch."""
    return np.stack([variant.inspect(text).counted()[:, list(features)].toarray().max(axis=0) for text in texts])


def _met(met: Sequence[bool]) -> Met:
    return Met(sum(met), len(met), *wilson(sum(met), len(met)))
