"""What the EXAMINER says, kept as claims: who said it of what, and whether it has been checked.

A claim is not a fact. Each kind has a check that asks something else than the examiner:

- `verdict`, on a step: against rollouts from the step's end (`inquiry.check_verdicts`);
- `paraphrase`, of a question: every number is still there, and rollouts on it still reach the answer
  (`inquiry.check_paraphrases`);
- `expansion`, of a step: rollouts that go on from the chain with the answer put in still reach the answer
  (`inquiry.check_expansions`);
- `feature`, a description: against the texts the feature really fires in (`inquiry.check_feature`).

A clarifying question states nothing and has no check.

`examine` writes every claim to a JSON Lines file as it comes, so that nothing is lost when a server goes away; a second
call with the same file asks only what is still open.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal, get_args

from mechreward.chains.examiner import Examiner, ExaminerError, Patience
from mechreward.errors import InputError
from mechreward.files import append_row, make_folder, sha256_bytes

Kind = Literal["verdict", "clarify", "expansion", "paraphrase", "feature"]
DOWN = 5
"""Requests skipped one after another after which an examiner counts as down."""


@dataclass(frozen=True)
class Claim:
    """Something a model said of a subject."""

    kind: Kind
    subject: str
    """What it is about, by a name of the caller's: `q7/3/2` for a step, a question's id, a feature's."""
    text: str
    """What was said, without the form it was asked for in."""
    model: str
    """Who said it."""
    checked: bool | None = None
    """Whether it held when it was checked; None while it has not been."""
    asked: str = field(default="", compare=False)
    """SHA-256 of the prompt: another question on the same subject is not answered by it."""


@dataclass(frozen=True)
class Request:
    """One thing to be asked."""

    kind: Kind
    subject: str
    prompt: str


@dataclass(frozen=True)
class Examined:
    """Claims in the order of the requests, None for each that was skipped, and the reasons of those."""

    claims: list[Claim | None]
    skipped: dict[str, str]
    """By subject, the last error."""


def fill_prompt(name: str, **values: str | int) -> str:
    """A prompt of the folder `prompts` with its values filled in.

    Raises:
        InputError: if there is no such prompt, or a value is missing.
    """
    folder = files("mechreward.chains") / "prompts"
    names = sorted(path.name.removesuffix(".txt") for path in folder.iterdir() if path.name.endswith(".txt"))
    if name not in names:
        raise InputError(f"prompt: {name!r} is not known; allowed are {', '.join(names)}")
    try:
        return Template((folder / f"{name}.txt").read_text(encoding="utf-8")).substitute(values)
    except KeyError as error:
        raise InputError(f"prompt: {name!r} needs a value for {error.args[0]}; it has {', '.join(values)}") from error


def examine(
    examiner: Examiner,
    requests: Sequence[Request],
    *,
    patience: Patience | None = None,
    path: str | Path | None = None,
) -> Examined:
    """Asks each request in turn; one that gets no usable answer is skipped and counted.

    After `DOWN` skipped in a row the examiner counts as down: each further request is tried once, without waiting,
    until one is answered.

    Args:
        path: a JSON Lines file that claims are added to as they come, and read from: what it holds (the same kind,
            subject, model and prompt) is not asked again.

    Raises:
        InputError: if two requests have one kind and subject, or the examiner refuses for good; as `load_claims`.
    """
    times = Counter((request.kind, request.subject) for request in requests)
    twice = next((key for key, count in times.items() if count > 1), None)
    if twice is not None:
        raise InputError(f"requests: {twice[0]} of {twice[1]!r} is asked twice; each subject may come once a kind")
    patience = patience or Patience()
    told = [] if path is None else load_claims(path)
    known = {(claim.kind, claim.subject, claim.model, claim.asked): claim for claim in told}
    claims: list[Claim | None] = []
    skipped: dict[str, str] = {}
    in_a_row = 0
    for request in requests:
        asked = sha256_bytes(request.prompt.encode())
        before = known.get((request.kind, request.subject, examiner.name, asked))
        if before is not None:
            claims.append(before)
            continue
        given = patience if in_a_row < DOWN else replace(patience, tries=1)
        try:
            text = given.ask(examiner, request.prompt, READERS[request.kind])
        except ExaminerError as error:
            skipped[request.subject] = str(error)
            claims.append(None)
            in_a_row += 1
            continue
        in_a_row = 0
        claim = Claim(request.kind, request.subject, text, examiner.name, asked=asked)
        claims.append(claim)
        if path is not None:
            _append(Path(path), claim)
    return Examined(claims, skipped)


def load_claims(path: str | Path) -> list[Claim]:
    """Claims of a JSON Lines file, in order; none if it is missing.

    Raises:
        InputError: naming the first line that is no claim.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_text().split("\n")[:-1]  # a last line without its line break is half a one, of a kill
    return [_claim(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _claim(line: str, where: str) -> Claim:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    match row:
        case {"kind": str(kind), "subject": str(), "text": str(), "model": str(), **rest} if (
            kind in get_args(Kind)
            and rest.keys() <= {"checked", "asked"}
            and isinstance(rest.get("checked"), bool | None)
            and isinstance(rest.get("asked", ""), str)
        ):
            return Claim(**row)
    kinds = ", ".join(get_args(Kind))
    raise InputError(f"claims: {where} is no claim; it needs subject, text, model and a kind, one of {kinds}")


def _append(path: Path, claim: Claim) -> None:
    make_folder(path.parent)
    append_row(path, asdict(claim))


def read_verdict(answer: str) -> str:
    """`right` or `wrong`, from the last verdict line; one that names both, or the prompt's two lines again, is none."""
    found = list(re.finditer(r"^\W*VERDICT\W+(right|wrong)\b(.*)$", answer, re.IGNORECASE | re.MULTILINE))
    if not found:
        raise ExaminerError(f"no verdict in {answer[:60]!r}")
    last, said = found[-1], found[-1][1].lower()
    other = "right" if said == "wrong" else "wrong"
    before = re.search(r"VERDICT\W+(right|wrong)\W*\Z", answer[: last.start()], re.IGNORECASE)
    if re.search(rf"\b{other}\b", last[2], re.IGNORECASE) or (before and before[1].lower() == other):
        raise ExaminerError(f"both verdicts at the end of {answer[-60:]!r}")
    return said


def read_questions(answer: str) -> str:
    """The questions, one a line."""
    return "\n".join(_lines_after(answer, "Q"))


def _after(mark: str) -> Callable[[str], str]:
    return lambda answer: _lines_after(answer, mark)[-1]


def _lines_after(answer: str, mark: str) -> list[str]:
    # Behind the mark only what dresses a text may go: a sign or a bracket belongs to it.
    found = re.findall(rf"^\W*{mark}\d*[:.)][\s*_\"'`]*(\S.*?)\s*$", answer, re.IGNORECASE | re.MULTILINE)
    if not found:
        raise ExaminerError(f"no line with {mark}: in {answer[:60]!r}")
    return [str(line) for line in found]


def _whole(answer: str) -> str:
    return answer.strip()


READERS: dict[Kind, Callable[[str], str]] = {
    "verdict": read_verdict,
    "clarify": read_questions,
    "expansion": _whole,
    "paraphrase": _after("PROBLEM"),
    "feature": _after("FEATURE"),
}


def checked(claim: Claim, holds: bool) -> Claim:
    """The claim with what its check found."""
    return replace(claim, checked=holds)
