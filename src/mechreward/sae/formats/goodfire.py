"""Goodfire's SAEs of Llama 3: one `.pt` or `.pth` file (Balsam et al. 2025).

Definition (the model cards)::

    acts = ReLU(encoder_linear(h))      encoder_linear.weight [F, D]; the decoder's bias is not subtracted
    h'   = decoder_linear(acts)         decoder_linear.weight [D, F]

The file holds these four tensors only; its name tells model and layer (``Llama-3.1-8B-Instruct-SAE-l19.pth``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechreward.sae.formats.files import Parts, matrix_shape, taken
from mechreward.sae.formats.metadata import hook_of_layer, part_of_path


def convert(path: Path, state: Mapping[str, Any]) -> Parts:
    """Turns the tensors of one file.

    Raises:
        InputError: if they are not what the format defines.
    """
    f, d = matrix_shape(state, "encoder_linear.weight", path)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_linear.weight": (f, d),
        "encoder_linear.bias": (f,),
        "decoder_linear.weight": (d, f),
        "decoder_linear.bias": (d,),
    }
    read = taken(state, shapes, path)
    metadata = {}
    if named := part_of_path(Path(path.name), r"^(.+)-SAE-l(\d+)\.pth?$"):
        metadata["hook_name"] = hook_of_layer(int(named[2]))
        metadata["model_name"] = f"meta-llama/{named[1]}" if named[1].startswith("Llama-3") else named[1]
    cfg = {"architecture": "standard", "d_in": d, "d_sae": f, "apply_b_dec_to_input": False, "metadata": metadata}
    return cfg, {
        "W_enc": read["encoder_linear.weight"].T,
        "b_enc": read["encoder_linear.bias"],
        "W_dec": read["decoder_linear.weight"].T,
        "b_dec": read["decoder_linear.bias"],
    }
