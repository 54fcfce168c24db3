r"""Where the steps of a written chain of thought begin: line breaks, ends of sentences, code blocks; by rules alone.

A step ends
- after a line break (blank lines go with it), and before an ``\item``;
- after a fenced code block, which is one step, also where its fence is never closed;
- after a sentence: full stop, question or exclamation mark, with closing quotes, brackets or emphasis behind it, where
  white space follows (a full stop of Chinese or Japanese needs none).

It never ends
- inside a formula: ``$..$``, ``$$..$$``, ``\(..\)``, ``\[..\]``, or a LaTeX environment that holds no text;
- inside inline code, a number (``3.14``) or an address (no white space follows their points);
- after an abbreviation (``e.g.``, ``Mr.``, ``Fig. 3``) or an initial (``J. Smith``);
- right after what only counts the step: ``2.``, ``(b).``, ``Step 3.``

White space before a sentence belongs to it, as it does to the first token of a byte-level or SentencePiece tokenizer.
A formula that is opened and never closed protects nothing. No paper: a step a line (Lightman et al., 2305.20050) is the
common rule, and sentences within a line are what it misses.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

ABBREVIATIONS = frozenset("mr mrs ms dr prof messrs vs e.g i.e cf viz approx resp w.l.o.g w.r.t i.i.d".split())
"""Never the end of a sentence. Lower case, without the last full stop, as are the two below."""
BEFORE_NUMBERS = frozenset("no nos fig figs eq eqs sec ch vol p pp thm def ex prop cor".split())
"""Abbreviations where a number or a formula follows."""
BEFORE_LOWER_CASE = frozenset("etc al inc jr sr ltd co dept est st min max avg".split())
"""Abbreviations where no capital follows; as is every word with full stops inside (`p.m.`, `U.S.`)."""
NAMING = frozenset("is are answer option choice case point = : line".split())
"""Words after which a capital letter with a full stop is a value (`the answer is B.`), not an initial."""
TEXT_ENVIRONMENTS = "enumerate|itemize|description|document|center|proof|solution"
LONGEST_FORMULA = 4000
"""Characters; what is opened and not closed within so many is no formula."""

_PROTECTED = re.compile(
    r"(?P<code>^[ \t]*```.*?(?:^[ \t]*```[^\n]*\n*|\Z))"
    rf"|\\\[.{{,{LONGEST_FORMULA}}}?\\\]|\\\(.{{,{LONGEST_FORMULA}}}?\\\)"
    rf"|(?<!\\)\$\$.{{,{LONGEST_FORMULA}}}?(?<!\\)\$\$"
    # Inline maths stays within its paragraph, starts and ends with no space, and has no digit behind it: otherwise
    # `$5 here and $7 there` would be one formula.
    rf"|(?<!\\)\$(?=[^\s$])(?:(?!\n\s*\n)[^$]){{,{LONGEST_FORMULA}}}?(?<=[^\s\\])\$(?!\d)"
    rf"|\\begin\{{(?!(?:{TEXT_ENVIRONMENTS})\b)(?P<name>[A-Za-z]+\*?)\}}.{{,{LONGEST_FORMULA}}}?\\end\{{(?P=name)\}}"
    r"|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)
_LINE_END = re.compile(r"\n\s*\n|\n|(?=\\item\b)")
# A sentence that ends its line is ended by the line break. A run of marks is tried from its first alone: a response of
# nothing but dots would take quadratic time.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"')\]}*_”’»]*(?=[^\S\n]+\S)|[。！？]+[」』”）]*(?!\s*\n)")
_LAST_WORD = re.compile(r"(?:(?P<before>\S+)\s+)?[(\[\"'“*_]*(?P<word>\S*)\.[\"')\]}*_”’»]*\Z")
_COUNTER = re.compile(r"[\s#>*_]*(?:(?:step|part|case)\s+)?\(?(?:\d{1,3}|[a-h]|[ivx]+)\)?[.][*_]*", re.IGNORECASE)


class _Span(NamedTuple):
    start: int
    end: int
    is_code: bool


def step_starts(text: str) -> list[int]:
    """Places in the text where a step begins, rising, the first 0; none for a text without a character.

    >>> step_starts("2 + 3.5 = 5.5. So x is 5.5, e.g. more.")
    [0, 14]
    """
    spans = [_Span(found.start(), found.end(), found["code"] is not None) for found in _PROTECTED.finditer(text)]
    lines, sentences = _line_ends(text, spans), _sentence_ends(text, spans)
    starts = [0] if text else []
    for place in sorted(lines | sentences):
        step = text[starts[-1] : place]
        counts_only = place not in lines and _COUNTER.fullmatch(step) is not None
        if step.strip() and text[place:].strip() and not counts_only:
            starts.append(place)
    return starts


def split_steps(text: str) -> list[str]:
    """The steps of a text; put together they are the text."""
    return [text[a:b] for a, b in pairwise([*step_starts(text), len(text)])]


def _line_ends(text: str, spans: list[_Span]) -> set[int]:
    ends = {found.end() for found in _LINE_END.finditer(text) if not _is_inside(found.start(), spans)}
    return ends | {span.end for span in spans if span.is_code}


def _sentence_ends(text: str, spans: list[_Span]) -> set[int]:
    found = [found for found in _SENTENCE_END.finditer(text) if not _is_inside(found.start(), spans)]
    return {one.end() for one in found if not _is_abbreviated(text[: one.end()], text[one.end() :].lstrip()[:1])}


def _is_inside(place: int, spans: list[_Span]) -> bool:
    return any(span.start <= place < span.end for span in spans)


def _is_abbreviated(head: str, follows: str) -> bool:
    """Whether the full stop that `head` ends with, before the character `follows`, belongs to the word before it."""
    found = _LAST_WORD.search(head[-200:])
    if found is None:
        return False
    word = found["word"]
    if word.lower() in ABBREVIATIONS:
        return True
    if word.lower() in BEFORE_NUMBERS:
        return follows.isdigit() or follows in "($\\"
    if word.lower() in BEFORE_LOWER_CASE or re.fullmatch(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]", word):
        return not follows.isupper()
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return is_initial and follows.isupper() and (found["before"] or "").lower() not in NAMING
