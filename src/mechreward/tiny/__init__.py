"""The bundled tiny reasoner: a world of word problems with known truth, a model that solves half of them, and its SAE.

Data with loaders: any room may import `world`, `MODEL` and `SAE_FOLDER`; only `build` and what it calls use the rooms.
Made by one seeded script, `python -m mechreward.tiny.build`; the model card stands beside the weights.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "model"
"""An ordinary Hugging Face folder: Llama architecture, fp16 safetensors, its own tokenizer."""
SAE_FOLDER = ASSETS / "sae"
"""A TopK SAE of that model in the SAE Lens directory format."""


def model_path(name: str) -> str:
    """The bundled model's folder for the name `tiny`; any other name as it is."""
    return str(MODEL) if name == "tiny" else name


__all__ = ["ASSETS", "MODEL", "SAE_FOLDER", "model_path"]
