"""Probes on disk: one safetensors file with the tensors, and everything else as JSON in its header. No pickle.

A name is never cut: `correctness.v2` is saved as `correctness.v2.safetensors` and found by either.
"""

from __future__ import annotations

import json
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mechreward.errors import InputError
from mechreward.files import atomic_path
from mechreward.probes.probe import LinearProbe

SUFFIX = ".safetensors"
HEADER = "mechreward_probe"


class _Header(BaseModel):
    """What of a probe is no tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    bias: float
    d_model: Annotated[int, Field(gt=0)]
    layer: Annotated[int, Field(ge=0)] | None
    pooling: str
    slope: float
    intercept: float
    metadata: dict[str, Any]


def save_probe(probe: LinearProbe, path: str | Path) -> Path:
    """Writes the probe atomically, to `path` with `.safetensors` at its end; returns the file's path.

    Raises:
        InputError: naming the entry of its metadata that is not a JSON value.
    """
    target = _file(path)
    tensors = {"weight": probe.weight.cpu().contiguous()}
    if probe.query is not None:
        tensors["query"] = probe.query.cpu().contiguous()
    for name, value in probe.metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata: {name} = {value!r} cannot be saved; it must be a JSON value") from error
    header = json.dumps({name: getattr(probe, name) for name in _Header.model_fields}, allow_nan=False)
    with atomic_path(target) as temporary:
        save_file(tensors, temporary, metadata={HEADER: header})
    return target


def load_probe(name_or_path: str | Path) -> LinearProbe:
    """Reads a probe from a file, with or without its suffix, or a bundled one by "model/name".

    Raises:
        InputError: if there is none, or the file is not a whole probe.
    """
    given = Path(name_or_path).expanduser()
    path = next((path for path in (given, _file(given)) if path.is_file()), None)
    if path is None:
        path = _bundled(str(name_or_path))
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"probe: {path} is not a whole safetensors file ({error})") from error
    if header is None or "weight" not in tensors:
        raise InputError(f"probe: {path} holds no probe; write it with save_probe")
    try:
        fields = _Header.model_validate_json(header)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise InputError(f"probe: {where} of {path} is not a probe's ({first['msg']})") from error
    return LinearProbe(weight=tensors["weight"], query=tensors.get("query"), **fields.model_dump())


def probe_names() -> list[str]:
    """Names of the bundled probes, "model/name", sorted."""
    root = package_files("mechreward").joinpath("catalogs")
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    return sorted(
        f"{folder.name}/{entry.name.removesuffix(SUFFIX)}"
        for folder in folders
        for entry in folder.iterdir()
        if entry.name.endswith(SUFFIX)
    )


def _bundled(name: str) -> Path:
    name = name.removesuffix(SUFFIX)
    if name not in probe_names():
        bundled = ", ".join(probe_names()) or "none"
        raise InputError(f"probe: {name} is neither a file nor a bundled probe (bundled: {bundled})")
    return Path(str(package_files("mechreward").joinpath("catalogs", f"{name}{SUFFIX}")))


def _file(path: str | Path) -> Path:
    return Path(path) if str(path).endswith(SUFFIX) else Path(f"{path}{SUFFIX}")
