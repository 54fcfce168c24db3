"""Qwen-Scope: one `layer{n}.sae.pt` a block (Qwen team 2026, arXiv:2605.11887).

Definition (the model cards)::

    pre  = h @ W_enc.T + b_enc          W_enc [F, D]; b_dec is not subtracted
    acts = pre for the k largest of a token, else 0
    h'   = acts @ W_dec.T + b_dec       W_dec [D, F]; read after block n

The file holds these four tensors only. Its name tells n; the repository's tells model, width and k
(``SAE-Res-Qwen3-8B-Base-W64K-L0_50``), and so does a folder of that name. Else k has to be given.

Deviation: an activation below zero among the k largest is 0 here, as in sae-lens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, matrix_shape, taken
from mechreward.sae.formats.metadata import hook_of_layer, part_of_path

FILE_PATTERN = r"^layer(\d+)\.sae\.pt$"


def convert(path: Path, state: Mapping[str, Any]) -> Parts:
    """Turns the tensors of `layer{n}.sae.pt`.

    Raises:
        InputError: if they are not what the format defines, or not of the width that the folder's name says.
    """
    f, d = matrix_shape(state, "W_enc", path)
    read = taken(state, {"W_enc": (f, d), "b_enc": (f,), "W_dec": (d, f), "b_dec": (d,)}, path)
    cfg: dict[str, Any] = {"architecture": "topk", "d_in": d, "d_sae": f, "apply_b_dec_to_input": False}
    metadata: dict[str, Any] = {}
    if block := part_of_path(Path(path.name), FILE_PATTERN):
        metadata["hook_name"] = hook_of_layer(int(block[1]))
    if release := part_of_path(path, r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)$"):
        if int(release[2]) * 1024 != f:
            raise InputError(f"sae: {path} has {f} features, but its folder {release[0]} says {release[2]}K")
        metadata["model_name"] = f"Qwen/{release[1]}"
        cfg["k"] = int(release[3])
    tensors = {"W_enc": read["W_enc"].T, "b_enc": read["b_enc"], "W_dec": read["W_dec"].T, "b_dec": read["b_dec"]}
    return {**cfg, "metadata": metadata}, tensors
