"""Plain documents, for what reads text and asks nothing: training a sparse autoencoder.

A `.txt` file holds documents parted by blank lines (a document may have line breaks of its own). Documents without text
are left out, wherever they come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.tasks.hub import hub_rows, is_dataset
from mechreward.tasks.rows import SUFFIXES, Row, is_file, read_rows, text_cell


def load_texts(
    source: str | Path,
    *,
    column: str = "text",
    split: str = "train",
    limit: int | None = None,
    options: dict[str, Any] | None = None,
) -> list[str]:
    """Loads documents, in the source's order.

    Args:
        source: a `.txt`, `.jsonl`, `.csv` or `.parquet` file, or a Hugging Face dataset id (or folder).
        column: the column that holds the text; a `.txt` file has none.
        split: the split of a Hugging Face dataset.
        limit: take the first `limit` documents; None takes all.
        options: keyword arguments of `datasets.load_dataset`.

    Raises:
        InputError: naming the field at fault; for a bad row, which row.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not a number of documents; allowed are whole numbers from 1")
    texts = list(islice(filter(None, _open(os.path.expanduser(source), column, split, options or {})), limit))
    if not texts:
        raise InputError(f"text: {source} holds no text; at least one document is needed")
    return texts


def _open(source: str, column: str, split: str, options: dict[str, Any]) -> Iterator[str]:
    if is_dataset(source):
        return _column(hub_rows(source, options, split=split), column)
    if options:
        raise InputError(
            f"text_options: {sorted(options)} mean nothing to {source}; they are for Hugging Face datasets"
        )
    if Path(source).suffix.lower() == ".txt":
        return _paragraphs(Path(source))
    if Path(source).suffix.lower() in SUFFIXES:
        return _column(read_rows(Path(source)), column)
    kind = f"a {Path(source).suffix or 'nameless kind of'} file" if is_file(source) else "no file or dataset"
    raise InputError(
        f"text: {source!r} is {kind}; allowed are a .txt, .jsonl, .csv or .parquet file and a Hugging Face dataset id"
    )


def _column(rows: Iterator[Row], column: str) -> Iterator[str]:
    return (text_cell(row, "text_column", column) for row in rows)


def _paragraphs(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise InputError(f"text: there is no file {path}")
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                    continue
                yield "".join(lines).strip()
                lines = []
    except UnicodeDecodeError as error:
        raise InputError(f"text: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    yield "".join(lines).strip()
