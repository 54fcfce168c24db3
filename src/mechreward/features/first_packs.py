"""Packs of the first mechreward, and what becomes of each of their keys.

Its JSON names the SAE by `release` and `sae_id`, keeps the SAE's geometry in `metadata`, and lists features under
`features` (signed weights) or under `helpful_features` and `harmful_features`; `feature_weights` maps ids to weights.
Its reader knew `features` alone, so that packs of the other form loaded as empty. Here every key is either carried over
or refused by its name (the table is in docs/packs.md). Two that its reader accepted and ignored decide here what they
say they decide: `activation_threshold`, and the `release` and `sae_id` of a single feature.

Its reward was the plain sum of weighted activations, so every `scale` is 1, and the mean over the response's tokens.
Its `validation` becomes `reported`: it is no gate of ours, whatever the `verdict` in it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechreward.errors import InputError

if TYPE_CHECKING:
    from mechreward.sae import SAE

LISTS = ("features", "helpful_features", "harmful_features")
PACK_KEYS = (
    *LISTS, "name", "version", "model_name", "release", "sae_id", "description", "feature_weights",
    "activation_threshold", "validation", "metadata",
)  # fmt: skip
FEATURE_KEYS = (
    "feature_id", "name", "description", "weight", "release", "sae_id", "activation_threshold", "validated", "metadata",
    "effect_size", "mean_correct", "mean_wrong",
)  # fmt: skip
FIGURES = (
    "n_questions", "n_correct", "discovery_n", "spearman_rho", "spearman_p", "pearson_r", "pearson_p", "pass_threshold",
)  # fmt: skip
CLAIMS = (
    "method", "date", "benchmark", "difficulty_filter", "discovery_split", "validation_split", "reward_formula",
    "verdict", "sae_checkpoint", "notes",
)  # fmt: skip
GEOMETRY = {"target_layer": "layer", "d_model": "d_model", "d_sae": "d_sae"}
OWN = {"helpful_features": 1.0, "harmful_features": -1.0, "features": 1.0}
"""The weight of a feature that gives none."""


def is_first(record: Mapping[str, Any]) -> bool:
    """Whether a pack's JSON is of the first mechreward: ours has its SAE under `sae`, its packs spread it out."""
    told = {"helpful_features", "harmful_features", "feature_weights", "release", "sae_id"}
    return "sae" not in record and bool(told & record.keys())


def from_first(record: Mapping[str, Any], sae: SAE | None, source: str) -> dict[str, Any]:
    """The same pack as a record of ours, still to be validated.

    Args:
        record: the file's JSON.
        sae: where the SAE's layer and size come from if the pack does not say them.
        source: the file's name, kept as where the figures come from.

    Raises:
        InputError: naming the first key that is unknown, contradicts another, or is missing.
    """
    _known(record, PACK_KEYS, "pack", source)
    metadata = dict(_mapping(record, "metadata", source))
    reference = {name: record.get(name, "") for name in ("release", "sae_id")}
    ours: dict[str, Any] = {name: record[name] for name in ("name", "version", "description") if name in record}
    ours["model_name"] = record.get("model_name", "")
    # Of the SAE it names alone: the hash of another one would make the pack that one's.
    named = sae is not None and all(told in ("", getattr(sae.meta, name)) for name, told in reference.items())
    weights_hash = sae.weights_hash if sae is not None and named else None
    ours["sae"] = reference | _geometry(metadata, sae, source) | {"weights_hash": weights_hash}
    ours["features"] = _features(record, reference, source)
    if "validation" in record:
        ours["reported"] = _reported(_mapping(record, "validation", source), source)
    return ours | {"pooling": "mean", "metadata": metadata}


