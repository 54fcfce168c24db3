"""The build script makes every asset, and the bundled ones are what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechreward.files import read_json
from mechreward.models import load_model
from mechreward.sae import load_sae
from mechreward.tiny import ASSETS, MODEL, SAE_FOLDER
from mechreward.tiny import build as script
from mechreward.tiny.build import build, build_sae
from mechreward.tiny.card import model_card
from mechreward.tiny.measure import positions
from mechreward.tiny.training import SMALL


@pytest.mark.slow
def test_small_build_makes_every_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens")
    made = []
    monkeypatch.setattr(script, "SMALL", replace(SMALL, steps=100))
    monkeypatch.setattr(script, "build_sae", lambda *given: made.append(build_sae(*given)) or made[-1])
    measurements = build(tmp_path, small=True)
    assert measurements["training"]["loss"] < 2.5  # from log(200) = 5.3: it has learnt the format
    loaded, sae = load_model(str(tmp_path / "model")), load_sae(tmp_path / "sae")
    assert loaded.model.config.hidden_size == sae.d_model == 64
    assert sae.meta.layer == 1
    assert measurements["sae"]["fvu"] < 0.5
    assert (tmp_path / "README.md").read_text() == model_card(measurements)
    # Built again into the same folder, the model is not trained again.
    monkeypatch.setattr(script, "train_model", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(script, "build_sae", lambda *_: made[0])
    assert build(tmp_path, small=True)["training"] == measurements["training"]


def test_bundled_assets_are_what_was_asked_for() -> None:
    measured = read_json(ASSETS / "measurements.json")
    assert (ASSETS / "README.md").read_text() == model_card(measured)
    for setting, (low, high) in {"easy": (0.4, 0.6), "long": (0.05, 0.2)}.items():
        numbers = measured[setting]
        assert low <= numbers["accuracy"] <= high
        assert numbers["follows_a_strategy"] >= 0.95
        best = numbers["probes"][numbers["best_probe"]]
        assert best >= 0.8
        assert best >= max(numbers["baselines"].values()) + 0.15
    assert measured["easy"]["mixed_questions"] >= 0.8
    sae = measured["sae"]
    assert sae["d_sae"] >= 8 * 128
    assert (sae["fvu"] <= 0.1, sae["dead_share"] <= 0.1) == (True, True)


def test_bundled_files_are_small_and_safe() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_bundled_model_and_sae_belong_together() -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    assert loaded.model.config.architectures == ["LlamaForCausalLM"]
    assert sae.d_model == loaded.model.config.hidden_size
    with torch.no_grad():
        ids = loaded.tokenizer("Ada has 20 apples . how many apples does Ada have ?", return_tensors="pt")
        h_BTD = loaded.model(**ids, output_hidden_states=True).hidden_states[sae.meta.layer + 1]
    assert sae.fvu(h_BTD[0, 1:]) < 0.3


def test_positions_in_a_chain() -> None:
    pieces = ["▁buys", "▁5", "▁:", "▁2", "0", "▁+", "▁5", "▁=", "▁2", "5", "▁.", "▁####", "▁2", "5", "</s>"]
    everywhere = list(range(15))
    assert positions(pieces) == {
        "all tokens": everywhere,
        "before operator": [4],
        "operator": [5],
        "result": [9],
        "step end": [10],
    }
    assert positions(["▁####", "▁2"])["operator"] == [0, 1]
