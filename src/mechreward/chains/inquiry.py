"""What the EXAMINER is asked about a chain, a question or a feature, and how its claims are checked.

Requests are built here, `examine` (`claims.py`) puts them, and each check compares a claim with something that was
measured: rollouts, the numbers of a question, where a feature fires. A claim without a measurement stays unchecked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mechreward.chains.claims import Claim, Examined, Request, checked, examine, fill_prompt, read_verdict
from mechreward.chains.examiner import Examiner, Patience
from mechreward.chains.labels import Tally
from mechreward.chains.steps import Step
from mechreward.errors import InputError
from mechreward.rollout import Response
from mechreward.tasks import Question, Variation


def step_subject(name: str, step: int) -> str:
    """The subject of step `step` of the response called `name`."""
    return f"{name}/{step}"


def ask_verdicts(name: str, question: Question, steps: Sequence[Step]) -> list[Request]:
    """Whether each step is right; `name` tells the response from others.

    Raises:
        InputError: for a chain without steps.
    """
    return [
        Request("verdict", step_subject(name, i), fill_prompt("verdict", **_context(question, steps, i)))
        for i in range(_n_steps(steps))
    ]


def ask_clarifying(name: str, question: Question, steps: Sequence[Step], count: int = 3) -> list[Request]:
    """`count` clarifying questions on each step.

    Raises:
        InputError: for a chain without steps, or a count below 1.
    """
    if count < 1:
        raise InputError(f"count: {count} is too small; ask at least 1 question")
    return [
        Request("clarify", step_subject(name, i), fill_prompt("clarify", count=count, **_context(question, steps, i)))
        for i in range(_n_steps(steps))
    ]


def ask_paraphrases(questions: Sequence[Question]) -> list[Request]:
    """Each question in other words."""
    return [Request("paraphrase", q.id, fill_prompt("paraphrase", question=q.prompt)) for q in questions]


def reword(
    examiner: Examiner,
    questions: Sequence[Question],
    *,
    patience: Patience | None = None,
    path: str | Path | None = None,
) -> tuple[list[Variation], dict[str, str]]:
    """The questions in the examiner's words: variations of the kind `examiner`, with the answers there were.

    Only paraphrases that pass `check_paraphrases` are kept: every number is still there. That they ask for the same is
    the examiner's claim.

    Args:
        path: of `examine`.

    Returns:
        The variations, and why a question has none, by its id.

    Raises:
        InputError: as `examine`.
    """
    examined = examine(examiner, ask_paraphrases(questions), patience=patience, path=path)
    left_out = dict(examined.skipped)
    made = []
    for question, claim in zip(questions, check_paraphrases(examined.claims, questions), strict=True):
        if claim is None:
            continue
        if claim.checked:
            made.append(Variation.make(question, "examiner", 0, prompt=claim.text))
        else:
            left_out[question.id] = "other numbers, or the same words"
    return made, left_out


def ask_feature(name: str, firing: Sequence[str], silent: Sequence[str]) -> Request:
    """What a feature responds to, from texts in which it fires (there between « and ») and texts in which it does not.

    Raises:
        InputError: if no text fires.
    """
    if not firing:
        raise InputError(f"firing: feature {name} has no text in which it fires; it cannot be described")
    shown = {"firing": "\n".join(f"- {text}" for text in firing), "silent": "\n".join(f"- {text}" for text in silent)}
    return Request("feature", name, fill_prompt("feature", **shown))


def expand(
    answerer: Examiner,
    question: Question,
    steps: Sequence[Step],
    clarifying: Sequence[Claim | None],
    *,
    patience: Patience | None = None,
) -> Examined:
    """COT squared: the clarifying questions of each step are answered by a model, the TARGET or the examiner.

    Args:
        clarifying: the claims of `ask_clarifying`, one a step; a None is left out.

    Returns:
        One claim a clarifying question, whose text holds the question and the answer, each on its line.

    Raises:
        InputError: if the claims are not one a step; as `examine`.
    """
    if len(clarifying) != _n_steps(steps):
        raise InputError(f"clarifying: {len(clarifying)} claims are given for {len(steps)} steps; give one each")
    asks, requests = [], []
    for i, claim in enumerate(clarifying):
        for k, ask in enumerate([] if claim is None else claim.text.splitlines()):
            assert claim is not None
            prompt = fill_prompt("answer", ask=ask, **_context(question, steps, i))
            asks.append(ask)
            requests.append(Request("expansion", f"{claim.subject}/{k}", prompt))
    answered = examine(answerer, requests, patience=patience)
    claims = [
        None if claim is None else replace(claim, text=f"Q: {ask}\nA: {claim.text}")
        for ask, claim in zip(asks, answered.claims, strict=True)
    ]
    return Examined(claims, answered.skipped)


def check_verdicts(claims: Sequence[Claim | None], tallies: Mapping[str, Tally]) -> list[Claim | None]:
    """Verdicts against rollouts from the ends of their steps: `right` goes with a right rollout, `wrong` with none.

    Args:
        tallies: by subject; a claim on another subject, or of another kind, stays as it was.
    """
    return [
        claim
        if claim is None or claim.kind != "verdict" or claim.subject not in tallies
        else checked(claim, (claim.text == "right") == tallies[claim.subject].hard)
        for claim in claims
    ]


def with_expansion(
    tokenizer: PreTrainedTokenizerBase, response: Response, step: Step, expansion: str
) -> tuple[Response, int]:
    """The response up to the step's end with an expansion behind it, and its length in tokens: where to roll out from.

    Only the expansion is tokenised. Its tokens have no log-probability under the policy, NaN.
    """
    added = list(tokenizer(f"\n{expansion}\n", add_special_tokens=False)["input_ids"])
    ids = (*response.completion_ids[: step.token_end], *added)
    logprobs = (*response.logprobs[: step.token_end], *[nan] * len(added))
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    expanded = replace(response, completion_ids=ids, logprobs=logprobs, text=text, finish="length", correct=None)
    return expanded, len(ids)


def check_expansions(
    claims: Sequence[Claim | None], before: Mapping[str, Tally], after: Mapping[str, Tally]
) -> list[Claim | None]:
    """Expansions against rollouts: where the answer is reached from the step's end, it is from the expansion's end.

    Args:
        before, after: rollouts without and with the expansion, by subject; what is in one only stays unchecked.
    """
    return [
        claim
        if claim is None or claim.kind != "expansion" or not {claim.subject} <= before.keys() & after.keys()
        else checked(claim, after[claim.subject].hard or not before[claim.subject].hard)
        for claim in claims
    ]


def check_paraphrases(
    claims: Sequence[Claim | None],
    questions: Sequence[Question],
    before: Mapping[str, Tally] | None = None,
    after: Mapping[str, Tally] | None = None,
) -> list[Claim | None]:
    """Paraphrases against their questions: the same numbers as often, in other words.

    Args:
        before, after: rollouts on the question and on its paraphrase, by the question's id. Where both are given, the
            gold answer has to be reached from the paraphrase if it is from the question.
    """
    prompts = {question.id: question.prompt for question in questions}
    out: list[Claim | None] = []
    for claim in claims:
        if claim is None or claim.kind != "paraphrase" or claim.subject not in prompts:
            out.append(claim)
            continue
        prompt, name = prompts[claim.subject], claim.subject
        holds = _numbers(claim.text) == _numbers(prompt) and claim.text.split() != prompt.split()
        if before and after and name in before and name in after and before[name].hard:
            holds = holds and after[name].hard
        out.append(checked(claim, holds))
    return out


def check_feature(
    examiner: Examiner, claim: Claim, texts: Sequence[tuple[str, bool]], *, patience: Patience | None = None
) -> Claim:
    """A description against texts it was not made from: from it alone, the examiner has to tell most of those in which
    the feature fires from most of those in which it does not (detection scoring; balanced accuracy above 1/2).

    Args:
        texts: a text, and whether the feature fires in it; both kinds.

    Raises:
        InputError: if one kind is missing.
        ExaminerError: if an answer does not come.
    """
    kinds = Counter(fires for _, fires in texts)
    if len(kinds) < 2:
        raise InputError(f"texts: all {len(texts)} are of one kind; give some in which the feature fires, and others")
    hits: Counter[bool] = Counter()
    for text, fires in texts:
        prompt = fill_prompt("detect", description=claim.text, text=text)
        hits[fires] += ((patience or Patience()).ask(examiner, prompt, read_verdict) == "right") == fires
    return checked(claim, hits[True] / kinds[True] + hits[False] / kinds[False] > 1)


def _context(question: Question, steps: Sequence[Step], index: int) -> dict[str, str]:
    before = "".join(step.text for step in steps[:index])
    return {"question": question.prompt, "before": before, "step": steps[index].text}


def _n_steps(steps: Sequence[Step]) -> int:
    if not steps:
        raise InputError("steps: the chain has none; decompose the response first")
    return len(steps)


def _numbers(text: str) -> Counter[str]:
    """A minus counts as a sign where nothing to be lessened stands before it."""
    return Counter(re.findall(r"(?:(?<![\w)])-)?(?:\d+(?:[.,]\d+)*|\.\d+)", text.replace("\u2212", "-")))
