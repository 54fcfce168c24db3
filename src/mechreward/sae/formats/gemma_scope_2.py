"""Gemma Scope 2: `config.json` and `params.safetensors` (SAEs of Gemma 3, Google DeepMind 2025).

Definition: JumpReLU as in Gemma Scope (see `gemma_scope`), with the same tensors. `config.json` has `architecture`
("jump_relu"), `hf_hook_point_in` (``model.layers.17.output`` is the output of block 17), `model_name`, `width`, and for
transcoders `hf_hook_point_out` and `affine_connection`. Transcoders and cross-layer transcoders are refused: they do
not rebuild what they read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, matrix_shape, read_config, read_safetensors, require_files, taken, value
from mechreward.sae.formats.gemma_scope import NAMES

CONFIG, WEIGHTS = "config.json", "params.safetensors"
SKIP = "affine_skip_connection"


def convert(folder: Path) -> Parts:
    """Reads the folder of one SAE.

    Raises:
        InputError: if a file is missing or damaged, the two do not agree, or it is a transcoder.
    """
    require_files(folder, CONFIG, WEIGHTS)
    source = folder / CONFIG
    config, tensors = read_config(source), read_safetensors(folder / WEIGHTS)
    _refuse_others(config, tensors, source)
    d, f = matrix_shape(tensors, "w_enc", folder / WEIGHTS)
    if config.get("width", f) != f:
        raise InputError(f"width: {config['width']} in {source}, but w_enc has {f} features")
    shapes = {"w_enc": (d, f), "b_enc": (f,), "w_dec": (f, d), "b_dec": (d,), "threshold": (f,)}
    read = taken(tensors, shapes, folder / WEIGHTS)
    metadata = {"hook_name": value(config, "hf_hook_point_in", source, str).removesuffix(".output")}
    if config.get("model_name"):
        metadata["model_name"] = _model(value(config, "model_name", source, str))
    cfg = {"architecture": "jumprelu", "d_in": d, "d_sae": f, "apply_b_dec_to_input": False, "metadata": metadata}
    return cfg, {NAMES[name]: tensor for name, tensor in read.items()}


def _refuse_others(config: Mapping[str, Any], tensors: Collection[str], source: Path) -> None:
    if value(config, "architecture", source, str) != "jump_relu":
        raise InputError(f"architecture: {config['architecture']!r} in {source} is not 'jump_relu'")
    hook_in = value(config, "hf_hook_point_in", source, str)
    if (
        config.get("type", "sae") != "sae"
        or config.get("affine_connection")
        or (config.get("hf_hook_point_out") or hook_in) != hook_in
        or SKIP in tensors
    ):
        raise InputError(
            f"sae: {source.parent} is a transcoder; it does not rebuild what it reads, so it cannot be used"
        )


def _model(name: str) -> str:
    # Some files write gemma-v3-... and leave the owner out.
    name = name.replace("gemma-v3", "gemma-3")
    # Of this size alone the hub calls the pretrained model by no suffix.
    name = name.replace("gemma-3-270m-pt", "gemma-3-270m")
    return name if "/" in name else f"google/{name}"
