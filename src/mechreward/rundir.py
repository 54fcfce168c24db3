"""A run directory: what it was told (`config.yaml`) and what made it (`manifest.json`), written before any work.

Whatever makes such a directory keeps whole files in it, so that a killed run goes on where it stopped; the settings it
was started with then have to be the same.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mechreward.errors import InputError
from mechreward.files import atomic_path, make_folder, read_json, write_json

CONFIG, MANIFEST = "config.yaml", "manifest.json"
MODEL_HASH = "model"
"""Name of the model's hash, which runs of an earlier version did not record."""


def open_run(
    folder: Path,
    settings: dict[str, Any],
    manifest: dict[str, Any],
    resume: bool,
    defaults: Mapping[str, Any] | None = None,
) -> Path:
    """Makes a run directory, or with `resume` finds the one a killed run left.

    Args:
        settings: what the run is told, as plain values that YAML can hold; without the folder and `resume` themselves.
        defaults: what settings are if left out. A run that was started before there was such a setting did as it says.

    Raises:
        InputError: if the folder holds a run and `resume` is off, other settings or inputs, or cannot be written to; or
            if this is one of several processes, which would write over each other's files.
    """
    if (processes := n_launched()) > 1:
        raise InputError(
            f"processes: {processes} were launched, and a run directory is written by one; start it "
            "without torchrun or accelerate launch, or train with `MechRewardGRPOTrainer` in a script of your own"
        )
    if (folder / CONFIG).exists():
        if not resume:
            raise InputError(f"out: {folder} holds a run already; give --resume to go on with it, or another folder")
        _check_same(folder, settings, manifest["hashes"], defaults or {})
        return folder
    left = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # A run killed while its first two files were written is gone on with by writing both anew.
    begun = all(name == MANIFEST or (name.startswith(".") and name.endswith(".tmp")) for name in left)
    if left and not (resume and begun):
        raise InputError(f"out: {folder} is not empty and holds no run; name a new folder")
    make_folder(folder)
    write_json(folder / MANIFEST, manifest)
    with atomic_path(folder / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def n_launched() -> int:
    """How many processes torchrun or accelerate launch started, known before there is a process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_same(folder: Path, settings: dict[str, Any], hashes: dict[str, str], defaults: Mapping[str, Any]) -> None:
    try:
        stored = yaml.safe_load((folder / CONFIG).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"out: {folder / CONFIG} is damaged, so the run cannot go on; name a new folder")
    stored = {**defaults, **stored}
    changed = [field for field in settings if stored.get(field) != settings[field]]
    if changed:
        raise InputError(
            f"{changed[0]}: {settings[changed[0]]!r} is not what the run in {folder} was started with "
            f"({stored.get(changed[0])!r}); a resumed run keeps its configuration"
        )
    stored_hashes = read_json(folder / MANIFEST)["hashes"]
    known = {MODEL_HASH: hashes.get(MODEL_HASH)} | stored_hashes
    other = [name for name in hashes if known.get(name) != hashes[name]]
    if other:
        raise InputError(f"resume: {other[0]} changed since the run in {folder} was started; a resumed run keeps them")


def make_manifest(*, seed: int, device: str, packages: Sequence[str], hashes: dict[str, str]) -> dict[str, Any]:
    """Versions, machine, seed and hashes of what went in."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "device": device,
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "hashes": hashes,
    }


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for each stage, so that skipping one on resume changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{stage}".encode()).digest()[:4], "big")
