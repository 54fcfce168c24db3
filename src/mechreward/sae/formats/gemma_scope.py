"""Gemma Scope: `params.npz` (Lieberum et al. 2024, arXiv:2408.05147).

Definition (the release's tutorial)::

    pre  = h @ w_enc + b_enc            w_enc [D, F]; b_dec is not subtracted
    acts = pre where pre > threshold, else 0, and never below 0
    h'   = acts @ w_dec + b_dec         w_dec [F, D]

Names come in either case. The file says neither layer nor model; the folders of the release do
(``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``). SAEs of attention, MLP and embeddings and transcoders are
refused where a folder names them. Without such folders the file is taken for one of the residual stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, matrix_shape, read_npz, taken
from mechreward.sae.formats.metadata import hook_of_layer, part_of_path

FILE = "params.npz"
NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}


def convert(path: Path) -> Parts:
    """Reads `params.npz`, given by its own path or by its folder's.

    Raises:
        InputError: if it is damaged, does not hold what the format defines, or is not of the residual stream.
    """
    file = path / FILE if path.is_dir() else path
    metadata = _metadata(file)
    arrays = read_npz(file)
    tensors = {name.lower(): tensor for name, tensor in arrays.items()}
    if len(tensors) != len(arrays):
        raise InputError(f"sae: {file} holds two arrays whose names differ in case only")
    d, f = matrix_shape(tensors, "w_enc", file)
    shapes = {"w_enc": (d, f), "b_enc": (f,), "w_dec": (f, d), "b_dec": (d,), "threshold": (f,)}
    read = taken(tensors, shapes, file)
    cfg = {"architecture": "jumprelu", "d_in": d, "d_sae": f, "apply_b_dec_to_input": False, "metadata": metadata}
    return cfg, {NAMES[name]: tensor for name, tensor in read.items()}


def _metadata(file: Path) -> dict[str, Any]:
    release = part_of_path(file, r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)")
    if release and release[3] != "res":
        raise InputError(f"sae: {release[0]} reads {release[3]}, not the residual stream (-res), so it cannot be used")
    if part_of_path(file, r"^embedding$"):
        raise InputError(f"sae: {file} reads the embeddings, not the output of a decoder block")
    metadata: dict[str, Any] = {}
    if layer := part_of_path(file, r"^layer_(\d+)$"):
        metadata["hook_name"] = hook_of_layer(int(layer[1]))
    if release:
        metadata["model_name"] = f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"
    return metadata
