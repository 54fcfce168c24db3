"""Packs of the first mechreward: one test a key, each carried over or refused by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mechreward.errors import InputError
from mechreward.features import FeaturePack, check_pack, load_pack
from mechreward.features.first_packs import CLAIMS, FEATURE_KEYS, FIGURES, PACK_KEYS
from mechreward.reward import FeatureReward
from mechreward.sae import SAE, SAEMeta


def sae_of(layer: int = 2) -> SAE:
    meta = SAEMeta(release="r", sae_id="s", layer=layer, model_name="m", hook_name="")
    eye = torch.eye(4)
    return SAE("relu", eye, torch.zeros(4), eye.clone(), torch.zeros(4), meta)


def first(**changes: Any) -> dict[str, Any]:
    """A pack of the form that the first mechreward published; a value of None leaves its key out."""
    pack = {
        "name": "m/reasoning",
        "version": "1.0.0",
        "model_name": "org/m",
        "release": "r",
        "sae_id": "s",
        "description": "what it is",
        "helpful_features": [{"feature_id": 3, "weight": 0.5}],
        "harmful_features": [{"feature_id": 1, "weight": -2.0}],
        "metadata": {"target_layer": 2, "d_model": 4, "d_sae": 4, "k": 2, "hf_sae_repo": "r"},
    }
    return {name: value for name, value in (pack | changes).items() if value is not None}


def listed(*features: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return first(helpful_features=None, harmful_features=None, features=list(features), **changes)


def read(tmp_path: Path, record: dict[str, Any], sae: SAE | None = None) -> FeaturePack:
    (tmp_path / "first.json").write_text(json.dumps(record))
    return load_pack(tmp_path / "first.json", sae)


def refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, record)
    assert "\n" not in str(caught.value) and "first.json" in str(caught.value)


def test_helpful_and_harmful_features(tmp_path: Path) -> None:
    pack = read(tmp_path, first())
    assert [(f.id, f.weight, f.scale) for f in pack.features] == [(3, 0.5, 1.0), (1, -2.0, 1.0)]
    bare = first(helpful_features=[{"feature_id": 3}], harmful_features=[{"feature_id": 1}])
    assert [f.weight for f in read(tmp_path, bare).features] == [1.0, -1.0]
    wrong = first(harmful_features=[{"feature_id": 1, "weight": 2.0}])
    refused(tmp_path, wrong, r"harmful_features.0.weight: 2.0 must not be positive among the harmful_features")
    wrong = first(helpful_features=[{"feature_id": 1, "weight": -1}])
    refused(tmp_path, wrong, r"helpful_features.0.weight: -1 must not be negative")


def test_features(tmp_path: Path) -> None:
    pack = read(tmp_path, listed({"feature_id": 2, "weight": -0.25}, {"feature_id": 0}))
    assert [(f.id, f.weight) for f in pack.features] == [(2, -0.25), (0, 1.0)]
    refused(tmp_path, listed(), "features: the pack holds none")
    refused(tmp_path, first(features=7), "features: must be a list of features")
    refused(tmp_path, first(features=[7]), "features: must be a list of features")


def test_feature_weights(tmp_path: Path) -> None:
    alone = first(helpful_features=None, harmful_features=None, feature_weights={"3": 0.5, "0": -1.5})
    pack = read(tmp_path, alone | {"activation_threshold": 0.5})
    assert [(f.id, f.weight, f.activation_threshold) for f in pack.features] == [(3, 0.5, 0.5), (0, -1.5, 0.5)]
    pack = read(tmp_path, listed({"feature_id": 3}, {"feature_id": 0, "weight": 2.0}, feature_weights={"3": 0.5}))
    assert [f.weight for f in pack.features] == [0.5, 2.0]
    both = listed({"feature_id": 3, "weight": 1.0}, feature_weights={"3": 0.5})
    refused(tmp_path, both, "features.0.weight: 1.0, but feature_weights says 0.5")
    refused(tmp_path, listed({"feature_id": 3}, feature_weights={"2": 0.5}), "feature_weights.2: is not the id of a")
    refused(tmp_path, alone | {"feature_weights": {"x": 0.5}}, "feature_weights.x: is not the id")
    refused(tmp_path, alone | {"feature_weights": [1]}, "feature_weights: must be an object")


def test_feature_id(tmp_path: Path) -> None:
    refused(tmp_path, listed({"weight": 1.0}), "features.0: a feature needs its feature_id")
    refused(tmp_path, listed({"feature_id": 4}), "feature id 4 must be less than sae.d_sae = 4")
    refused(tmp_path, listed({"feature_id": 3}, {"feature_id": 3}), "feature ids must differ, 3 comes more than once")


def test_weight(tmp_path: Path) -> None:
    refused(tmp_path, listed({"feature_id": 3, "weight": "1"}), "features.0.weight: .*valid number")


def test_activation_threshold(tmp_path: Path) -> None:
    """Of a feature, else of the pack; and what lies below it is not paid."""
    record = listed({"feature_id": 3, "activation_threshold": 2.0}, {"feature_id": 0}, activation_threshold=0.5)
    pack = read(tmp_path, record)
    assert [f.activation_threshold for f in pack.features] == [2.0, 0.5]
    h_BTD = torch.tensor([[[0.4, 0.0, 0.0, 1.9], [0.5, 0.0, 0.0, 2.0], [3.0, 0.0, 0.0, 1.0]]])
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    reward = FeatureReward(pack, sae_of())
    assert reward.compute_per_token(h_BTD, mask_BT).tolist() == [[0.0, 2.5, 3.0]]
    without = read(tmp_path, listed({"feature_id": 3}, {"feature_id": 0}))
    assert FeatureReward(without, sae_of()).spec_hash != reward.spec_hash


@pytest.mark.parametrize("key", ["release", "sae_id"])
def test_release_and_sae_id(tmp_path: Path, key: str) -> None:
    own = first()[key]
    assert getattr(read(tmp_path, first()).sae, key) == own
    pack = read(tmp_path, listed({"feature_id": 3, key: own}, {"feature_id": 1, key: ""}))
    assert pack.feature_ids() == [3, 1]
    refused(tmp_path, listed({"feature_id": 3, key: "z"}), f"features.0.{key}: 'z', but the pack's is '{own}'")
    # No weights hash is recorded in such a pack: the SAE's names have to be the same.
    check_pack(read(tmp_path, first()), sae_of())
    with pytest.raises(InputError, match=f"{key} {own}, this one has other"):
        check_pack(pack, replace(sae_of(), meta=replace(sae_of().meta, **{key: "other"})))


@pytest.mark.parametrize("key", ["name", "version", "model_name", "description"])
def test_labels_of_the_pack(tmp_path: Path, key: str) -> None:
    assert getattr(read(tmp_path, first()), key) == first()[key]


@pytest.mark.parametrize("key", ["name", "description"])
def test_labels_of_a_feature(tmp_path: Path, key: str) -> None:
    assert getattr(read(tmp_path, listed({"feature_id": 3, key: "label"})).features[0], key) == "label"


def test_validated_is_kept_as_a_claim(tmp_path: Path) -> None:
    pack = read(tmp_path, listed({"feature_id": 3, "validated": True}))
    assert pack.features[0].metadata == {"validated_by_its_authors": True}
    assert not pack.gate_passed and pack.status == "gate 1: not run"


def test_effect_size_and_means(tmp_path: Path) -> None:
    feature = {"feature_id": 3, "effect_size": 2.1, "mean_correct": 0.5, "mean_wrong": 0.25}
    found = read(tmp_path, listed(feature)).features[0]
    assert (found.effect, found.metadata) == (2.1, {"mean_correct": 0.5, "mean_wrong": 0.25})


def test_metadata_of_a_feature(tmp_path: Path) -> None:
    notes = {"source": "there", "examples": ["a", "b"]}
    assert read(tmp_path, listed({"feature_id": 3, "metadata": notes})).features[0].metadata == notes
    refused(tmp_path, listed({"feature_id": 3, "metadata": "x"}), "metadata: must be an object")


@pytest.mark.parametrize("key", ["target_layer", "d_model", "d_sae"])
def test_geometry_in_the_metadata(tmp_path: Path, key: str) -> None:
    pack = read(tmp_path, first())
    assert (pack.sae.layer, pack.sae.d_model, pack.sae.d_sae, pack.sae.weights_hash) == (2, 4, 4, None)
    assert pack.metadata == {"k": 2, "hf_sae_repo": "r"}
    less = {name: value for name, value in first()["metadata"].items() if name != key}
    refused(tmp_path, first(metadata=less), f"metadata.{key}: is missing, so the SAE must be given")
    assert read(tmp_path, first(metadata=less), sae_of()).sae.weights_hash == sae_of().weights_hash
    # What the pack says is kept, so that another SAE is found out.
    with pytest.raises(InputError, match="an SAE with layer 2, this one has 1"):
        FeatureReward.from_pack(read(tmp_path, first(), sae_of(layer=1)), sae_of(layer=1))


def test_from_pack_takes_the_geometry_from_the_sae(tmp_path: Path) -> None:
    (tmp_path / "first.json").write_text(json.dumps(first(metadata=None)))
    reward = FeatureReward.from_pack(tmp_path / "first.json", sae=sae_of())
    assert reward.pack.sae.d_sae == 4 and reward.feature_ids() == [3, 1]


@pytest.mark.parametrize(("field", "other"), [("release", "another"), ("sae_id", "t")])
def test_an_sae_that_the_pack_does_not_name_is_refused(tmp_path: Path, field: str, other: str) -> None:
    (tmp_path / "first.json").write_text(json.dumps(first()))
    stranger = sae_of()
    stranger = replace(stranger, meta=replace(stranger.meta, **{field: other}))
    with pytest.raises(InputError, match=f"an SAE with {field} ., this one has {other}$"):
        FeatureReward.from_pack(tmp_path / "first.json", stranger)
    # A pack that names none takes the one that it is given.
    (tmp_path / "first.json").write_text(json.dumps(first(release=None, sae_id=None)))
    reward = FeatureReward.from_pack(tmp_path / "first.json", stranger)
    assert reward.pack.sae.weights_hash == stranger.weights_hash


def test_validation_is_reported_and_no_gate(tmp_path: Path) -> None:
    figures = {
        "n_questions": 100, "n_correct": 89, "discovery_n": 50, "spearman_rho": 0.54, "spearman_p": 0.0,
        "pearson_r": 0.726, "pearson_p": 0.0, "pass_threshold": 0.3,
    }  # fmt: skip
    claims = {name: "PASS" for name in CLAIMS} | {"difficulty_filter": ["easy", "middle"]}
    pack = read(tmp_path, first(validation=figures | claims))
    assert pack.reported is not None and pack.validation is None and not pack.gate_passed
    assert pack.reported.model_dump(include=set(FIGURES)) == figures
    assert pack.reported.claims == claims and pack.reported.source == str(tmp_path / "first.json")
    refused(tmp_path, first(validation={"auc": 0.9}), "validation.auc: is not a key")


def test_keys_that_are_unknown(tmp_path: Path) -> None:
    refused(tmp_path, first(surprise=1), "pack.surprise: is not a key of a pack, which has features,")
    refused(tmp_path, listed({"feature_id": 3, "sign": 1}), "features.0.sign: is not a key")


def test_every_key_of_the_table_has_its_line_in_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "packs.md").read_text()
    for key in PACK_KEYS + FEATURE_KEYS + FIGURES:
        assert f"`{key}`" in page, key
