"""Which block an SAE reads, of which model, and with which k: what its file says, joined with what the caller says.

Many files do not tell their layer, and some not their k. The caller fills that in; where both speak, they have to
agree. A wrong layer would not fail later, it would read other features. A model's name is the exception: one model goes
by several (``gpt2`` and ``gpt2-small``), so there the caller's counts, and a warning says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechreward.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What the caller says about an SAE; None where nothing."""

    layer: int | None = None
    """0-based decoder block whose output the SAE reads."""
    model_name: str | None = None
    """Model it was trained on."""
    k: int | None = None
    """Features kept a token."""


def layer_of_hook(hook_name: str) -> int:
    """The 0-based decoder block whose output a hook point reads.

    Knows module paths of Hugging Face models (``model.layers.3``, ``transformer.h.3``) and TransformerLens names
    (``blocks.3.hook_resid_post``; ``blocks.4.hook_resid_pre`` is the output of block 3).

    Raises:
        InputError: for any other hook point.
    """
    if match := re.search(r"(?:^|\.)(?:layers|h)\.(\d+)$|^blocks\.(\d+)\.hook_resid_post$", hook_name):
        return int(match[1] or match[2])
    if match := re.search(r"^blocks\.([1-9]\d*)\.hook_resid_pre$", hook_name):
        return int(match[1]) - 1
    raise InputError(
        f"hook_name: {hook_name!r} is not the output of a decoder block; "
        "allowed are names such as model.layers.3, transformer.h.3, blocks.3.hook_resid_post"
    )


def hook_of_layer(layer: int) -> str:
    """TransformerLens' name for the output of a decoder block, whatever the model."""
    return f"blocks.{layer}.hook_resid_post"


def complete(cfg: Mapping[str, Any], given: Given, source: str | Path) -> dict[str, Any]:
    """A configuration with layer, model name and k, from the file or else from the caller.

    Args:
        cfg: SAE Lens' configuration; what a file does not say is not in it.
        given: what the caller says.
        source: the file or release, for messages.

    Raises:
        InputError: if neither says what is needed, or the two do not agree on layer or k.
    """
    metadata = _said(cfg.get("metadata") or {}, source)
    metadata["hook_name"] = _hook(metadata.get("hook_name"), given.layer, source)
    metadata["model_name"] = _model(metadata.get("model_name"), given.model_name, source)
    whole = {**cfg, "metadata": metadata}
    if cfg.get("architecture") == "topk":
        whole["k"] = _k(cfg.get("k"), given.k, source)
    elif given.k is not None:
        raise InputError(f"k: {given.k} was given, but {source} holds no TopK SAE ({cfg.get('architecture')})")
    return whole


def part_of_path(path: Path, pattern: str) -> re.Match[str] | None:
    """The match of a pattern in the nearest part of a path that has one: the file's name, else its folder's, ..."""
    # Not resolved: files in the hub's cache are links to names that say nothing.
    found = (re.search(pattern, part) for part in reversed(path.absolute().parts))
    return next((match for match in found if match), None)


def _said(metadata: Any, source: str | Path) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise InputError(f"metadata: {metadata!r} in {source} is not an object of keys and values")
    for key in ("hook_name", "model_name"):
        if not isinstance(metadata.get(key) or "", str):
            raise InputError(f"metadata.{key}: {metadata[key]!r} in {source} is not a name")
    return dict(metadata)


def _hook(said: str | None, layer: int | None, source: str | Path) -> str:
    if layer is not None and (type(layer) is not int or layer < 0):
        raise InputError(f"layer: {layer!r} is not a whole number of at least 0")
    if not said:
        if layer is None:
            raise InputError(f"layer: {source} does not say which decoder block it reads; say it with layer=")
        return hook_of_layer(layer)
    if layer not in (None, layer_of_hook(said)):
        raise InputError(f"layer: {layer} was given, but {source} says {layer_of_hook(said)} ({said})")
    return said


def _model(said: str | None, given: str | None, source: str | Path) -> str:
    # With and without the owner a name is the same: many files leave it out.
    if said and given and said.split("/")[-1].lower() != given.split("/")[-1].lower():
        logger.warning("model_name: %r was given, but %s says %r; the given name is kept", given, source, said)
    return given or said or ""


def _k(said: Any, given: int | None, source: str | Path) -> Any:
    if said is None and given is None:
        raise InputError(f"k: {source} does not say how many features are kept a token; say it with k=")
    if None not in (said, given) and said != given:
        raise InputError(f"k: {given} was given, but {source} says {said}")
    return said if given is None else given
