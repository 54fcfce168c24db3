"""AutoSteer: from examples, or from a description, to edits whose strength was measured.

The hosted SDK's algorithm of that name is not published; this one is our own:

1. Features. From pairs of wanted and unwanted texts: the sparse fit of `examples.sparse_fit`, with its weights. From
   a description: the features whose labels are nearest to it, with weight 1 each.
2. Strength. `sweep.sweep` on prompts that were not among the examples, scored by the caller: the knee, or nothing at
   all where no fluent strength gains anything. A description that finds the wrong features fails here, visibly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechreward.steering.examples import sparse_fit
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
