"""What a verifier says about one completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A judged completion; true in a condition if it is correct."""

    correct: bool
    """Under strict extraction: the answer stands where the task's format puts it."""
    extracted: str | None
    """What strict extraction found, tidied; None if it found nothing."""
    reason: str
    """Why, in a few words: `match`, `no answer marker`, `different number`, ..."""
    lenient: bool
    """Correct under lenient extraction: by what the text ends on, wherever it stands."""

    def __bool__(self) -> bool:
        return self.correct


Verifier = Callable[..., Verdict]
"""`(prompt, completion, answer)`, or `(prompt, completion)` with the gold answer after `####` in the prompt."""
