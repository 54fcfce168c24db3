"""sparsify folders against its own formula. sae-lens' loader of them is wrong (see `formats/sparsify.py`)."""

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

D, F, K = 6, 12, 4
CONFIG = {
    "activation": "topk",
    "expansion_factor": 2,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}


def write(folder: Path, held: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors() if held is None else held, folder / "sae.safetensors")
    return folder


def formula(w: dict[str, Tensor], h_ND: Tensor) -> tuple[Tensor, Tensor]:
    pre = ((h_ND - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    top = pre.topk(K, dim=-1)
    acts = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
    rebuilt = (top.values.unsqueeze(-1) * w["W_dec"][top.indices]).sum(-2)
    return acts, rebuilt + w["b_dec"]


@pytest.mark.parametrize("changes", [{}, {"num_latents": F, "expansion_factor": 32}, {"normalize_decoder": False}])
def test_formula(changes: dict[str, Any], h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    folder = write(tmp_path / "layers.5", **changes)
    (tmp_path / "config.json").write_text(json.dumps({"model": "lab/model"}))
    for path in (folder, folder / "sae.safetensors"):
        sae = load_sae(path)
        agrees(sae, *formula(tensors(), h_ND))
    assert (sae.k, sae.layer, sae.model_name, sae.hook_name) == (K, 5, "lab/model", "layers.5")


def test_hook_points_by_sae_id(tmp_path: Path) -> None:
    write(tmp_path / "h.3")
    write(tmp_path / "layers.4.mlp")
    assert load_sae(tmp_path, "h.3").layer == 3
    with pytest.raises(InputError, match="hook_name: 'layers.4.mlp' is not the output of a decoder block"):
        load_sae(tmp_path, "layers.4.mlp", layer=4)
    with pytest.raises(InputError, match="hook_name: 'embed_tokens'"):
        load_sae(write(tmp_path / "embed_tokens"))
    with pytest.raises(InputError, match="layer: .* does not say which decoder block"):
        load_sae(write(tmp_path / "mine"))
    assert load_sae(tmp_path / "mine", layer=1).hook_name == "blocks.1.hook_resid_post"


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    held = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    sae = load_sae(write(tmp_path / "layers.0", held))
    assert torch.equal(sae.W_dec_FD, held["W_dec"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "transcode: True in .*cfg.json is not supported"),
        ({"skip_connection": True}, "skip_connection: True"),
        ({"signed": True}, "signed: True"),
        ({"activation": "groupmax"}, "activation: 'groupmax' in .*cfg.json is not 'topk'"),
        ({"k": F + 1}, "k: 13 is not between 1 and the SAE's 12 features"),
        ({"k": "4"}, "k: '4' in .*cfg.json is not a int"),
        ({"num_latents": F + 1}, r"encoder.weight: shape \(12, 6\) in .* is not \(13, 6\)"),
        ({"d_in": D + 1}, r"encoder.weight: shape \(12, 6\) in .* is not \(14, 7\)"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path / "layers.5", **changes))


def test_wrong_tensors_and_files(tmp_path: Path) -> None:
    w = tensors()
    cases = {
        "the tensor 'W_dec' is missing": {name: tensor for name, tensor in w.items() if name != "W_dec"},
        "'W_skip' in .* does not belong": {**w, "W_skip": torch.zeros(D, D)},
        r"W_dec: shape \(6, 12\) in .* is not \(12, 6\)": {**w, "W_dec": w["W_dec"].T.contiguous()},
        "b_enc_F: .* NaN or infinity": {**w, "encoder.bias": torch.full((F,), torch.nan)},
    }
    folder = tmp_path / "layers.5"
    for message, held in cases.items():
        with pytest.raises(InputError, match=message):
            load_sae(write(folder, held))
    (folder / "cfg.json").write_text(json.dumps({"d_in": D}))
    with pytest.raises(InputError, match="expansion_factor: .*cfg.json lacks this key"):
        load_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(InputError, match="has no cfg.json; this format holds cfg.json and sae.safetensors"):
        load_sae(folder)
