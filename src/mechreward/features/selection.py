"""From a contrast table to a pack: significant, stable features, weighted by how well each one tells right from wrong.

A weight is the point-biserial correlation that belongs to the effect, d / sqrt(d^2 + 4): it has the effect's sign and
is bounded, so that no single feature takes the pack over. Weights are scaled to sum |w| = 1. Activations are divided by
their standard deviation within a question, so that the pooled reward is in those units too.

A pack of penalties alone pays an empty answer most, and Gate 1 refuses it. Where most answers are wrong the largest
effects are all penalties; `balanced` takes as many features of right answers as of wrong ones.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from mechreward.errors import InputError
from mechreward.features.contrast import ContrastTable
from mechreward.features.pack import FeaturePack, PackFeature, PackPrompt, Pooling, SAERef
from mechreward.sae import SAE

Signs = Literal["any", "balanced"]
"""Which features: of largest |effect| whatever their sign, or half of them of each sign."""


class NoFeatures(InputError):
    """No feature passes the selection: an outcome of the data, in words, rather than a wrong input."""


def build_pack(
    table: ContrastTable,
    sae: SAE,
    *,
    name: str,
    model_name: str,
    n_features: int = 20,
    q_max: float = 0.05,
    min_stability: float = 0.8,
    signs: Signs = "any",
    pooling: Pooling = "mean",
    prompt: PackPrompt | None = None,
    provenance: dict[str, str | int | float | bool | None] | None = None,
) -> FeaturePack:
    """The `n_features` of largest |effect| among those with q <= `q_max` and stability >= `min_stability`.

    Args:
        signs: `balanced` takes half of them (if odd, one less) of each sign, fewer where there are fewer.

    Raises:
        NoFeatures: if none is left, with how many passed each condition.
        InputError: if `n_features` is less than 1 (2 if balanced) or the table is not of this SAE's size.
    """
    if len(table.frame) != sae.d_sae:
        raise InputError(f"sae: the table has {len(table.frame)} features, the SAE {sae.d_sae}")
    features = select(table, n_features=n_features, q_max=q_max, min_stability=min_stability, signs=signs)
    found_on: dict[str, str | int | float | bool | None] = {
        "n_questions": table.n_questions,
        "n_mixed": table.n_mixed,
        "n_responses": table.n_responses,
        "q_max": q_max,
        "min_stability": min_stability,
        "signs": signs,
    }
    return FeaturePack(
        name=name,
        model_name=model_name,
        sae=sae_ref(sae),
        features=features,
        pooling=pooling,
        prompt=prompt,
        provenance=found_on | (provenance or {}),
    )


def select(
    table: ContrastTable,
    *,
    n_features: int = 20,
    q_max: float = 0.05,
    min_stability: float = 0.8,
    signs: Signs = "any",
) -> list[PackFeature]:
    """The features that `build_pack` puts into a pack, with their weights.

    Raises:
        NoFeatures, InputError: as `build_pack`.
    """
    least = 2 if signs == "balanced" else 1
    if n_features < least:
        raise InputError(f"n_features: {n_features} is not allowed, it must be at least {least}")
    significant = table.frame["q_value"] <= q_max
    stable = table.frame["stability"] >= min_stability
    passing = table.frame[significant & stable & (table.frame["effect"] != 0)]
    chosen = passing.head(n_features)
    if signs == "balanced":
        chosen = passing.groupby(passing["effect"] > 0).head(n_features // 2)
    if chosen.empty:
        raise NoFeatures(
            f"features: no feature passes q <= {q_max:g} and stability >= {min_stability:g} on {table.n_mixed} mixed "
            f"questions ({int(significant.sum())} of {len(table.frame)} pass the first, {int(stable.sum())} the "
            f"second, the largest |effect| is {table.frame['effect'].abs().max():.2f})"
        )
    return _weighted(chosen)


def sae_ref(sae: SAE) -> SAERef:
    """The reference a pack keeps to its SAE."""
    meta = sae.meta
    return SAERef(
        release=meta.release,
        sae_id=meta.sae_id,
        layer=meta.layer,
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        weights_hash=sae.weights_hash,
    )


def random_packs(
    pack: FeaturePack, table: ContrastTable, n: int, *, seed: int = 0, nearest: int = 20
) -> list[FeaturePack]:
    """Packs that keep the weights but not the features: the baseline for "any features that fire as often would do".

    Each feature gives way to a random one of the `nearest` in support (neither in the pack, nor drawn before, nor
    constant), with that one's own scale and a threshold of as many scales. Labels have no say.

    Raises:
        InputError: if the SAE has too few other live features.
    """
    rng = np.random.default_rng(seed)
    frame = table.frame.set_index("id")
    live = frame[(frame["scale"] > 0) & ~frame.index.isin(pack.feature_ids())]
    if len(live) < len(pack.features):
        raise InputError(f"features: only {len(live)} other live features, a random pack needs {len(pack.features)}")
    packs = []
    for index in range(n):
        left = live
        features = []
        for feature in pack.features:
            near = (left["support"] - frame["support"][feature.id]).abs().nsmallest(nearest).index
            drawn = int(rng.choice(near.to_numpy()))
            scale = float(left["scale"][drawn])
            at_least = feature.activation_threshold / feature.scale * scale
            features.append(PackFeature(id=drawn, weight=feature.weight, scale=scale, activation_threshold=at_least))
            left = left.drop(index=drawn)
        packs.append(pack.model_copy(update={"name": f"random-{index}", "features": features, "validation": None}))
    return packs


def _weighted(rows: pd.DataFrame) -> list[PackFeature]:
    effect_K = rows["effect"].to_numpy()
    weight_K = effect_K / np.sqrt(effect_K**2 + 4)
    weight_K = weight_K / np.abs(weight_K).sum()
    columns = zip(rows["id"], weight_K, rows["scale"], effect_K, rows["q_value"], rows["stability"], strict=True)
    return [
        PackFeature(id=int(i), weight=float(w), scale=float(s), effect=float(e), q_value=float(q), stability=float(st))
        for i, w, s, e, q, st in columns
    ]
