"""Mathematical answers, compared by math-verify: `1/2`, `0.5` and `\\frac{1}{2}` are one answer.

Strict extraction reads the answer marker: the last ``\\boxed{}``, else the last "answer is", else the last ``####``.
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
from decimal import Decimal
from pathlib import Path

from mechreward.verifiers.marked import Marked, find_marked
from mechreward.verifiers.number import parse_number
from mechreward.verifiers.text import Gold, answer_text, gold_text
from mechreward.verifiers.verdict import Verdict

TIME_LIMIT = 5.0
"""Seconds of processor time one comparison may take."""
LONGEST = 1000
"""Characters of the longest strict answer that is compared; longer ones are different."""

# Words after a number, except those that change its value.
_UNIT = re.compile(
    r"(?<=[0-9.%$])"
    r"(?:\s+(?!(?:hundred|thousand|million|billion|trillion|dozen|pi|and|or|to|plus|minus|times)\b)[A-Za-z]{2,})+$"
)
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
    # "the answer is 18 dollars": in running text a unit is no formula.
    answer = marked.text if marked.marker == "boxed" else _UNIT.sub("", marked.text)
    ours, theirs = parse_number(gold), parse_number(answer.strip("$"))
    if ours is not None and theirs is not None and _is_whole(ours) and _is_whole(theirs):
        return ours == theirs
    return _compare(gold, _as_formula(answer))


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
