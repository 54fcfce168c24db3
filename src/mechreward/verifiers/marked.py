"""Where a completion says that its answer stands: ``\\boxed{...}``, "the answer is ...", or ``#### ...``."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from mechreward.tasks import after_marker

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PHRASE = re.compile(r"\banswer[*_]*(?:\s+is\b\s*[*_]*:?|\s*:|\s*=)[ \t*_]*([^\n]*)", re.IGNORECASE)


class Marked(NamedTuple):
    """The text at an answer marker, and which marker it was."""

    text: str
    marker: Literal["boxed", "phrase", "####"]


def find_marked(text: str) -> Marked | None:
    """The answer at the last ``\\boxed{}``; failing that, after the last "answer is"; else after the last ``####``."""
    boxed = last_boxed(text)
    if boxed is not None:
        return Marked(boxed, "boxed")
    phrases = _PHRASE.findall(text)
    if phrases:
        return Marked(_first_sentence(phrases[-1]), "phrase")
    hashed = after_marker(text, last=True)
    return None if hashed is None else Marked(hashed.strip("*_` "), "####")


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close; None if there is none.

    >>> last_boxed(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    for found in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for place in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[found.end() : place].strip()
    return None


def _first_sentence(text: str) -> str:
    return re.split(r"[.!?](?:\s|$)", text, maxsplit=1)[0].strip("*_` ")
