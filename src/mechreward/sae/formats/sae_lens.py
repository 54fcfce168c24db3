"""SAE Lens' folder: `cfg.json` and `sae_weights.safetensors`. The canonical format; `sae.io` writes it.

Definition: sae-lens 6.54, `saes/sae.py`. Nothing is converted; `sae.io.sae_from_parts` judges what it says. Folders
older than version 6 have no `metadata`: what it would hold stands beside the other keys, in the oldest under other
names (`hook_point`), and there an SAE that does not say its architecture is a standard one (sae-lens 6.54,
`loading/pretrained_sae_loaders.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    return _with_metadata(read_config(folder / CONFIG)), read_safetensors(folder / WEIGHTS)


def _with_metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    if "metadata" in cfg:
        return cfg
    metadata = {name: cfg[key] for key, name in BEFORE_6.items() if key in cfg}
    return {"architecture": "standard", **cfg, "metadata": metadata}
