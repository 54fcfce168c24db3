"""Files of weights as dictionaries of tensors, without running code that a file may carry.

torch files go through the unpickler that knows tensors and plain containers only (`weights_only=True`), `.npz` through
numpy without pickle, the rest through safetensors. What cannot be read so is refused in one sentence. `taken` then
checks what was read: every tensor that a format defines, in its shape there, and no other.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mechreward.errors import InputError
from mechreward.files import read_json

Parts = tuple[dict[str, Any], dict[str, Tensor]]
"""SAE Lens' configuration (without what the file does not say) and tensors."""

# First bytes of a torch file: a zip archive, or the pickle protocol 2 of torch before 1.6.
TORCH_MAGIC = (b"PK", b"\x80\x02")
# What reading a damaged torch file has been seen to end in.
DAMAGED = (RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, OSError, struct.error)


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a torch file: tensors, numbers and text.

    Raises:
        InputError: if the file carries code or classes, is damaged, or holds something else than a dictionary.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start not in TORCH_MAGIC:
        raise InputError(f"sae: {path} is damaged or is no torch file (it starts with {start!r})")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError as error:
        raise InputError(_refusal(path, str(error))) from error
    except DAMAGED as error:
        raise InputError(f"sae: {path} is damaged or cut short ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise InputError(f"sae: {path} holds a {type(state).__name__}, not a dictionary of tensors")
    return dict(state)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays in a numpy archive.

    Raises:
        InputError: if it is damaged, is no archive, or holds Python objects (which only pickle could read).
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"sae: {path} is no archive of plain arrays, and nothing else is read ({error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(f"sae: {path} is damaged or cut short ({error})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        InputError: if it is missing or damaged.
    """
    require_files(path.parent, path.name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"sae: {path} is damaged or cut short ({error})") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: if it is missing, is not JSON, or holds something else.
    """
    require_files(path.parent, path.name)
    cfg = read_json(path)
    if not isinstance(cfg, dict):
        raise InputError(f"sae: {path} must hold a JSON object, not {type(cfg).__name__}")
    return cfg


def require_files(folder: Path, *names: str) -> None:
    """Raises an InputError that names the first of these files which the folder lacks."""
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"sae: {folder} has no {name}; this format holds {' and '.join(names)}")


def value(cfg: Mapping[str, Any], key: str, source: Path, kind: type = object) -> Any:
    """A value of a configuration file.

    Raises:
        InputError: if the key is missing or its value is of another kind.
    """
    if key not in cfg:
        raise InputError(f"{key}: {source} lacks this key")
    found = cfg[key]
    if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
        raise InputError(f"{key}: {found!r} in {source} is not a {kind.__name__}")
    return found


def size(cfg: Mapping[str, Any], key: str, source: Path) -> int:
    """A whole number of at least 1 of a configuration file.

    Raises:
        InputError: if it is missing or something else.
    """
    found = value(cfg, key, source, int)
    if found < 1:
        raise InputError(f"{key}: {found} in {source} is not a whole number of at least 1")
    return found


def matrix_shape(tensors: Mapping[str, Any], name: str, source: Path) -> tuple[int, int]:
    """Both sizes of a matrix.

    Raises:
        InputError: if it is missing or is no matrix.
    """
    matrix = tensors.get(name)
    if not isinstance(matrix, Tensor):
        raise InputError(f"sae: the tensor {name!r} is missing in {source}")
    if matrix.ndim != 2:
        raise InputError(f"{name}: shape {tuple(matrix.shape)} in {source} is not that of a matrix")
    return matrix.shape[0], matrix.shape[1]


def taken(
    tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: Path, ignored: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors that a format defines, in float32.

    Args:
        tensors: what the file holds.
        shapes: names and shapes that the format defines, in its own orientation.
        source: the file, for messages.
        ignored: what may be there besides and is not needed.

    Raises:
        InputError: naming what is missing, of the wrong shape, or not known.
    """
    if missing := [name for name in shapes if not isinstance(tensors.get(name), Tensor)]:
        raise InputError(f"sae: the tensor {missing[0]!r} is missing in {source}")
    if unknown := sorted(set(tensors) - set(shapes) - set(ignored)):
        raise InputError(f"sae: {unknown[0]!r} in {source} does not belong to this format")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{name}: shape {tuple(tensors[name].shape)} in {source} is not {shape}")
    return {name: tensors[name].float() for name in shapes}


def _refusal(path: Path, message: str) -> str:
    named = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", message)
    if "Unsupported" in message or named:
        what = f" ({named[1]})" if named else ""
        return f"sae: {path} carries code or classes{what} beside its tensors; it is refused, as loading would run them"
    return f"sae: {path} is damaged or is no torch file"
