"""Where a completion says that its answer stands: ``\\boxed{...}``, "the answer is ...", or ``#### ...``."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from mechreward.tasks import after_marker

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` opens nothing: `\left\{ ... \right.` has no other side
_PHRASE = re.compile(
    r"\banswer[*_]*(?:\s+is(?:\s+(?:therefore|thus|simply|approximately|about))?\b\s*[*_]*:?|\s*:|\s*=)[ \t*_]*",
    re.IGNORECASE,
)
# A phrase that ends its line announces the next one ("Answer:\n18"), which may open a displayed formula.
_NEXT_LINE = re.compile(r"[\s*_#]*(?:(?:\$\$|\\\[)[^\S\n]*\n\s*)?")


class Marked(NamedTuple):
    """The text at an answer marker, and which marker it was."""

    text: str
    marker: Literal["boxed", "phrase", "####"]


def find_marked(text: str) -> Marked | None:
    """The answer at the last ``\\boxed{}``; failing that, after the last "answer is"; else after the last ``####``.

    Where the line ends with "answer is", the answer is the next line that has text.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return Marked(boxed, "boxed")
    phrase = None
    for phrase in _PHRASE.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if phrase is not None:
        line = _NEXT_LINE.sub("", text[phrase.end() :], count=1).partition("\n")[0]
        return Marked(_first_sentence(line), "phrase")
    hashed = after_marker(text, last=True)
    return None if hashed is None else Marked(hashed.strip("*_` "), "####")


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close; None if there is none.

    >>> last_boxed(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    begins = {found.end() for found in _BOXED.finditer(text)}
    opened: list[int] = []  # where the braces that are open by now have their content
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text) if begins else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened and (start := opened.pop()) in begins:
            last = max(last or (start, 0), (start, brace.start()))
    return text[slice(*last)].strip() if last else None


def _first_sentence(text: str) -> str:
    return re.split(r"[.!?](?:\s|$)", text, maxsplit=1)[0].strip("*_` ")
