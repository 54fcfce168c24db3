"""TopK checkpoints of the first mechreward against its own formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import load_sae

D, F, K = 6, 16, 4
NOTES = {"d_model": D, "d_sae": F, "k": K, "model": "Qwen/Qwen3.5-4B", "layer": 18, "algorithm": "topk"}


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {**tensors(), "d_model": D, "d_sae": F, "k": K, "step": 100, **changes}


def write(path: Path, held: dict[str, Any], notes: dict[str, Any] | None = None) -> Path:
    torch.save(held, path)
    if notes is not None:
        path.with_suffix(".json").write_text(json.dumps(notes))
    return path


def formula(w: dict[str, Tensor], h_ND: Tensor) -> tuple[Tensor, Tensor]:
    pre = (h_ND - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    values, chosen = torch.topk(pre, K, dim=-1)
    acts = torch.zeros_like(pre).scatter_(-1, chosen, values).relu()
    return acts, acts @ w["W_dec"] + w["b_dec"]


def test_formula(h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    path = write(tmp_path / "sae_final.pt", checkpoint(), NOTES)
    write(tmp_path / "sae_step50.pt", checkpoint(b_dec=torch.zeros(D)), NOTES)
    for place in (path, tmp_path):
        sae = load_sae(place)
        agrees(sae, *formula(tensors(), h_ND))
    assert (sae.layer, sae.model_name, sae.k) == (18, "Qwen/Qwen3.5-4B", K)
    assert torch.equal(load_sae(tmp_path, "sae_step50.pt").b_dec_D, torch.zeros(D))


def test_layer_is_in_the_notes_or_given(tmp_path: Path) -> None:
    path = write(tmp_path / "sae_final.pt", checkpoint())
    with pytest.raises(InputError, match="layer: .* does not say which decoder block it reads; say it with layer="):
        load_sae(path)
    sae = load_sae(path, layer=3, model_name="m", k=K)
    assert (sae.layer, sae.model_name) == (3, "m")
    write(path, checkpoint(), NOTES)
    with pytest.raises(InputError, match="layer: 3 was given, but .* says 18"):
        load_sae(path, layer=3)


def test_safetensors_with_notes(h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "sae_final.safetensors")
    with pytest.raises(InputError, match="is in no format known here"):
        load_sae(tmp_path / "sae_final.safetensors", layer=0, k=K)
    (tmp_path / "sae_final.json").write_text(json.dumps(NOTES))
    agrees(load_sae(tmp_path / "sae_final.safetensors"), *formula(tensors(), h_ND))


def test_snapshots_of_a_running_training_are_refused(tmp_path: Path) -> None:
    held = checkpoint(optim_state={}, rng_state=torch.get_rng_state(), cuda_rng_state=None, meta={"layer": 18})
    for name in ("sae_resume.pt", "other.pt"):
        with pytest.raises(
            InputError, match=f"{name} is the snapshot of a running training, not an SAE; load sae_final"
        ):
            load_sae(write(tmp_path / name, held))


@pytest.mark.parametrize(
    ("held", "notes", "message"),
    [
        ({"k": F + 1}, None, "k: 17 is not between 1 and the SAE's 16 features"),
        ({"k": 2.0}, None, "k: 2.0 in .* is not a int"),
        ({"d_model": D + 1}, None, "d_model: 7 in .*sae_final.pt, but W_enc in sae_final.pt has 6"),
        ({"d_sae": F + 1}, None, "d_sae: 17 in .*sae_final.pt, but W_enc in sae_final.pt has 16"),
        ({}, {**NOTES, "k": 5}, "k: 4 in .*sae_final.pt, but 5 in .*sae_final.json"),
        ({}, {**NOTES, "d_model": 7}, "d_model: 7 in .*sae_final.json, but W_enc"),
        ({"W_dec": torch.zeros(D, F)}, None, r"W_dec: shape \(6, 16\) in .* is not \(16, 6\)"),
        ({"b_gate": torch.zeros(F)}, None, "'b_gate' in .* does not belong"),
        ({"b_dec": None}, None, "the tensor 'b_dec' is missing"),
        ({"W_enc": torch.full((D, F), torch.nan)}, None, "W_enc_DF: .* NaN or infinity"),
    ],
)
def test_wrong_checkpoints(held: dict[str, Any], notes: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path / "sae_final.pt", checkpoint(**held), notes), layer=18)
