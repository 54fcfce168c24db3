"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors` (He et al. 2024, arXiv:2410.20526).

Definition (OpenMOSS Language-Model-SAEs 7bfb3f14, `sae.py`: `from_config`, `encode`), for residuals as they are::

    s_in, s_out = sqrt(D) / dataset_average_activation_norm[in, out]     if norm_activation is "dataset-wise"
    W_dec = decoder.weight * s_in / s_out;  b_dec = decoder.bias / s_out;  b_enc = encoder.bias / s_in
    n_f   = ||W_dec_f||, to give each feature's decoder norm 1           if sparsity_include_decoder_norm
    pre   = ((h - b_dec) @ encoder.weight.T + b_enc) * n                 b_dec if apply_decoder_bias_to_pre_encoder
    acts  = pre where pre > jump_relu_threshold, else 0                  one threshold for all features; act_fn jumprelu
    h'    = acts @ (W_dec / n) + b_dec

"topk" with a threshold above 0 is read as jumprelu, without one as TopK (`top_k`), "relu" as such. "token-wise" scales
each residual to norm sqrt(D) first, and s_in = s_out = 1. "batch-wise", GLU encoders and transcoders are refused.

Deviation: activations are s_in times these, and W_dec is divided by s_in, so that they are in the units of normalised
residuals, which are sae-lens' units; which features are active and what is rebuilt does not change. sae-lens leaves n
out, so the two agree only where the decoder's columns have norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, read_config, read_safetensors, require_files, size, taken, value
from mechreward.sae.formats.metadata import part_of_path

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NORMS = {
    "none": "none",
    "inference": "none",
    "dataset-wise": "none",  # folded into the weights
    "token-wise": "constant_norm_rescale",
}


def convert(folder: Path) -> Parts:
    """Reads the folder of one SAE.

    Raises:
        InputError: if a file is missing or damaged, the two do not agree, or it is of a kind that is not supported.
    """
    require_files(folder, CONFIG, WEIGHTS)
    source = folder / CONFIG
    config = read_config(source)
    _refuse_others(config, source)
    d, f = size(config, "d_model", source), size(config, "d_sae", source)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (f, d),
        "encoder.bias": (f,),
        "decoder.weight": (d, f),
        "decoder.bias": (d,),
    }
    read = taken(read_safetensors(folder / WEIGHTS), shapes, folder / WEIGHTS)
    s_in, s_out = _scales(config, d, source)
    activation, threshold = _activation(config, source)
    tensors = _folded(read, s_in, s_out, value(config, "sparsity_include_decoder_norm", source, bool))
    if threshold is not None:
        tensors["threshold"] = tensors["b_enc"].new_full((f,), threshold * s_in)
    metadata = {"hook_name": value(config, "hook_point_in", source, str)}
    if part_of_path(folder, r"^Llama3_1-8B-Base-L\w+-\d+x$"):
        metadata["model_name"] = "meta-llama/Llama-3.1-8B"
    cfg = {
        **activation,
        "d_in": d,
        "d_sae": f,
        "apply_b_dec_to_input": value(config, "apply_decoder_bias_to_pre_encoder", source, bool),
        "normalize_activations": NORMS[config["norm_activation"]],
        "metadata": metadata,
    }
    return cfg, tensors


def _refuse_others(config: Mapping[str, Any], source: Path) -> None:
    if value(config, "norm_activation", source, str) not in NORMS:
        raise InputError(f"norm_activation: {config['norm_activation']!r} in {source} is not one of {', '.join(NORMS)}")
    if config.get("use_glu_encoder"):
        raise InputError(f"use_glu_encoder: {source} has a GLU encoder, which is not supported")
    hook_in = value(config, "hook_point_in", source, str)
    if (config.get("hook_point_out") or hook_in) != hook_in:
        raise InputError(f"sae: {source.parent} is a transcoder ({hook_in} to {config['hook_point_out']})")


def _activation(config: Mapping[str, Any], source: Path) -> tuple[dict[str, Any], float | None]:
    """Architecture, with k where there is one, and the threshold where there is one."""
    name = value(config, "act_fn", source, str).lower()
    if name == "relu":
        return {"architecture": "standard"}, None
    if name not in ("topk", "jumprelu"):
        raise InputError(f"act_fn: {config['act_fn']!r} in {source} is not one of jumprelu, topk, relu")
    threshold = value(config, "jump_relu_threshold", source)
    if not (isinstance(threshold, int | float) and 0 <= threshold < math.inf):
        raise InputError(f"jump_relu_threshold: {threshold!r} in {source} is not a number of at least 0")
    if name == "topk" and threshold == 0:
        return {"architecture": "topk", "k": size(config, "top_k", source)}, None
    return {"architecture": "jumprelu"}, float(threshold)


def _scales(config: Mapping[str, Any], d: int, source: Path) -> tuple[float, float]:
    if config["norm_activation"] != "dataset-wise":
        return 1.0, 1.0
    norms = value(config, "dataset_average_activation_norm", source, dict)
    for key in ("in", "out"):
        if not (isinstance(norms.get(key), int | float) and 0 < norms[key] < math.inf):
            raise InputError(f"dataset_average_activation_norm: {norms!r} in {source} has no positive number {key!r}")
    return math.sqrt(d) / norms["in"], math.sqrt(d) / norms["out"]


def _folded(read: Mapping[str, Tensor], s_in: float, s_out: float, by_norm: bool) -> dict[str, Tensor]:
    W_dec_FD = read["decoder.weight"].T * (s_in / s_out)
    norm_F1 = W_dec_FD.norm(dim=-1, keepdim=True) if by_norm else W_dec_FD.new_ones(len(W_dec_FD), 1)
    # A feature whose decoder is 0 rebuilds nothing; keep 0 / 0 from spoiling the rest.
    norm_F1 = norm_F1.clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "W_enc": (read["encoder.weight"] * norm_F1 * s_in).T,
        "b_enc": read["encoder.bias"] * norm_F1[:, 0],
        "W_dec": W_dec_FD / (norm_F1 * s_in),
        "b_dec": read["decoder.bias"] / s_out,
    }
