"""sparsify (EleutherAI): a folder a hook point with `cfg.json` and `sae.safetensors`.

Definition (eai-sparsify 1.3, `sparse_coder.py`, `fused_encoder.py`)::

    pre  = ReLU((h - b_dec) @ encoder.weight.T + encoder.bias)     encoder.weight [F, D]; b_dec is always subtracted
    acts = the k largest of a token, else 0
    h'   = acts @ W_dec + b_dec                                    W_dec [F, D]: not transposed

F is `num_latents`, or `d_in * expansion_factor` where that is 0. The folder's name is the hook point (``layers.5``),
the model stands in the `config.json` one level up. Refused by name: transcoders, skip connections, groupmax, and the
signed TopK of old files.

Deviation from sae-lens 6.54, whose loader transposes `W_dec` and does not subtract `b_dec` by default: we follow
sparsify.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, read_config, read_safetensors, require_files, size, taken
from mechreward.sae.formats.metadata import part_of_path

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
REFUSED = ("transcode", "skip_connection", "signed")


def convert(folder: Path) -> Parts:
    """Reads the folder of one hook point.

    Raises:
        InputError: if a file is missing or damaged, the two do not agree, or it is of a kind that is not supported.
    """
    require_files(folder, CONFIG, WEIGHTS)
    source = folder / CONFIG
    config = read_config(source)
    _refuse_others(config, source)
    d = size(config, "d_in", source)
    f = (
        size(config, "num_latents", source)
        if config.get("num_latents")
        else d * size(config, "expansion_factor", source)
    )
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (f, d),
        "encoder.bias": (f,),
        "W_dec": (f, d),
        "b_dec": (d,),
    }
    read = taken(read_safetensors(folder / WEIGHTS), shapes, folder / WEIGHTS)
    cfg = {
        "architecture": "topk",
        "d_in": d,
        "d_sae": f,
        "k": size(config, "k", source),
        "apply_b_dec_to_input": True,
        "metadata": _metadata(folder),
    }
    return cfg, {
        "W_enc": read["encoder.weight"].T,
        "b_enc": read["encoder.bias"],
        "W_dec": read["W_dec"],
        "b_dec": read["b_dec"],
    }


def _refuse_others(config: Mapping[str, Any], source: Path) -> None:
    for key in REFUSED:
        if config.get(key):
            raise InputError(f"{key}: {config[key]!r} in {source} is not supported; only plain TopK SAEs are")
    if config.get("activation", "topk") != "topk":
        raise InputError(f"activation: {config['activation']!r} in {source} is not 'topk'")


def _metadata(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if hook := part_of_path(Path(folder.absolute().name), r"^(?:[\w.]+\.)?(?:layers|h)\.\d+(?:\..+)?$|^embed_tokens$"):
        metadata["hook_name"] = hook[0]
    run = folder.absolute().parent / "config.json"
    if run.is_file() and isinstance(model := read_config(run).get("model"), str):
        metadata["model_name"] = model
    return metadata
