"""AutoConditional against thresholds and counts worked out text by text."""

from __future__ import annotations

import numpy as np
import pytest

from mechreward.errors import InputError
from mechreward.gates import wilson
from mechreward.models import load_model
from mechreward.sae import load_sae
from mechreward.steering import Variant, autoconditional, contrast
from mechreward.tiny import MODEL, SAE_FOLDER

ADDED = [f"on Monday buys {n} : 40 + {n} = {40 + n} ." for n in range(1, 10)]
TAKEN = [f"on Monday loses {n} : 40 - {n} = {40 - n} ." for n in range(1, 12)]


@pytest.fixture(scope="module")
def variant() -> Variant:
    return Variant(load_model(str(MODEL)), load_sae(str(SAE_FOLDER)))


@pytest.mark.parametrize(("k", "share"), [(1, 0.05), (3, 0.4)])
def test_thresholds_and_errors_by_hand(variant: Variant, k: int, share: float) -> None:
    found = autoconditional(variant, ADDED, TAKEN, k=k, share=share)
    features = contrast(variant, ADDED[::2], TAKEN[::2], k).first.ids
    assert list(found.thresholds) == features and len(features) == k

    def peak(text: str, feature: int) -> float:
        seen = variant.inspect(text)
        return max(float(v) for v, counts in zip(seen.matrix([feature])[:, 0], seen.counted_T, strict=True) if counts)

    for feature, limit in found.thresholds.items():
        over = [peak(text, feature) > limit for text in TAKEN[::2]]
        allowed = int(share / k * (len(over) - 1))
        peaks = sorted(peak(text, feature) for text in TAKEN[::2])
        assert limit == peaks[len(peaks) - 1 - allowed] and sum(over) <= allowed
    for side, texts in ((found.wanted, ADDED[1::2]), (found.unwanted, TAKEN[1::2])):
        met = [any(peak(text, f) > limit for f, limit in found.thresholds.items()) for text in texts]
        assert (side.count, side.n, (side.low, side.high)) == (sum(met), len(met), wilson(sum(met), len(met)))
    assert found.wanted.count > 0.7 * found.wanted.n and found.condition.features() == set(features)
    # The condition holds on a token exactly where one of its features exceeds its threshold.
    seen = variant.inspect(ADDED[1])
    acts = {f: seen.matrix([f])[:, 0] for f in features}
    wanted = np.any([acts[f] > limit for f, limit in found.thresholds.items()], axis=0)
    assert np.array_equal(_holds(found.condition, acts), wanted)


def _holds(condition, acts) -> np.ndarray:
    import torch

    return condition.holds({f: torch.tensor(values) for f, values in acts.items()}).numpy()


def test_bad_input(variant: Variant) -> None:
    with pytest.raises(InputError, match="wanted: 3 texts are given; half of them are held out"):
        autoconditional(variant, ADDED[:3], TAKEN)
    with pytest.raises(InputError, match="unwanted: 0 texts are given"):
        autoconditional(variant, ADDED, [])
    for k, share in ((0, 0.1), (1, 0.0), (1, 1.0)):
        with pytest.raises(InputError, match="k, share: .* are not allowed"):
            autoconditional(variant, ADDED, TAKEN, k=k, share=share)
    with pytest.raises(InputError, match="no feature is stronger"):
        autoconditional(variant, ADDED[:4], ADDED[:4])
