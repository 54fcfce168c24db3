"""OpenAI's SAEs of GPT-2: one `.pt` file (Gao et al. 2024, arXiv:2406.04093).

Definition (openai/sparse_autoencoder 4965b94, `model.py`)::

    x    = (h - mean) / (std + 1e-5)                   if the activation is TopK; std with Bessel's correction
    pre  = (x - pre_bias) @ encoder.weight.T + latent_bias     encoder.weight [F, D]
    acts = ReLU of the k largest of a token (TopK), or ReLU(pre) (ReLU)
    h'   = (acts @ decoder.weight.T + pre_bias) * std + mean   decoder.weight [D, F]; for TopK, else unscaled

Beside the tensors stand `activation` (a name), `activation_state_dict` (k and what follows TopK) and counters, which
are not needed. The file tells neither model nor place; where it lies does
(``gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt``). Other places than `resid_post_mlp` are refused by name. Tied
weights (no decoder of its own) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, matrix_shape, size, taken, value
from mechreward.sae.formats.metadata import hook_of_layer, part_of_path

COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def convert(path: Path, state: Mapping[str, Any]) -> Parts:
    """Turns the state dictionary of one autoencoder.

    Raises:
        InputError: if it is not what the format defines, or not of the residual stream after a block.
    """
    f, d = matrix_shape(state, "encoder.weight", path)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (f, d),
        "latent_bias": (f,),
        "decoder.weight": (d, f),
        "pre_bias": (d,),
    }
    read = taken(state, shapes, path, ignored=(*COUNTERS, "activation", "activation_state_dict"))
    cfg = {**_activation(state, path), "d_in": d, "d_sae": f, "apply_b_dec_to_input": True, "metadata": _metadata(path)}
    return cfg, {
        "W_enc": read["encoder.weight"].T,
        "b_enc": read["latent_bias"],
        "W_dec": read["decoder.weight"].T,
        "b_dec": read["pre_bias"],
    }


def _activation(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    activation = state.get("activation", "ReLU")
    if activation == "ReLU":
        return {"architecture": "standard", "normalize_activations": "none"}
    if activation != "TopK":
        raise InputError(f"activation: {activation!r} in {path} is not one of TopK, ReLU")
    details = value(state, "activation_state_dict", path, dict)
    if details.get("postact_fn") != "ReLU":
        raise InputError(f"postact_fn: {details.get('postact_fn')!r} in {path} is not 'ReLU'")
    return {"architecture": "topk", "k": size(details, "k", path), "normalize_activations": "layer_norm"}


def _metadata(path: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if place := part_of_path(path, r"^(mlp_post_act|resid_(?:delta|post)_(?:attn|mlp))(?:_v\w+)?$"):
        if place[1] != "resid_post_mlp":
            raise InputError(f"sae: {path} reads {place[1]}, not the output of a block (resid_post_mlp)")
        if number := part_of_path(Path(path.name), r"^(\d+)\.pt$"):
            metadata["hook_name"] = hook_of_layer(int(number[1]))
    if part_of_path(path, r"^gpt2-small$"):
        metadata["model_name"] = "gpt2"
    return metadata
