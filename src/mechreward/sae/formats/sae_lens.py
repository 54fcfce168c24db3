"""SAE Lens' folder: `cfg.json` and `sae_weights.safetensors`. The canonical format; `sae.io` writes it.

Definition: sae-lens 6.54, `saes/sae.py`. Nothing is converted; `sae.io.sae_from_parts` judges what it says.
"""

from __future__ import annotations

from pathlib import Path

from mechreward.sae.formats.files import Parts, read_config, read_safetensors, require_files

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def convert(folder: Path) -> Parts:
    """Reads the two files as they are.

    Raises:
        InputError: if one is missing or damaged.
    """
    require_files(folder, CONFIG, WEIGHTS)
    return read_config(folder / CONFIG), read_safetensors(folder / WEIGHTS)
