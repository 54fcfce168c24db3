"""Multiple choice: one letter from A to E.

Strict extraction reads the letter at an answer marker (`\\boxed{B}`, "the answer is (B)", `#### B`), or a response
that is nothing but a letter (`B`, `(B).`); a letter with others joined to it (`B or C`, `B/C`) is none. Lenient
extraction takes the last capital letter A to E that stands alone, except an A before a small word, which is an article.
"""

from __future__ import annotations

import re

from mechreward.errors import InputError
from mechreward.verifiers.marked import find_marked
from mechreward.verifiers.text import Gold, answer_text, gold_text
from mechreward.verifiers.verdict import Verdict

_ALONE = re.compile(r"[\s*_`]*(?:\(([A-Ea-e])\)|\[([A-Ea-e])\]|([A-E])[.:)]?)[\s*_`.]*")
_AT_MARKER = re.compile(
    r"[\s*_`$\"'“‘]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?:(?i:option|choice)\s+)?"
    r"(?:[(\[]([A-Ea-e])[)\]]|([A-E])(?![\w']))"
)
_JOINED = re.compile(
    r"[)\]}\s*_$]*(?:[,;/&+|]|\bor\b|\band\b)[\s*_$(\[]*(?:\\text\s*\{\s*)?(?:[B-E]|A(?!\s+[a-z]))(?![\w'])"
)
_IN_TEXT = re.compile(r"(?<![\w'])(?:([B-E])|(A)(?!\s+[a-z]))(?![\w'])")


def choice(prompt: object, completion: object, answer: Gold = None) -> Verdict:
    """Judges a completion by the letter it chooses.

    Args:
        prompt: text or chat; read only where `answer` is not given, for the gold letter after its ``####``.
        completion: text or chat.
        answer: the gold letter, alone or in brackets.

    Raises:
        InputError: if the gold answer is missing or not a letter from A to E.

    >>> choice("Which?", "Because of that, the answer is (B).", "B").correct
    True
    """
    gold = _gold_letter(gold_text(prompt, answer))
    text = answer_text(completion)
    last = None
    for last in _IN_TEXT.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    lenient = last is not None and last[0] == gold
    marked = find_marked(text)
    found = _ALONE.fullmatch(text) if marked is None else _AT_MARKER.match(marked.text)
    if found is None:
        return Verdict(False, None, "no answer marker" if marked is None else "no letter at the marker", lenient)
    if marked is not None and _JOINED.match(marked.text, found.end()):
        return Verdict(False, None, "several letters at the marker", lenient)
    letter = _letter(found)
    return Verdict(letter == gold, letter, "match" if letter == gold else "different letter", lenient)


def _gold_letter(text: str) -> str:
    found = _ALONE.fullmatch(text.upper())
    if found is None:
        raise InputError(f"answer: {text!r} is not a choice; allowed are the letters A to E")
    return _letter(found)


def _letter(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()
