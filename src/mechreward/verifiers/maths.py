"""Mathematical answers, compared by math-verify: `1/2`, `0.5` and `\\frac{1}{2}` are one answer.

Strict extraction reads the answer marker: the last ``\\boxed{}``, else the last "answer is", else the last ``####``.
What math-verify passes over is refused here first: words that change a value (``3 \\text{ million}`` is not 3), an
inequality sign, a second number (``18–20``), and the formula that a phrase says it is not (``$20$, not $18$``) or
gives its reason by (``20, since 38 - 20 = 18``).
Lenient extraction is math-verify's own over the whole text (its last formula or number, roughly). Two whole numbers are
compared here, exactly; everything else goes to a helper process (`maths_worker.py`).

Why a process: the answer is model-written, and `9^{9^9}` keeps SymPy busy for good inside C code, where math-verify's
own alarm does not reach; nor does that work outside the main thread. The helper is killed by the system's timer after
`TIME_LIMIT` seconds of its own processor time (a busy machine changes no verdict), and the answer then counts as
different. One helper a process is kept; starting it takes a second.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from decimal import Decimal
from pathlib import Path

from mechreward.verifiers.marked import Marked, find_marked
from mechreward.verifiers.number import SCALE, parse_number
from mechreward.verifiers.text import Gold, answer_text, gold_text
from mechreward.verifiers.verdict import Verdict

TIME_LIMIT = 5.0
"""Seconds of processor time one comparison may take."""
LONGEST = 1000
"""Characters of the longest strict answer that is compared; longer ones are different."""

# The spaces by which LaTeX parts thousands: `10\,000`.
_GROUPED = re.compile(r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))")
# Words after a number, except those that change its value or take it back.
_UNIT = re.compile(
    rf"(?<=[0-9.%$])(?:\s+(?!{SCALE}|(?:pi|and|or|to|plus|minus|times|is|but|not)\b)[A-Za-z]{{2,}})+$", re.IGNORECASE
)
_DENIED = re.compile(
    r",?\s+(?:(?:and|but) )?(?:not|instead of|rather than|although|though|which|because|since|so)\b.*", re.DOTALL
)
# A thousand or a million by its letter: of money, or a k as a word.
_LETTER = r"(?:[$€£¥₹]\s?[0-9.,]+\s?|[0-9]\s?\\text\{\s*(?=k))[kKMB](?!\w)"
_SCALE = re.compile(rf"{SCALE}|{_LETTER}", re.IGNORECASE)
_INEQUALITY = re.compile(r"[\s$]*(?:[<>≤≥≠]|\\(?:geq?|leq?|neq?|gt|lt)(?![a-z]))")
_SEVERAL = re.compile(
    r"[0-9]\s*(?:[–—~|;…→]|\.{2,}|\\{2}|\\?_0|[$]\s+[$]|\\(?:text|mathrm)\s*\{[^{}]*\})\s*(?:\\?[$€£])?[0-9]"
)
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_lock = threading.Lock()
_workers: dict[int, subprocess.Popen[str]] = {}


def math(prompt: object, completion: object, answer: Gold = None) -> Verdict:
    """Judges a completion by mathematical equality. May be called from any thread.

    Args:
        prompt: text or chat; read only where `answer` is not given, for the gold answer after its ``####``.
        completion: text or chat.
        answer: the gold answer, in LaTeX or plain, with or without dollar signs.

    Raises:
        InputError: if the gold answer is missing.
        RuntimeError: if the helper process cannot be started.

    >>> math("Halve one.", r"It is \\boxed{0.5}.", r"\\frac{1}{2}").correct
    True
    """
    gold = gold_text(prompt, answer)
    text = answer_text(completion)
    extracted, same, reason = _judge_strictly(gold, find_marked(text))
    # What was too slow or too long once would be again.
    lenient = bool(text.strip()) and same is not None and bool(_compare(gold, text))
    return Verdict(bool(same), extracted, reason, lenient)


def _judge_strictly(gold: str, marked: Marked | None) -> tuple[str | None, bool | None, str]:
    """What was extracted, whether it equals the gold (None: could not be told), and the reason."""
    if marked is None:
        return None, False, "no answer marker"
    if not marked.text:
        return None, False, "nothing at the marker"
    if len(marked.text) > LONGEST:
        return marked.text[:LONGEST], None, "answer too long"
    same = _same(gold, marked)
    return marked.text, same, {True: "match", False: "different answer", None: "took too long to compare"}[same]


def _same(gold: str, marked: Marked) -> bool | None:
    gold, answer = _GROUPED.sub("", gold), _GROUPED.sub("", marked.text)
    if marked.marker != "boxed":
        answer = _DENIED.sub("", answer)
        # "the answer is 18 dollars": in running text a unit is no formula. It stays where the gold answer has one.
        answer = answer if _UNIT.search(gold) else _UNIT.sub("", answer)
    ours, theirs = parse_number(gold), parse_number(answer.strip("$"))
    if _is_another(gold, answer) or (ours is not None and _SEVERAL.search(answer)):
        return False
    if ours is not None and theirs is not None and _is_whole(ours) and _is_whole(theirs):
        return ours == theirs
    return _compare(gold, _as_formula(_typeset(answer)))


def _is_another(gold: str, answer: str) -> bool:
    """Whether the two are not as many thousands, say, or the answer alone begins with the sign of an inequality."""
    scales = [_SCALE.findall(text.lower()) for text in (gold, answer)]
    return scales[0] != scales[1] or bool(_INEQUALITY.match(answer) and not _INEQUALITY.match(gold))


def _typeset(text: str) -> str:
    """With the powers and fractions that are characters of their own as LaTeX: `18½`, `3²`. Those of units stay."""
    text = re.sub(r"(?<=[0-9)])[⁰¹²³⁴-⁹]+", lambda found: f"^{{{found[0].translate(_POWERS)}}}", text)
    parts = (unicodedata.normalize("NFKC", c).split("⁄") if c in _FRACTIONS else [c] for c in text)
    return "".join(part[0] if len(part) == 1 else rf"\frac{{{part[0]}}}{{{part[1]}}}" for part in parts)


def _is_whole(number: Decimal) -> bool:
    return number == number.to_integral_value()


def _as_formula(answer: str) -> str:
    if "$" in answer.replace("\\$", "") or "\\boxed" in answer or "\\(" in answer or "\\[" in answer:
        return answer
    return f"${answer}$"


def _compare(gold: str, text: str) -> bool | None:
    """Asks the helper whether what math-verify reads in the text equals the gold; None if it died of the time limit."""
    with _lock:
        worker = _workers.get(os.getpid())
        if worker is None or worker.poll() is not None:
            worker = _workers[os.getpid()] = _start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps({"gold": _as_formula(gold), "text": text, "seconds": TIME_LIMIT}) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return None
        reply = worker.stdout.readline()
        if not reply:
            worker.wait()
            return None
        return bool(json.loads(reply))


def _start() -> subprocess.Popen[str]:
    # -P: the folder of this package must not shadow the standard library's modules of the same names.
    command = [sys.executable, "-P", str(Path(__file__).with_name("maths_worker.py"))]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii", start_new_session=True
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError(f"the math-verify helper did not start (exit code {worker.wait()}): {' '.join(command)}")
    return worker


@atexit.register
def _stop() -> None:
    worker = _workers.pop(os.getpid(), None)
    if worker is not None:
        worker.communicate()
