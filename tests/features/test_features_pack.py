"""Packs: round trip, the hash, and one sentence for each thing that is wrong in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mechreward.errors import InputError
from mechreward.features import (
    FeaturePack,
    PackFeature,
    PackValidation,
    ReportedFigures,
    SAERef,
    catalog_names,
    check_pack,
    load_pack,
    sae_ref,
    save_pack,
    weighted_sum,
)
from mechreward.sae import SAE, SAEMeta


def make_pack(**changes: Any) -> FeaturePack:
    fields: dict[str, Any] = {
        "name": "p",
        "model_name": "m",
        "sae": SAERef(release="r", sae_id="s", layer=2, d_model=4, d_sae=8, weights_hash="abc"),
        "features": [
            PackFeature(id=3, weight=0.75, scale=2.0, effect=1.5, q_value=0.01, stability=1.0),
            PackFeature(id=1, weight=-0.25, scale=0.5),
        ],
        "provenance": {"seed": 3, "q_max": 0.05, "data": "tiny", "gated": True, "note": None},
    }
    return FeaturePack(**(fields | changes))


def identity_sae(width: int = 4, layer: int = 2) -> SAE:
    meta = SAEMeta(release="r", sae_id="s", layer=layer, model_name="m", hook_name="")
    eye = torch.eye(width)
    return SAE("relu", eye, torch.zeros(width), eye.clone(), torch.zeros(width), meta)


def test_round_trip(tmp_path: Path) -> None:
    validation = PackValidation(spec_hash="x", verdict="pass", within_auroc=0.7, interval=(0.6, 0.8), n_questions=9)
    pack = make_pack(validation=validation)
    save_pack(pack, tmp_path / "pack.json")
    assert load_pack(tmp_path / "pack.json") == pack
    assert pack.feature_ids() == [3, 1]


def test_undecided_validation_round_trips(tmp_path: Path) -> None:
    nothing = PackValidation(spec_hash="x", verdict="inconclusive", within_auroc=None, interval=None, n_questions=9)
    save_pack(make_pack(validation=nothing), tmp_path / "pack.json")
    assert load_pack(tmp_path / "pack.json").validation == nothing


def test_hash_ignores_what_does_not_change_the_reward() -> None:
    pack = make_pack()
    same = make_pack(
        name="other", version="9", description="d", provenance={}, features=list(reversed(pack.features)),
        validation=PackValidation(spec_hash="x", verdict="fail", within_auroc=0.5, interval=(0.4, 0.6), n_questions=9),
    )  # fmt: skip
    assert same.spec_hash == pack.spec_hash
    named = [feature.model_copy(update={"name": "n", "effect": 9.0}) for feature in pack.features]
    assert make_pack(features=named).spec_hash == pack.spec_hash
    assert len(pack.spec_hash) == 64


@pytest.mark.parametrize("field, value", [("id", 4), ("weight", 0.75000000001), ("scale", 2.5)])
def test_hash_covers_every_number_of_a_feature(field: str, value: float) -> None:
    first, second = make_pack().features
    changed = make_pack(features=[first.model_copy(update={field: value}), second])
    assert changed.spec_hash != make_pack().spec_hash


def test_hash_covers_a_threshold_and_stays_without_any() -> None:
    first, second = make_pack().features
    changed = [
        make_pack(features=[first.model_copy(update={"activation_threshold": at}), second.model_copy(update=other)])
        for at, other in ((0.5, {}), (0.25, {}), (0.0, {"activation_threshold": 0.5}))
    ]
    assert len({pack.spec_hash for pack in [make_pack(), *changed]}) == 4
    assert changed[0].spec_hash == make_pack(features=list(reversed(changed[0].features))).spec_hash


def test_weighted_sum_by_hand() -> None:
    features = [
        PackFeature(id=3, weight=0.75, scale=2.0, activation_threshold=1.0),
        PackFeature(id=1, weight=-0.25, scale=0.5),
    ]
    acts_NK = torch.tensor([[4.0, 2.0], [0.99, 2.0], [1.0, 0.0], [0.0, 0.0]])
    found = weighted_sum(make_pack(features=features), acts_NK)
    assert found.tolist() == [4 * 0.375 - 2 * 0.5, -1.0, 0.375, 0.0]


def test_weighted_sum_stays_float32_under_autocast() -> None:
    features, acts_NK = [PackFeature(id=3, weight=0.1, scale=1.0)], torch.tensor([[1.2345678]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_sum(make_pack(features=features), acts_NK)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.12345678, rel=1e-6)


@pytest.mark.parametrize("field, value", [("layer", 1), ("weights_hash", "abd")])
def test_hash_covers_the_sae(field: str, value: int | str) -> None:
    sae = make_pack().sae.model_copy(update={field: value})
    assert make_pack(sae=sae).spec_hash != make_pack().spec_hash


def test_hash_covers_the_pooling_and_its_parameters() -> None:
    poolings = ["mean", "max", "last", "last_k", "last_8", "weighted_mean", "step_end", "step_end:."]
    assert len({make_pack(pooling=pooling).spec_hash for pooling in poolings}) == 8


def test_hashes_of_packs_made_before_there_were_parameters() -> None:
    hashes = [make_pack(pooling=pooling).spec_hash[:16] for pooling in ("mean", "max", "last")]
    assert hashes == ["f0865eb465e1f42a", "efbe9def64dcfe22", "1dd29a7c2550d4ce"]


def test_a_pooling_is_kept_with_its_parameters(tmp_path: Path) -> None:
    kept = {"last_k": "last_16", "mean_last_8_tokens": "last_8", "last_1": "last", "step_end": "step_end:\n"}
    for name, spec in kept.items():
        pack = make_pack(pooling=name)
        assert pack.pooling == spec and pack.spec_hash == make_pack(pooling=spec).spec_hash
        save_pack(pack, tmp_path / "pack.json")
        assert load_pack(tmp_path / "pack.json") == pack


BAD = [
    ({"release": "r"}, "^release: extra inputs are not permitted"),
    ({"surprise": 1}, "surprise: extra inputs are not permitted"),
    ({"features": []}, "features: list should have at least 1 item"),
    ({"features": [{"id": 8, "weight": 1.0, "scale": 1.0}]}, "feature id 8 must be less than sae.d_sae = 8"),
    ({"features": [{"id": 2, "weight": 1.0, "scale": 1.0}] * 2}, "feature ids must differ, 2 comes more than once"),
    ({"features": [{"id": -1, "weight": 1.0, "scale": 1.0}]}, r"features.0.id: .*greater than or equal to 0, got -1"),
    ({"features": [{"id": 2, "weight": 1.0, "scale": 0.0}]}, r"features.0.scale: .*greater than 0, got 0.0"),
    ({"features": [{"id": 2, "weight": "1", "scale": 1.0}]}, r"features.0.weight: .*valid number"),
    ({"features": [{"id": 2, "weight": float("nan"), "scale": 1.0}]}, r"features.0.weight: .*finite"),
    ({"features": [{"id": 2, "weight": 1.0, "scale": float("inf")}]}, r"features.0.scale: .*finite"),
    ({"features": [{"id": 2, "weight": 1.0}]}, r"features.0.scale: field required"),
    ({"features": [{"id": 2, "weight": 1.0, "scale": 1.0, "activation_threshold": -0.1}]}, "activation_threshold: .*0"),
    ({"readout": "relu"}, "readout: .*'encode', got 'relu'"),
    ({"prompt": {"format": "no place"}}, r"prompt.format: .*question.*, got 'no place'"),
    ({"reported": {"source": "s", "status": "validated"}}, "reported.status: .*not reproduced', got 'validated'"),
    ({"reported": {"source": "s", "n_questions": 4, "n_correct": 5}}, "n_correct 5 must not be more than .* 4"),
    ({"reported": {"source": "s", "n_correct": 5}}, "n_correct 5 must not be more than n_questions = None"),
    ({"reported": {"n_questions": 4}}, "reported.source: field required"),
    ({"reported": {"source": "s", "spearman_rho": 1.01}}, "reported.spearman_rho: .*1, got 1.01"),
    ({"pooling": "median"}, r"pooling: .*'median' is not one of mean, max, last"),
    ({"pooling": "last_0"}, r"pooling: .*k: 0 is not allowed.*got 'last_0'"),
    ({"pooling": "step_end:"}, r"pooling: .*step_end: is empty"),
    ({"name": ""}, r"name: .*at least 1 character"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_what_is_wrong_in_a_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(make_pack().model_dump(mode="json") | changes))
    with pytest.raises(InputError, match=message) as caught:
        load_pack(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text(make_pack().model_dump_json()[:100])
    with pytest.raises(InputError, match="pack: invalid JSON"):
        load_pack(path)


def test_packs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny/careful", "tiny/careful.gate1", "TEMPLATE/pack"):
        save_pack(make_pack(), tmp_path / "catalogs" / f"{name}.json")
    (tmp_path / "catalogs" / "tiny" / "notes.md").touch()
    monkeypatch.setattr("mechreward.catalogs.package_files", lambda _: tmp_path)
    assert catalog_names() == ["tiny/careful"]
    assert load_pack("tiny/careful") == load_pack("tiny/careful.json") == make_pack()
    with pytest.raises(InputError, match=r"tiny/other is neither a file nor a bundled pack \(bundled: tiny/careful\)"):
        load_pack("tiny/other")


def test_pack_belongs_to_one_sae() -> None:
    sae = identity_sae()
    pack = make_pack(sae=sae_ref(sae))
    check_pack(pack, sae)
    other = SAE("relu", 2 * sae.W_enc_DF, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, sae.meta)
    with pytest.raises(InputError, match="weights_hash"):
        check_pack(pack, other)
    with pytest.raises(InputError, match="sae: pack p was made for an SAE with layer 2, this one has 1"):
        check_pack(pack, identity_sae(layer=1))
    with pytest.raises(InputError, match="d_model 4, this one has 6"):
        check_pack(pack, identity_sae(width=6))


def test_a_pack_without_a_weights_hash_goes_by_the_saes_names() -> None:
    sae = identity_sae()
    pack = make_pack(sae=sae_ref(sae).model_copy(update={"weights_hash": None}))
    check_pack(pack, sae)
    for field, value in (("release", "elsewhere"), ("sae_id", "other")):
        other = replace(sae, meta=replace(sae.meta, **{field: value}))
        with pytest.raises(InputError, match=f"an SAE with {field} ., this one has {value}"):
            check_pack(pack, other)
        check_pack(make_pack(sae=sae_ref(sae)), other)  # with a hash, the names are but names


def test_only_our_own_passed_gate_of_this_very_reward_counts() -> None:
    own = make_pack().spec_hash

    def pack(verdict: Literal["pass", "fail", "inconclusive"], spec_hash: str = own) -> FeaturePack:
        found = PackValidation(
            spec_hash=spec_hash, verdict=verdict, within_auroc=0.7, interval=(0.6, 0.8), n_questions=9
        )
        return make_pack(validation=found)

    assert pack("pass").gate_passed and pack("pass").status == "gate 1: pass"
    assert not pack("fail").gate_passed and pack("inconclusive").status == "gate 1: inconclusive"
    stale = pack("pass", "0" * 64)
    assert not stale.gate_passed and "spec_hash differs" in stale.status
    reported = make_pack(reported=ReportedFigures(source="them", claims={"verdict": "PASS"}))
    assert not reported.gate_passed and reported.status == "reported by its authors, not reproduced"
    assert not make_pack().gate_passed and make_pack().status == "gate 1: not run"
