"""Pooling token values: hand-worked numbers; rows without tokens are NaN, whatever stands under the mask.

The aggregations themselves are tested in `tests/features/test_features_aggregation.py`.
"""

from __future__ import annotations

import pytest
import torch

from mechreward.errors import InputError
from mechreward.reward import LastKAggregation, pool

VALUES = torch.tensor([[1.0, 5.0, 3.0, 99.0], [-4.0, -2.0, -6.0, -1.0], [7.0, 7.0, 7.0, 7.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("mean", [3.0, -5.0]), ("per_token", [3.0, -5.0]), ("max", [5.0, -4.0]), ("last", [3.0, -6.0])],
)
def test_pools_unmasked_tokens_only(aggregation: str, expected: list[float]) -> None:
    pooled = pool(VALUES, MASK, aggregation)
    assert pooled[:2].tolist() == expected
    assert pooled[2].isnan()


@pytest.mark.parametrize("aggregation", ["mean", "max", "last"])
def test_what_is_masked_never_shows(aggregation: str) -> None:
    spoiled = VALUES.masked_fill(~MASK, torch.nan)
    assert torch.equal(pool(spoiled, MASK, aggregation)[:2], pool(VALUES, MASK, aggregation)[:2])


@pytest.mark.parametrize("aggregation", ["mean", "max", "last"])
def test_no_columns_at_all(aggregation: str) -> None:
    assert pool(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), aggregation).isnan().all()


def test_names_and_objects_pool_alike() -> None:
    ends = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert pool(VALUES, MASK, LastKAggregation(2))[:2].tolist() == [4.0, -5.0]
    assert pool(VALUES, MASK, "last_2")[:2].tolist() == pool(VALUES, MASK, "mean_last_2_tokens")[:2].tolist()
    assert pool(VALUES, MASK, "step_end", ends)[:2].tolist() == [2.0, -5.0]
    with pytest.raises(InputError, match="step_end: this aggregation needs a mask"):
        pool(VALUES, MASK, "step_end")


def test_unknown_aggregation_is_named() -> None:
    with pytest.raises(
        InputError,
        match="aggregation: 'median' is not one of mean, max, last, last_k, weighted_mean, step_end, per_token",
    ):
        pool(VALUES, MASK, "median")
