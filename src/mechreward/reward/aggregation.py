"""Token rewards pooled to one number a completion: the one function that FeatureReward, Gate 1 and logs share.

The aggregations are those of `features.aggregation`, by which features are also contrasted.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.features.aggregation import (
    Aggregation,
    LastKAggregation,
    MaxAggregation,
    MeanAggregation,
    PerTokenAggregation,
    StepEndAggregation,
    WeightedMeanAggregation,
    build_aggregation,
)

__all__ = [
    "Aggregation",
    "LastKAggregation",
    "MaxAggregation",
    "MeanAggregation",
    "PerTokenAggregation",
    "StepEndAggregation",
    "WeightedMeanAggregation",
    "build_aggregation",
    "pool",
]


def pool(
    values_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    aggregation: str | Aggregation,
    step_end_BT: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, " b"]:
    """Pools token values by an aggregation or its name; `step_end_BT` is for `step_end` alone.

    Returns:
        [B] float32; NaN for a row whose mask is empty.

    Raises:
        InputError: for an unknown aggregation, or `step_end` without `step_end_BT`.
    """
    return build_aggregation(aggregation)(values_BT, mask_BT, step_end_BT)
