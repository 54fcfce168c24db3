"""Llama Scope folders against OpenMOSS' formula, step by step as its code takes them, and against sae-lens."""

from __future__ import annotations

import json
import math
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
CONFIG: dict[str, Any] = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "d_model": D,
    "d_sae": F,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.2,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 1.3, "out": 1.3},
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": K,
}
Weights = dict[str, Tensor]


def tensors(unit_norm: bool = False) -> Weights:
    g = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    made = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
    if unit_norm:
        made["decoder.weight"] /= made["decoder.weight"].norm(dim=0)
    return made


def write(folder: Path, held: Weights, **changes: Any) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(held, folder / "checkpoints" / "final.safetensors")
    return folder


def formula(w: Weights, config: dict[str, Any], h_ND: Tensor) -> tuple[Tensor, Tensor]:
    """What OpenMOSS' `from_config` and `encode` do, one step after the other; activations times s_in."""
    W_enc, b_enc, W_dec, b_dec = (w[k] for k in ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"))
    s_in = back = torch.ones(1)
    x = h_ND
    if config["norm_activation"] == "dataset-wise":
        norms = config["dataset_average_activation_norm"]
        s_in, s_out = math.sqrt(D) / norms["in"], math.sqrt(D) / norms["out"]
        b_enc, b_dec, W_dec = b_enc / s_in, b_dec / s_out, W_dec * s_in / s_out
    if config["norm_activation"] == "token-wise":
        back = math.sqrt(D) / h_ND.norm(dim=-1, keepdim=True)
        x = h_ND * back
    if config["sparsity_include_decoder_norm"]:
        n = W_dec.norm(dim=0)
        W_dec, W_enc, b_enc = W_dec / n, W_enc * n[:, None], b_enc * n
    if config["apply_decoder_bias_to_pre_encoder"]:
        x = x - b_dec
    pre = x @ W_enc.T + b_enc
    if config["act_fn"] == "relu":
        acts = pre.clamp(min=0)
    elif config["act_fn"] == "topk" and config["jump_relu_threshold"] == 0:
        top = pre.clamp(min=0).topk(config["top_k"], dim=-1)
        acts = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
    else:
        acts = pre.where(pre > config["jump_relu_threshold"], 0)
    return acts * s_in, (acts @ W_dec.T + b_dec) / back


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"dataset_average_activation_norm": {"in": 1.3, "out": 0.7}},
        {"dataset_average_activation_norm": {"in": 1.3, "out": 0.7}, "apply_decoder_bias_to_pre_encoder": True},
        {"sparsity_include_decoder_norm": False},
        {"act_fn": "topk"},
        {"act_fn": "topk", "jump_relu_threshold": 0.0},
        {"act_fn": "topk", "jump_relu_threshold": 0, "sparsity_include_decoder_norm": False},
        {"act_fn": "relu"},
        {"norm_activation": "none"},
        {"norm_activation": "inference"},
        {"norm_activation": "token-wise", "apply_decoder_bias_to_pre_encoder": True},
    ],
)
def test_formula(changes: dict[str, Any], h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    folder = write(tmp_path, tensors(), **changes)
    for path in (folder, folder / "checkpoints" / "final.safetensors"):
        sae = load_sae(path)
        agrees(sae, *formula(tensors(), {**CONFIG, **changes}, h_ND))
    assert (sae.layer, sae.model_name) == (15, "")


def test_as_sae_lens(
    h_ND: Tensor, agrees: Callable[..., None], lens_loader: Callable[..., Any], tmp_path: Path
) -> None:
    name = "Llama3_1-8B-Base-L15R-8x"
    folder = write(tmp_path / name, tensors(unit_norm=True))
    lens = lens_loader("llama_scope", tmp_path, "fnlp/Llama3_1-8B-Base-LXR-8x", name, dtype="float32")
    # What its `from_pretrained` does with the norm_scaling_factor of its list of releases.
    lens.fold_activation_norm_scaling_factor(math.sqrt(D) / 1.3)
    sae = load_sae(folder)
    agrees(sae, lens.encode(h_ND), lens.decode(lens.encode(h_ND)))
    assert (sae.hook_name, sae.model_name) == (lens.cfg.metadata.hook_name, lens.cfg.metadata.model_name)


def test_a_feature_whose_decoder_is_zero_stays_silent(tmp_path: Path) -> None:
    held = tensors()
    held["decoder.weight"][:, 3] = 0
    held["encoder.bias"][3] = 100
    assert load_sae(write(tmp_path, held)).encode(torch.zeros(1, D))[0, 3] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "is a transcoder"),
        ({"hook_point_in": "blocks.15.hook_mlp_out", "hook_point_out": None}, "hook_name: 'blocks.15.hook_mlp_out'"),
        ({"norm_activation": "batch-wise"}, "norm_activation: 'batch-wise' in .* is not one of none, inference"),
        ({"use_glu_encoder": True}, "has a GLU encoder"),
        ({"act_fn": "gelu"}, "act_fn: 'gelu' in .* is not one of jumprelu, topk, relu"),
        ({"jump_relu_threshold": -0.1}, "jump_relu_threshold: -0.1 in .* is not a number of at least 0"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold: None"),
        ({"dataset_average_activation_norm": {"in": 1.3}}, "has no positive number 'out'"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "has no positive number 'in'"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm: None in .* is not a dict"),
        ({"apply_decoder_bias_to_pre_encoder": None}, "apply_decoder_bias_to_pre_encoder: None in .* is not a bool"),
        ({"act_fn": "topk", "jump_relu_threshold": 0, "top_k": 17}, "k: 17 is not between 1"),
        ({"d_model": D + 1}, r"encoder.weight: shape \(16, 6\) in .* is not \(16, 7\)"),
        ({"d_sae": 0}, "d_sae: 0 in .* is not a whole number of at least 1"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path, tensors(), **changes))


def test_wrong_tensors_and_files(tmp_path: Path) -> None:
    w = tensors()
    cases = {
        "the tensor 'decoder.bias' is missing": {name: tensor for name, tensor in w.items() if name != "decoder.bias"},
        "'threshold' in .* does not belong": {**w, "threshold": torch.zeros(F)},
        r"decoder.weight: shape \(16, 6\) in .* is not \(6, 16\)": {
            **w,
            "decoder.weight": w["decoder.weight"].T.contiguous(),
        },
        "W_enc_DF: .* NaN or infinity": {**w, "encoder.weight": w["encoder.weight"] / 0},
    }
    for message, held in cases.items():
        with pytest.raises(InputError, match=message):
            load_sae(write(tmp_path, held))
    (tmp_path / "checkpoints" / "final.safetensors").unlink()
    with pytest.raises(InputError, match="has no checkpoints/final.safetensors"):
        load_sae(tmp_path)
