"""SAE Lens' folder: `cfg.json` and `sae_weights.safetensors`. The canonical format; `sae.io` writes it.

Definition: sae-lens 6.54, `saes/sae.py`. Nothing is converted; `sae.io.sae_from_parts` judges what it says. Folders
older than version 6 have no `metadata`: what it would hold stands beside the other keys, in the oldest under other
names (`hook_point`), and there an SAE that does not say its architecture is a standard one. Some have a tensor
`scaling_factor` of ones, which says nothing, and `normalize_activations` as true, false or null (sae-lens 6.54,
`loading/pretrained_sae_loaders.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechreward.sae.formats.files import Parts, read_config, read_safetensors, require_files

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
BEFORE_6 = {
    "hook_point": "hook_name",
    "hook_name": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_head_index": "hook_head_index",
    "model_name": "model_name",
    "model_from_pretrained_kwargs": "model_from_pretrained_kwargs",
}
"""Keys beside which there is no `metadata`, and their names in it. The hook's layer is in its name already."""


def convert(folder: Path) -> Parts:
    """Reads the two files as they are.

    Raises:
        InputError: if one is missing or damaged.
    """
    require_files(folder, CONFIG, WEIGHTS)
    cfg, tensors = read_config(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    return (cfg, tensors) if "metadata" in cfg else (_cfg_before_6(cfg), _tensors_before_6(tensors))


def _cfg_before_6(cfg: dict[str, Any]) -> dict[str, Any]:
    metadata = {name: cfg[key] for key, name in BEFORE_6.items() if key in cfg}
    norm = cfg.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    return {"architecture": "standard", **cfg, "normalize_activations": norm, "metadata": metadata}


def _tensors_before_6(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    scale = tensors.get("scaling_factor")
    if scale is None or not torch.allclose(scale, torch.ones_like(scale)):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}
