"""The TopK SAEs of the `mechreward` that this library grew from: `sae_final.pt` and `sae_final.json`.

Definition (OpenInterpretability/mechreward, `sae/topk_sae.py`, `scripts/train_sae_qwen35.py`)::

    pre  = (h - b_dec) @ W_enc + b_enc      W_enc [D, F]
    acts = ReLU of the k largest of a token, else 0
    h'   = acts @ W_dec + b_dec             W_dec [F, D], its rows not quite of norm 1; no rescaling

The `.pt` file holds the four tensors and the numbers d_model, d_sae, k and step; the `.json` beside it has model and
layer, which are in no other place. A safetensors file of the four tensors is read the same way, its numbers then stand
in the `.json` (or k is given). `sae_resume.pt`, the snapshot of a running training, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, matrix_shape, read_config, size, taken
from mechreward.sae.formats.metadata import hook_of_layer

NUMBERS = ("d_model", "d_sae", "k", "step")
SNAPSHOT = ("optim_state", "scheduler_state", "rng_state")


def convert(path: Path, state: Mapping[str, Any]) -> Parts:
    """Turns one checkpoint.

    Raises:
        InputError: if it is the snapshot of a running training, or tensors and numbers do not agree.
    """
    if any(name in state for name in SNAPSHOT):
        raise InputError(
            f"sae: {path} is the snapshot of a running training, not an SAE; load sae_final.pt or sae_step*.pt"
        )
    beside = path.with_suffix(".json")
    notes = read_config(beside) if beside.is_file() else {}
    d, f = matrix_shape(state, "W_enc", path)
    read = taken(state, {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}, path, ignored=NUMBERS)
    numbers: Mapping[str, Any] = {name: found for name, found in state.items() if not isinstance(found, Tensor)}
    for source, said in ((path, numbers), (beside, notes)):
        for name, found in (("d_model", d), ("d_sae", f)):
            if said.get(name, found) != found:
                raise InputError(f"{name}: {said[name]} in {source}, but W_enc in {path.name} has {found}")
    cfg: dict[str, Any] = {"architecture": "topk", "d_in": d, "d_sae": f, "apply_b_dec_to_input": True}
    ks = {size(said, "k", source) for source, said in ((path, numbers), (beside, notes)) if "k" in said}
    if len(ks) > 1:
        raise InputError(f"k: {numbers['k']} in {path}, but {notes['k']} in {beside}")
    if ks:
        cfg["k"] = ks.pop()
    return {**cfg, "metadata": _metadata(notes)}, read


def _metadata(notes: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if isinstance(notes.get("layer"), int):
        metadata["hook_name"] = hook_of_layer(notes["layer"])
    if isinstance(notes.get("model"), str):
        metadata["model_name"] = notes["model"]
    return metadata
