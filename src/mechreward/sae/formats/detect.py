"""Finds the format of an SAE on disk: a folder by the files it holds, a torch file by the names it holds.

What is found is decided by one thing that no other format has, and then read strictly: a folder with
`sae.safetensors` is sparsify's even if its `cfg.json` is missing, and the sentence says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mechreward.errors import InputError
from mechreward.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    sae_lens,
    seed_topk,
    sparsify,
)
from mechreward.sae.formats.files import Parts, read_safetensors, read_torch

LOOKED_FOR = (
    "cfg.json + sae_weights.safetensors (SAE Lens)",
    "params.npz (Gemma Scope)",
    "config.json + params.safetensors (Gemma Scope 2)",
    "hyperparams.json + checkpoints/final.safetensors (Llama Scope)",
    "layer{n}.sae.pt (Qwen-Scope)",
    "cfg.json + sae.safetensors (sparsify)",
    "config.json + ae.pt (dictionary_learning)",
    "one .pt or .pth file (OpenAI, Goodfire)",
    "sae_final.pt + sae_final.json (TopK SAEs of the first mechreward)",
)
TORCH_SUFFIXES = (".pt", ".pth")
CANONICAL = {"W_enc", "b_enc", "W_dec", "b_dec"}


@dataclass(frozen=True)
class Found:
    """An SAE on disk."""

    name: str
    """Name of the format."""
    path: Path
    """The file or folder that holds it."""
    read: Callable[[], Parts]
    """Reads it; raises InputError as the format's `convert`."""


def find_format(path: Path, layer: int | None = None) -> Found:
    """Finds which format a file or folder is in.

    Args:
        path: a folder of one SAE, one of its files, or a folder of `layer{n}.sae.pt`.
        layer: chooses among the latter.

    Raises:
        InputError: if there is nothing, nothing known (it lists what was looked for), or several SAEs to choose from.
    """
    if path.is_dir():
        return _folder(path, layer)
    if not path.is_file():
        raise InputError(f"sae: there is no file or folder {path}")
    if path.suffix == ".npz":
        return Found("Gemma Scope", path, partial(gemma_scope.convert, path))
    if path.suffix in TORCH_SUFFIXES:
        return _torch_file(path)
    if path.suffix == ".safetensors":
        return _safetensors_file(path)
    raise _unknown(path)


def _folder(path: Path, layer: int | None) -> Found:
    known: tuple[tuple[str, Collection[str], Callable[[Path], Parts]], ...] = (
        ("sparsify", (sparsify.WEIGHTS,), sparsify.convert),
        ("SAE Lens", (sae_lens.CONFIG, sae_lens.WEIGHTS), sae_lens.convert),
        ("Gemma Scope", (gemma_scope.FILE,), gemma_scope.convert),
        ("Gemma Scope 2", (gemma_scope_2.WEIGHTS,), gemma_scope_2.convert),
        ("Llama Scope", (llama_scope.CONFIG,), llama_scope.convert),
    )
    for name, signs, convert in known:
        if any((path / sign).is_file() for sign in signs):
            return Found(name, path, partial(convert, path))
    return _torch_file(_only_torch_file(path, layer))


def _only_torch_file(path: Path, layer: int | None) -> Path:
    """The file of weights in a folder of torch files."""
    files = sorted(file for file in path.iterdir() if file.suffix in TORCH_SUFFIXES)
    if not files:
        raise _unknown(path)
    for name in (dictionary_learning.WEIGHTS, "sae_final.pt", f"layer{layer}.sae.pt"):
        if path / name in files:
            return path / name
    if layer is not None and any(re.match(qwen_scope.FILE_PATTERN, file.name) for file in files):
        raise InputError(f"layer: {path} has no layer{layer}.sae.pt")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise InputError(f"sae: {path} holds {len(files)} torch files ({names}, ...); name one with sae_id=")
    return files[0]


def _torch_file(path: Path) -> Found:
    state = read_torch(path)
    # Before dictionary_learning, whose name of the encoder it shares: a config.json may lie beside any file.
    if "latent_bias" in state:
        return Found("OpenAI", path, partial(openai.convert, path, state))
    if dictionary_learning.config_of(path).is_file() and ("encoder.weight" in state or path.name.startswith("ae")):
        return Found("dictionary_learning", path, partial(dictionary_learning.convert, path, state))
    if "encoder_linear.weight" in state:
        return Found("Goodfire", path, partial(goodfire.convert, path, state))
    if "d_model" in state or "optim_state" in state:
        return Found("TopK of the first mechreward", path, partial(seed_topk.convert, path, state))
    if re.match(qwen_scope.FILE_PATTERN, path.name):
        return Found("Qwen-Scope", path, partial(qwen_scope.convert, path, state))
    raise _unknown(path, state)


def _safetensors_file(path: Path) -> Found:
    """A file of a folder that has a format, or the tensors of the first mechreward."""
    if path.name in (sae_lens.WEIGHTS, sparsify.WEIGHTS, gemma_scope_2.WEIGHTS):
        return _folder(path.parent, None)
    if path.match(llama_scope.WEIGHTS):
        return _folder(path.parent.parent, None)
    tensors = read_safetensors(path)
    if not (set(tensors) >= CANONICAL and path.with_suffix(".json").is_file()):
        raise _unknown(path, tensors)
    return Found("TopK of the first mechreward", path, partial(seed_topk.convert, path, tensors))


def _unknown(path: Path, names: Collection[str] = ()) -> InputError:
    held = f", with {', '.join(map(str, list(names)[:6]))}," if names else ""
    return InputError(f"sae: {path}{held} is in no format known here; looked for {'; '.join(LOOKED_FOR)}")
