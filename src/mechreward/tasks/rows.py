"""Rows of question files, as dictionaries: JSON Lines, CSV and Parquet.

Rows are yielded one by one with the words that name their place ("line 3"), so that an error can say where it is and
a limit reads no further than it needs. Line numbers are those of an editor; rows count from 1.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from mechreward.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".parquet")
# Taken for files, which then are refused by name, rather than for dataset ids.
_OTHER_FILES = (".json", ".txt", ".tsv", ".xlsx", ".xls", ".arrow", ".yaml", ".yml", ".md", ".gz", ".zip", ".zst")


class Row(NamedTuple):
    """One row of a source and the words that name its place."""

    where: str
    values: dict[str, Any]


def is_file(source: str) -> bool:
    """Whether a source names a file: by its suffix, or because it is there."""
    return Path(source).suffix.lower() in (*SUFFIXES, *_OTHER_FILES) or Path(source).is_file()


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a `.jsonl`, `.csv` or `.parquet` file.

    Raises:
        InputError: if the file is missing, has another suffix, or cannot be read as what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"source: {path} ends in {suffix or 'no suffix'!r}; allowed are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"source: there is no file {path}; name a file ending in {', '.join(SUFFIXES)}")
    reader = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[suffix]
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"source: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"source: line {number} of {path} is not valid JSON ({error.msg})") from error
            if not isinstance(values, dict):
                raise InputError(f"source: line {number} of {path} is a JSON {_kind(values)}; allowed is an object")
            yield Row(f"line {number} of {path}", values)


def _kind(value: Any) -> str:
    return {list: "array", str: "string", type(None): "null", bool: "boolean"}.get(type(value), "number")


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            names = list(reader.fieldnames or ())
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise InputError(
                    f"source: the header of {path} names column {twice[0]!r} twice; give each its own name"
                )
            for values in reader:
                if None in values:  # not "": a column without a name, as pandas writes its index
                    raise InputError(f"source: line {reader.line_num} of {path} has more cells than its header")
                yield Row(f"line {reader.line_num} of {path}", values)
        except csv.Error as error:
            raise InputError(f"source: line {reader.reader.line_num} of {path} is not valid CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (values for batch in batches for values in batch.to_pylist())
        for number, values in enumerate(rows, start=1):
            yield Row(f"row {number} of {path}", values)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"source: {path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def required_cell(row: Row, field: str, column: str) -> str:
    """A cell's text, which must not be empty."""
    text = text_cell(row, field, column)
    if not text:
        raise InputError(f"{field}: column {column!r} is empty in {row.where}; every question needs one")
    return text


def text_cell(row: Row, field: str, column: str) -> str:
    """A cell as stripped text; nothing (null, NaN) as the empty text."""
    if column not in row.values:
        there = ", ".join(sorted(row.values)) or "none"
        raise InputError(f"{field}: there is no column {column!r} in {row.where}; the columns there are: {there}")
    value = row.values[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise InputError(
            f"{field}: column {column!r} of {row.where} holds a {type(value).__name__}; allowed are text and numbers"
        )
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("ascii", "backslashreplace").decode()
        raise InputError(
            f"{field}: column {column!r} of {row.where} holds {half}, half a character; mend it"
        ) from error
    return text
