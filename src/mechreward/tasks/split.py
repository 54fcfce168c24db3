"""KNOWN and UNKNOWN questions: features are found and policies trained on the first, judged on the second.

The split is by question and seeded: questions are ordered by a hash of seed and prompt, and the first share is KNOWN.
It depends on the set of questions and not on their order, and questions with the same prompt (whatever their ids,
capitals and spaces) stay on one side, so that nothing judged has been seen. Rephrasings are not recognised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mechreward.errors import InputError
from mechreward.files import atomic_path, sha256_bytes
from mechreward.tasks.question import Question, check_unique_ids

_SIDES = ("known", "unknown")
_COLUMNS = ("id", "prompt", "answer", "solution", "split")


class QuestionSplit(NamedTuple):
    """The two sides; no prompt is on both, nor one that differs in capitals and spaces alone."""

    known: list[Question]
    unknown: list[Question]


def split_questions(questions: Sequence[Question], known: float = 0.5, seed: int = 0) -> QuestionSplit:
    """Parts questions into KNOWN (about `known` of them, by whole prompts) and UNKNOWN; both in hashed order.

    Raises:
        InputError: if the share is not within (0, 1), an id is used twice, or a side would be empty.
    """
    if not 0 < known < 1:
        raise InputError(f"known: {known} is not a share of the questions; allowed is a number above 0 and below 1")
    check_unique_ids(questions)
    by_prompt: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_prompt[_bare(question)].append(question)

    def place(prompt: str) -> str:
        # Of the prompt as it is written: the first, where there are several ways.
        written = min(question.prompt for question in by_prompt[prompt])
        return sha256_bytes(f"{seed}\n{written}".encode())

    hashed = sorted(by_prompt, key=place)
    target = round(known * len(questions))
    sides = QuestionSplit([], [])
    for prompt in hashed:
        side = sides.known if len(sides.known) < target else sides.unknown
        side.extend(sorted(by_prompt[prompt], key=lambda question: question.id))
    for name, side in zip(_SIDES, sides, strict=True):
        if not side:
            raise InputError(
                f"known: a share of {known} of {len(questions)} questions ({len(by_prompt)} different prompts) leaves "
                f"the {name} side empty; both sides need at least one"
            )
    return sides


def join_sides(known: Sequence[Question], unknown: Sequence[Question]) -> QuestionSplit:
    """Sides of two sources, in their order; ids of UNKNOWN questions get `eval-` in front, so that none is on both.

    Raises:
        InputError: if a question is on both sides, or an id is used twice.
    """
    seen = {_bare(question) for question in known}
    both = [question for question in unknown if _bare(question) in seen]
    if both:
        raise InputError(
            f"unknown: {len(both)} of these {len(unknown)} questions are KNOWN ones too (the first is {both[0].id}), "
            "and a policy has to be tested on others; leave them out of one of the two"
        )
    renamed = [replace(question, id=f"eval-{question.id}") for question in unknown]
    check_unique_ids([*known, *renamed])
    return QuestionSplit(list(known), renamed)


def _bare(question: Question) -> str:
    """What tells one question from another: its prompt, whatever its capitals and spaces."""
    return "".join(question.prompt.casefold().split())


def save_questions(path: str | Path, split: QuestionSplit) -> None:
    """Writes both sides to one Parquet file with a `split` column, atomically."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": q.id, "prompt": q.prompt, "answer": q.answer, "solution": q.solution, "split": name}
        for name, side in zip(_SIDES, split, strict=True)
        for q in side
    ]
    schema = pyarrow.schema([(column, pyarrow.string()) for column in _COLUMNS])
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)


def load_split(path: str | Path) -> QuestionSplit:
    """Reads what `save_questions` wrote, in the same order.

    Raises:
        InputError: if the file is missing or was not written by `save_questions`.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError as error:
        raise InputError(f"questions: there is no file {path}; it is written by save_questions") from error
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"questions: {path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error
    if tuple(table.column_names) != _COLUMNS:
        raise InputError(f"questions: {path} has the columns {table.column_names}; it must have {list(_COLUMNS)}")
    sides: dict[str, list[Question]] = {name: [] for name in _SIDES}
    for row in table.to_pylist():
        name = row.pop("split")
        if name not in sides:
            raise InputError(f"split: question {row['id']!r} of {path} is {name!r}; allowed are known and unknown")
        sides[name].append(Question(**row))
    return QuestionSplit(sides["known"], sides["unknown"])
