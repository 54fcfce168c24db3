"""Reading and writing files so that a killed run never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechreward.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it replaces `path`, on an exception it is removed.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    make_folder(target.parent)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: str | Path) -> Path:
    """Makes a folder and its parents, and checks that it can be written to.

    Raises:
        InputError: naming the folder and why it cannot be used.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".mechreward-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out: cannot write to the folder {folder} ({error.strerror}); name a writable one") from error
    return folder


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON with sorted keys and strict numbers (NaN is an error), atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: if the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(f"path: there is no file {path}") from error
    except OSError as error:
        raise InputError(f"path: cannot read {path} ({error.strerror}); name a JSON file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"path: {path} is not valid JSON (byte {error.start} is not UTF-8)") from error
    except json.JSONDecodeError as error:
        raise InputError(f"path: {path} is not valid JSON ({error.msg}, line {error.lineno})") from error


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Adds one line of JSON (strict numbers) to a JSON Lines file, making it if it is missing.

    A last line without its line break (a kill) is cut off first: with it the new row would be no JSON.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with Path(path).open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; none if it is missing. A last line without its line break (a kill) is left out.

    Raises:
        InputError: naming the first line that is not JSON.
    """
    if not Path(path).exists():
        return []
    try:
        return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]
    except UnicodeDecodeError as error:
        raise InputError(f"path: {path} holds a line that is not JSON (byte {error.start} is not UTF-8)") from error
    except json.JSONDecodeError as error:
        raise InputError(f"path: {path} holds a line that is not JSON ({error.msg})") from error


def sha256_bytes(*chunks: bytes) -> str:
    """Hex SHA-256 over the chunks in order."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
