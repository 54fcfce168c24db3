"""Gemma Scope 2 files against the release's formula and sae-lens."""

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

D, F = 6, 16
CONFIG = {
    "architecture": "jump_relu",
    "hf_hook_point_in": "model.layers.17.output",
    "model_name": "google/gemma-3-1b-pt",
    "width": F,
    "l0": 20,
}
Parts = dict[str, Tensor]


def tensors() -> Parts:
    g = torch.Generator().manual_seed(0)
    shapes = {"w_enc": (D, F), "b_enc": (F,), "w_dec": (F, D), "b_dec": (D,)}
    made = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
    return {**made, "threshold": torch.rand(F, generator=g) * 0.5}


def write(folder: Path, config: dict[str, Any], held: Parts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(held, folder / "params.safetensors")
    return folder


def test_formula(h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    w = tensors()
    folder = write(tmp_path, CONFIG, w)
    pre = h_ND @ w["w_enc"] + w["b_enc"]
    acts = torch.where(pre > w["threshold"], pre.clamp(min=0), 0.0)
    for path in (folder, folder / "params.safetensors"):
        sae = load_sae(path)
        agrees(sae, acts, acts @ w["w_dec"] + w["b_dec"])
    assert (sae.layer, sae.model_name) == (17, "google/gemma-3-1b-pt")


def test_as_sae_lens(
    h_ND: Tensor, lens_loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sae_lens.loading import pretrained_sae_loaders

    w, inner = tensors(), "resid_post/layer_17_width_16k_l0_small"
    monkeypatch.setattr(
        pretrained_sae_loaders, "get_safetensors_tensor_shapes", lambda *_: {k: list(v.shape) for k, v in w.items()}
    )
    folder = write(tmp_path / inner, {**CONFIG, "model_name": "gemma-v3-1b-pt"}, w)
    lens = lens_loader("gemma_3", tmp_path, "google/gemma-scope-2-1b-pt", inner)
    sae = load_sae(folder)
    torch.testing.assert_close(sae.encode(h_ND), lens.encode(h_ND), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(h_ND)), lens.decode(lens.encode(h_ND)), rtol=1e-6, atol=1e-6)
    assert sae.model_name == lens.cfg.metadata.model_name == "google/gemma-3-1b-pt"
    assert lens.cfg.metadata.hook_name == "blocks.17.hook_resid_post"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma-v3-12b-it", "google/gemma-3-12b-it"),
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-it", "google/gemma-3-270m-it"),
    ],
)
def test_the_model_is_named_as_on_the_hub(written: str, name: str, tmp_path: Path) -> None:
    assert load_sae(write(tmp_path, {**CONFIG, "model_name": written}, tensors())).model_name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output"}, "is a transcoder"),
        ({"affine_connection": True}, "is a transcoder"),
        ({"type": "clt"}, "is a transcoder"),
        ({"architecture": "topk"}, "architecture: 'topk' in .*config.json is not 'jump_relu'"),
        (
            {"hf_hook_point_in": "model.layers.17.self_attn.o_proj.input"},
            "hook_name: .* is not the output of a decoder",
        ),
        ({"hf_hook_point_in": None}, "hf_hook_point_in: None in .*config.json is not a str"),
        ({"width": F + 1}, f"width: {F + 1} in .*config.json, but w_enc has {F} features"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path, {**CONFIG, **changes}, tensors()))


def test_the_same_hook_in_and_out_is_no_transcoder(tmp_path: Path) -> None:
    config = {**CONFIG, "hf_hook_point_out": CONFIG["hf_hook_point_in"], "affine_connection": False, "type": "sae"}
    assert load_sae(write(tmp_path, config, tensors())).layer == 17


def test_wrong_tensors_and_files(tmp_path: Path) -> None:
    w = tensors()
    with pytest.raises(InputError, match="is a transcoder"):
        load_sae(write(tmp_path, CONFIG, {**w, "affine_skip_connection": torch.zeros(D, D)}))
    with pytest.raises(InputError, match="the tensor 'b_dec' is missing in .*params.safetensors"):
        load_sae(write(tmp_path, CONFIG, {name: tensor for name, tensor in w.items() if name != "b_dec"}))
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json; this format holds config.json and params.safetensors"):
        load_sae(tmp_path)
