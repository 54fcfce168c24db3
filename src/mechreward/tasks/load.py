"""Loading questions from any source, checked row by row before anything is spent on them.

A row's answer that holds GSM8K's ``####`` is a worked solution: the text after the marker becomes the answer, the whole
becomes the solution unless a solution column is named. Prompts are made by replacing ``{question}`` in the format, and
nothing else, so a format may hold braces of its own (``\\boxed{}``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.tasks.generated import reasoning_gym_rows, tiny_rows
from mechreward.tasks.hub import hub_rows, is_dataset
from mechreward.tasks.marker import after_marker
from mechreward.tasks.question import Question, check_unique_ids
from mechreward.tasks.rows import Row, is_file, read_rows, required_cell, text_cell

PLACEHOLDER = "{question}"
QUESTION_SETTINGS = {
    "question": "question_column",
    "answer": "answer_column",
    "solution": "solution_column",
    "id": "id_column",
    "options": "generator_options",
}
"""What settings call the fields that `load_questions` complains of, for `errors.named`."""


@dataclass(frozen=True)
class Columns:
    """The source's names for a question's fields."""

    id: str | None = None
    """None numbers the questions q0, q1, ..."""
    question: str = "question"
    answer: str = "answer"
    solution: str | None = None


def load_questions(
    source: str | Path,
    *,
    columns: Columns | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    prompt_format: str = PLACEHOLDER,
    options: dict[str, Any] | None = None,
) -> list[Question]:
    """Loads questions, in the source's order.

    Args:
        source: a `.jsonl`, `.csv` or `.parquet` file; `tiny:easy` or `tiny:long`; `reasoning-gym:NAME`; or a Hugging
            Face dataset id (or folder).
        columns: names of the columns of files and datasets; generated sources have fixed ones.
        split: the split of a Hugging Face dataset.
        limit: take the first `limit` questions; None takes all (200 of a tiny source).
        seed: of generated sources; part of their ids.
        prompt_format: the prompt, with `{question}` where the question goes.
        options: keyword arguments of the reasoning-gym generator or of `datasets.load_dataset`.

    Raises:
        InputError: naming the field at fault; for a bad row, which row.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not a number of questions; allowed are whole numbers from 1")
    if PLACEHOLDER not in prompt_format:
        raise InputError(f"prompt_format: {prompt_format!r} does not say where the question goes; put {PLACEHOLDER} in")
    rows, columns = _open(os.path.expanduser(source), columns or Columns(), split, limit, seed, options or {})
    questions = [_question(row, columns, f"q{index}", prompt_format) for index, row in enumerate(islice(rows, limit))]
    if not questions:
        raise InputError(f"source: {source} holds no questions; at least one is needed")
    check_unique_ids(questions)
    return questions


def _open(
    source: str, columns: Columns, split: str, limit: int | None, seed: int, options: dict[str, Any]
) -> tuple[Iterator[Row], Columns]:
    """The rows of a source and the columns they have."""
    kind, _, name = source.partition(":")
    if kind == "reasoning-gym":
        return reasoning_gym_rows(name, options, seed=seed, limit=limit), Columns(id="id")
    if is_dataset(source):
        return hub_rows(source, options, split=split), columns
    if options:
        raise InputError(
            f"options: {sorted(options)} mean nothing to {source}; allowed are options of reasoning-gym generators and "
            "Hugging Face datasets"
        )
    if kind == "tiny":
        return tiny_rows(name, seed=seed, limit=limit), Columns(id="id", solution="solution")
    if is_file(source):
        return read_rows(Path(source)), columns
    raise InputError(
        f"source: {source!r} is none of the kinds there are; allowed are a .jsonl, .csv or .parquet file, tiny:easy, "
        "tiny:long, reasoning-gym:NAME and a Hugging Face dataset id"
    )


def _question(row: Row, columns: Columns, default_id: str, prompt_format: str) -> Question:
    asked = required_cell(row, "question", columns.question)
    answer = required_cell(row, "answer", columns.answer)
    solution = text_cell(row, "solution", columns.solution) or None if columns.solution else None
    marked = after_marker(answer)
    if marked is not None:
        if not marked:
            raise InputError(f"answer: {row.where} has nothing after ####; every question needs a gold answer")
        answer, solution = marked, solution or answer
    name = required_cell(row, "id", columns.id) if columns.id else default_id
    return Question(name, prompt_format.replace(PLACEHOLDER, asked), answer, solution)
