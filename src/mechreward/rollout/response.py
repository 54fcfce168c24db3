"""One sampled response, a Parquet file of many, and what tells their questions apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mechreward.errors import InputError
from mechreward.files import atomic_path, sha256_bytes


@dataclass(frozen=True)
class Response:
    """A completion as it was sampled; token ids are the truth, `text` is their decoding without special tokens."""

    question_id: str
    sample: int
    """Which of the question's samples, from 0."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Includes EOS if `finish` is "eos"; never a pad."""
    text: str
    logprobs: tuple[float, ...]
    """One a completion token, in nats, under the sampling model at temperature 1 and without top-p."""
    finish: Literal["eos", "length"]
    correct: bool | None = None
    """Strict verdict; None until verified, as are the three below."""
    lenient: bool | None = None
    extracted: str | None = None
    reason: str | None = None


SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "sample": pa.int64(),
        "prompt_ids": pa.list_(pa.int64()),
        "completion_ids": pa.list_(pa.int64()),
        "text": pa.string(),
        "logprobs": pa.list_(pa.float64()),
        "finish": pa.string(),
        "correct": pa.bool_(),
        "lenient": pa.bool_(),
        "extracted": pa.string(),
        "reason": pa.string(),
    }
)
REQUIRED = SCHEMA.names[:7]
TUPLES = ("prompt_ids", "completion_ids", "logprobs")
HASH_DIGITS = 12
"""48 bits: among a thousand questions and a thousand others, two share one with a chance of 4 in a billion."""


def prompt_hashes(prompts: Iterable[Sequence[int]]) -> tuple[str, ...]:
    """What tells questions apart without their text: short SHA-256 of each prompt's token ids, sorted, each once.

    Ids of questions do not: rows of two files are both numbered from 0.
    """
    texts = {" ".join(map(str, ids)) for ids in prompts}
    return tuple(sorted(sha256_bytes(text.encode())[:HASH_DIGITS] for text in texts))


def save_responses(path: str | Path, responses: Sequence[Response]) -> None:
    """Writes the responses in order to one Parquet file, atomically; `load_responses` gives back equal ones."""
    table = pa.Table.from_pylist([asdict(response) for response in responses], schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def load_responses(path: str | Path) -> list[Response]:
    """Reads what `save_responses` wrote.

    Raises:
        InputError: if the file is missing, is not whole, has other columns, or one of another kind or with a gap.
    """
    if not Path(path).is_file():
        raise InputError(f"responses: there is no file {path}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"responses: {path} is not a whole Parquet file; write it with save_responses") from error
    lacking = [field.name for field in fields(Response) if field.name not in table.column_names]
    if lacking:
        raise InputError(f"responses: {path} has no column {lacking[0]}; it needs {', '.join(SCHEMA.names)}")
    rows = pa.table({field.name: _column(table, field, path) for field in SCHEMA}).to_pylist()
    return [Response(**{**row, **{name: tuple(row[name]) for name in TUPLES}}) for row in rows]


def _column(table: pa.Table, field: pa.Field, path: str | Path) -> pa.ChunkedArray:
    """Of the kind that `field` says: a verdict that is text would count as right, whatever it says."""
    found = table[field.name]
    try:
        column = found.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(f"responses: column {field.name} of {path} holds {found.type}, not {field.type}") from error
    if field.name in REQUIRED and column.null_count:
        gaps = f"{column.null_count} of {len(column)} rows without a value"
        raise InputError(f"responses: column {field.name} of {path} has {gaps}; each needs one")
    return column
