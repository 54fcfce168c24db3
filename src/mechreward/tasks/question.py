"""A question: what the model is asked, and the gold answer its responses are judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mechreward.errors import InputError


@dataclass(frozen=True)
class Question:
    """One question. Everything downstream refers to it by its id."""

    id: str
    prompt: str
    """The text the model reads, formatted."""
    answer: str
    """The gold answer alone: ``18``, not a worked solution."""
    solution: str | None = None
    """A worked solution, where the source has one."""


def check_unique_ids(questions: Iterable[Question]) -> None:
    """Refuses two questions with one id.

    Raises:
        InputError: naming the first repeated id.
    """
    counts = Counter(question.id for question in questions)
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise InputError(f"id: {repeated!r} is used by {counts[repeated]} questions; each needs one of its own")
