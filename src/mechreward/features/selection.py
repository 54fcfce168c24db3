"""From a contrast table to a pack: significant, stable features, weighted by how well each one tells right from wrong.

A weight is the point-biserial correlation that belongs to the effect, d / sqrt(d^2 + 4): it has the effect's sign and
is bounded, so that no single feature takes the pack over. An attribution has a d of its own, over questions; of a probe
and of a ReasonScore, which have none, the effect itself is bounded that way. Weights are scaled to sum |w| = 1.
Activations are divided by their standard deviation within a question, so that the pooled reward is in those units too.

A pack of penalties alone pays an empty answer most, and Gate 1 refuses it. Where most answers are wrong the largest
effects are all penalties; `balanced` takes as many features of right answers as of wrong ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechreward.errors import InputError
from mechreward.features.aggregation import build_aggregation, pooling_spec
from mechreward.features.contrast import CONTRAST, ContrastTable
from mechreward.features.pack import FeaturePack, Metadata, PackFeature, PackPrompt, Pooling, SAERef
from mechreward.sae import SAE
from mechreward.settings import check_signs

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
    pooling: Pooling | None = None,
    prompt: PackPrompt | None = None,
    provenance: Metadata | None = None,
) -> FeaturePack:
    """The `n_features` of largest |effect| among those with q <= `q_max` and stability >= `min_stability`.

    Args:
        signs: `balanced` takes half of them (if odd, one less) of each sign, fewer where there are fewer.
        pooling: the table's own; needed only where the table does not say it.

    Raises:
        NoFeatures: if none is left, with how many passed each condition.
        InputError: if `n_features` is less than 1 (2 if balanced), the table is not of this SAE's size, or its features
            were found with another pooling.
    """
    if len(table.frame) != sae.d_sae:
        raise InputError(f"sae: the table has {len(table.frame)} features, the SAE {sae.d_sae}")
    features = select(table, n_features=n_features, q_max=q_max, min_stability=min_stability, signs=signs)
    found_on: Metadata = {
        "n_questions": table.n_questions,
        "n_mixed": table.n_mixed,
        "n_responses": table.n_responses,
        "q_max": q_max,
        "min_stability": min_stability,
        "signs": signs,
    }
    if table.prompts:
        found_on["prompts"] = list(table.prompts)
    return FeaturePack(
        name=name,
        model_name=model_name,
        sae=sae_ref(sae),
        features=features,
        pooling=_pooling(table, pooling),
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
    check_signs(signs, n_features)
    significant = table.frame["q_value"] <= q_max
    stable = table.frame["stability"] >= min_stability
    passing = table.frame[significant & stable & (_strength(table.frame) != 0)]
    chosen = passing.head(n_features)
    if signs == "balanced":
        chosen = passing.groupby(passing["effect"] > 0).head(n_features // 2)
    if chosen.empty:
        raise NoFeatures(
            f"features: no feature passes q <= {q_max:g} and stability >= {min_stability:g} on {table.n_mixed} mixed "
            f"questions ({int(significant.sum())} of {len(table.frame)} pass the first, {int(stable.sum())} the "
            f"second, the largest |effect| is {table.frame['effect'].abs().max():.2f})"
        )
    return _weighted(chosen, table.method)


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
        InputError: if the SAE has too few other live features, or the table is another SAE's.
    """
    check_table(table, pack)
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
        packs.append(pack.with_features(f"random-{index}", features))
    return packs


def check_table(table: ContrastTable, pack: FeaturePack) -> None:
    """Raises InputError unless the table has a row for each feature of the pack's SAE."""
    if len(table.frame) != pack.sae.d_sae or not table.frame["id"].isin(range(pack.sae.d_sae)).all():
        raise InputError(
            f"features: the table has {len(table.frame)} features, but the SAE of pack {pack.name} has "
            f"{pack.sae.d_sae}; give the table that the pack was made from"
        )


def _pooling(table: ContrastTable, asked: Pooling | None) -> Pooling:
    """The pooling that the table's statistics and scales hold for: scored by another, a pack is not what was found."""
    if table.pooling is None and asked is None:
        raise InputError("pooling: the table does not say how its features were pooled; give the pooling")
    if asked is None:
        return str(table.pooling)
    spec = pooling_spec(build_aggregation(asked))
    if table.pooling not in (None, spec):
        raise InputError(f"pooling: {asked!r} is not allowed, the table's features were found with {table.pooling!r}")
    return spec


def _strength(rows: pd.DataFrame) -> pd.Series[float]:
    """What weights are made from."""
    return rows["d" if "d" in rows else "effect"]


def _weighted(rows: pd.DataFrame, method: str) -> list[PackFeature]:
    strength_K = _strength(rows).to_numpy()
    weight_K = strength_K / np.sqrt(strength_K**2 + 4)
    weight_K = weight_K / np.abs(weight_K).sum()
    return [_feature(row, float(w), method) for row, w in zip(rows.to_dict("records"), weight_K, strict=True)]


def _feature(row: Mapping[Hashable, Any], weight: float, method: str) -> PackFeature:
    """A row's feature. Only a contrast's effect is Cohen's d; that of another method goes by the method's name."""
    effect = float(row["effect"])
    return PackFeature(
        id=int(row["id"]),
        weight=weight,
        scale=float(row["scale"]),
        effect=effect if method == CONTRAST else None,
        q_value=float(row["q_value"]),
        stability=float(row["stability"]),
        metadata={} if method == CONTRAST else {method: effect},
    )
