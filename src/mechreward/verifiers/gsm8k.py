"""GSM8K's exact match: the number after the first ``####`` (openai/grade-school-math, `dataset.py`).

The official rule takes the first match of ``#### (-?[0-9.,]+)``, drops commas and compares strings. Ours compares the
same place as exact numbers, and so departs from it in what it forgives and what it refuses:

- forgiven: `18.00`, `18.` and `+18` for 18; a currency or percent sign, Markdown emphasis, any space after the marker;
- refused: commas that group no thousands (`1,2`), and the first term of what goes on (`1/2`, `12 + 7 = 19`, `3:30`,
  `3 million`, `2 x 9`, `2**9`, `1 800`, `1{,}800`, `18, 20`, `18 or 20`).

Lenient extraction takes the last number of the text.
"""

from __future__ import annotations

import re

from mechreward.errors import InputError
from mechreward.verifiers.number import SCALE, last_number, parse_number, tidy_number
from mechreward.verifiers.text import Gold, answer_text, gold_text
from mechreward.verifiers.verdict import Verdict

# Furniture before the digits, then every digit, comma and point there is, then marks that may follow.
_MARKED = re.compile(r"####[^\S\n]*[*_`]*((?:[-+−]|\\?[$€£¥₹] ?){0,3}[.,]*[0-9][0-9.,]*)([^\n]*)")
_TERM = r"\s*\\?[$€£¥₹]?[0-9(]"
_GOES_ON = re.compile(
    rf"\s*(?:[-+−–—~/:^×÷*·=⁄±→]|//|-+>){_TERM}|[eE][-+]?[0-9]"  # a sum, a ratio, a range, an exponent
    r"|(?:\s*\*\*|\s+\*\*\s+|\s*%\s*)[0-9]"  # Python's power and remainder; `**18** (each)` is emphasis
    r"|(?:['’_;|&,\s]|\{,\}|\\[,;:! ])+\\?[$€£¥₹]?[0-9]"  # grouped digits, another number
    rf"|\s*(?:or|and|to|x|times|plus|minus|over|divided by){_TERM}"
    r"|\s*[⁰¹²³⁴-⁹½¼¾⅐-⅞√π]|\s*\\(?:d?frac|times|cdot|div|pm|sqrt|pi)(?![A-Za-z])"
    r"|\s+and a (?:half|quarter|third)\b"
    rf"|\s*{SCALE}|\s?[kKMB](?!\w)"
)


def gsm8k_exact_match(prompt: object, completion: object, answer: Gold = None) -> Verdict:
    """Judges a completion by GSM8K's rule.

    Args:
        prompt: text or chat; read only where `answer` is not given, for the gold answer after its ``####``.
        completion: text or chat.
        answer: the gold number, or a worked solution with ``####``.

    Raises:
        InputError: if the gold answer is missing or not a number.

    >>> gsm8k_exact_match("How much?", "9 * 2 = 18\\n#### $18.00", "18").correct
    True
    """
    written = gold_text(prompt, answer)
    gold = parse_number(written)
    if gold is None:
        raise InputError(f"answer: {written!r} is not a number; allowed are numbers like 18, -3.5 and $1,234")
    text = answer_text(completion)
    lenient = last_number(text) == gold
    found = _MARKED.search(text)
    if found is None:
        return Verdict(False, None, "no number after ####" if "####" in text else "no answer marker", lenient)
    raw, rest = found.groups()
    extracted = None if _GOES_ON.match(rest) else tidy_number(raw)
    if extracted is None:
        return Verdict(False, raw, "not a plain number", lenient)
    correct = parse_number(extracted) == gold
    return Verdict(correct, extracted, "match" if correct else "different number", lenient)