def _geometry(metadata: dict[str, Any], sae: SAE | None, source: str) -> dict[str, Any]:
    """Layer and size, taken out of the metadata."""
    found = {ours: metadata.pop(theirs) for theirs, ours in GEOMETRY.items() if theirs in metadata}
    if sae is not None:
        found = {"layer": sae.meta.layer, "d_model": sae.d_model, "d_sae": sae.d_sae} | found
    for theirs, ours in GEOMETRY.items():
        if ours not in found:
            raise InputError(f"metadata.{theirs}: is missing, so the SAE must be given: load_pack(..., sae) ({source})")
    return found


def _features(record: Mapping[str, Any], reference: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    weights = dict(_mapping(record, "feature_weights", source))
    default = record.get("activation_threshold", 0.0)
    features = []
    for kind in LISTS:
        for position, feature in enumerate(_objects(record, kind, source)):
            where = f"{kind}.{position}"
            _known(feature, FEATURE_KEYS, where, source)
            weight = _weight(feature, weights.pop(str(feature.get("feature_id")), None), kind, where, source)
            features.append(_feature(feature, weight, default, reference, where, source))
    listed = any(kind in record for kind in LISTS)
    for id_, weight in weights.items():
        if listed or not id_.isdecimal():
            raise InputError(f"feature_weights.{id_}: is not the id of a feature of the pack ({source})")
        features.append({"id": int(id_), "weight": weight, "scale": 1.0, "activation_threshold": default})
    if not features:
        raise InputError(f"features: the pack holds none, one at least is needed ({source})")
    return features


def _weight(feature: Mapping[str, Any], other: Any, kind: str, where: str, source: str) -> Any:
    weight = feature.get("weight", OWN[kind] if other is None else other)
    if other is not None and other != weight:
        raise InputError(f"{where}.weight: {weight}, but feature_weights says {other} ({source})")
    if kind != "features" and isinstance(weight, int | float) and weight * OWN[kind] < 0:
        sign = "negative" if kind == "helpful_features" else "positive"
        raise InputError(f"{where}.weight: {weight} must not be {sign} among the {kind} ({source})")
    return weight


def _feature(
    feature: Mapping[str, Any], weight: Any, threshold: Any, reference: Mapping[str, Any], where: str, source: str
) -> dict[str, Any]:
    for name, of_pack in reference.items():
        if feature.get(name, "") not in ("", of_pack):
            raise InputError(f"{where}.{name}: {feature[name]!r}, but the pack's is {of_pack!r} ({source})")
    if "feature_id" not in feature:
        raise InputError(f"{where}: a feature needs its feature_id ({source})")
    kept = {name: feature[name] for name in ("mean_correct", "mean_wrong") if name in feature}
    if "validated" in feature:
        kept["validated_by_its_authors"] = feature["validated"]
    ours = {name: feature[name] for name in ("name", "description") if name in feature}
    return ours | {
        "id": feature["feature_id"],
        "weight": weight,
        "scale": 1.0,
        "activation_threshold": feature.get("activation_threshold", threshold),
        "effect": feature.get("effect_size"),
        "metadata": kept | dict(_mapping(feature, "metadata", source)),
    }


def _reported(validation: Mapping[str, Any], source: str) -> dict[str, Any]:
    _known(validation, FIGURES + CLAIMS, "validation", source)
    figures = {name: validation[name] for name in FIGURES if name in validation}
    return {"source": source, "claims": {name: validation[name] for name in CLAIMS if name in validation}} | figures


def _objects(record: Mapping[str, Any], name: str, source: str) -> list[Mapping[str, Any]]:
    found = record.get(name, [])
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise InputError(f"{name}: must be a list of features, each an object of keys and values ({source})")
    return found


def _mapping(record: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    found = record.get(name, {})
    if not isinstance(found, Mapping):
        raise InputError(f"{name}: must be an object of keys and values, got {found!r} ({source})")
    return found


def _known(record: Mapping[str, Any], keys: tuple[str, ...], where: str, source: str) -> None:
    for name in record:
        if name not in keys:
            raise InputError(f"{where}.{name}: is not a key of a pack, which has {', '.join(keys)} ({source})")
