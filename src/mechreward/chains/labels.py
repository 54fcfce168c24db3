"""Whether a step is right: by where it leads (rollouts), or by a worked solution.

By rollouts, Math-Shepherd (2312.08935): from the end of each step the policy finishes the response N = 8 times; the
hard label is whether any is right, the soft label the share that is. It judges the state a step leaves behind, for this
policy: a step after a mistake is labelled wrong whatever it says. "Lessons of PRMs" (2501.07301) finds such labels
noisier than a judge's; the soft label has Wilson's interval, and at N = 8 it is wide.

By a solution: the equations and values of a step have to occur in the worked solution, in order. There is no paper. It
takes another sound way for a mistake, so it is for tasks whose solutions go one way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from statsmodels.stats.proportion import proportion_confint

from mechreward.chains.split import split_steps
from mechreward.chains.steps import Step
from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import Response, continue_responses, verify_responses
from mechreward.tasks import Question
from mechreward.verifiers import Verifier
from mechreward.verifiers.number import parse_number


@dataclass(frozen=True)
class Tally:
    """Rollouts from one place of a response, and how many of them were right."""

    right: int
    total: int

    @property
    def hard(self) -> bool:
        """Any right."""
        return self.right > 0

    @property
    def soft(self) -> float:
        """Share right."""
        return self.right / self.total

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the soft label."""
        low, high = proportion_confint(self.right, self.total, alpha=1 - level, method="wilson")
        return float(low), float(high)


@dataclass(frozen=True)
class Roller:
    """How responses are finished and judged: policy, questions, verifier, and the settings of sampling."""

    loaded: LoadedModel
    questions: Sequence[Question]
    verifier: Verifier
    max_new_tokens: int
    """Of a whole completion, the kept tokens included."""
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 0

    def tally(self, responses: Sequence[Response], starts: Sequence[int], n: int, salt: int = 0) -> list[Tally]:
        """Finishes each response `n` times from its start on. Another `salt` gives other draws.

        Raises:
            InputError: as `continue_responses` and `verify_responses`.
        """
        groups = continue_responses(
            self.loaded,
            responses,
            starts,
            n=n,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=self.seed + salt,
        )
        judged = verify_responses([r for group in groups for r in group], self.questions, self.verifier)
        rights = [bool(r.correct) for r in judged]
        return [Tally(sum(rights[i * n : (i + 1) * n]), n) for i in range(len(responses))]


def label_by_rollouts(
    roller: Roller, responses: Sequence[Response], chains: Sequence[Sequence[Step]], n: int = 8
) -> list[list[Tally]]:
    """Math-Shepherd's labels: one tally a step, of `n` rollouts from the step's end.

    After the last step nothing is left to draw: its tally repeats the response's own verdict.

    Args:
        chains: the steps of each response, as `decompose` gives them.

    Raises:
        InputError: if chains and responses are not as many, or a chain has no steps; as `Roller.tally`.
    """
    check_chains(responses, chains)
    places = [(row, step.token_end) for row, steps in enumerate(chains) for step in steps]
    tallies = iter(roller.tally([responses[row] for row, _ in places], [end for _, end in places], n))
    return [[next(tallies) for _ in steps] for steps in chains]


def check_chains(responses: Sequence[Response], chains: Sequence[Sequence[Step]]) -> None:
    """Raises:
    InputError: if there is not one chain with steps a response, that covers its tokens.
    """
    if len(responses) != len(chains):
        raise InputError(f"chains: {len(chains)} are given for {len(responses)} responses; give one each")
    for response, steps in zip(responses, chains, strict=True):
        if not steps:
            raise InputError(f"chains: that of a response to {response.question_id} has no steps; decompose it first")
        if steps[-1].token_end != len(response.completion_ids):
            n_tokens = f"{steps[-1].token_end} tokens, its response {len(response.completion_ids)}"
            raise InputError(f"chains: one for {response.question_id} has {n_tokens}; decompose that very response")


class Equation(NamedTuple):
    """A value, and the numbers it was worked out from, in any order; none where only the value is written."""

    numbers: frozenset[tuple[Decimal, int]]
    value: Decimal


_NUMBER = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_RESULT = re.compile(rf"=\s*(-?\s*\\?\$?|\\?\$?\s*-?)\s*({_NUMBER})")
_SIDE = re.compile(r"[=\n;:]")
_ANY = re.compile(rf"(?<![\w.])(-?{_NUMBER})")


def equations(text: str) -> list[Equation]:
    """What a text works out, in order: each number right of an equals sign with the numbers left of it.

    A text without an equals sign gives its last number alone.

    >>> [str(equation.value) for equation in equations("2 + 3 = 5, so 5 * 2 = 10")]
    ['5', '10']
    """
    text = text.replace("−", "-")
    found, end = [], 0
    for match in _RESULT.finditer(text):
        # Split off behind the match: a pattern for both sides begins a search at every character of a long line.
        left = _SIDE.split(text[end : match.start()])[-1]
        found.append(_equation(left, ("-" if "-" in match[1] else "") + match[2]))
        end = match.end()
    plain = _ANY.findall(text)
    return found or [_equation("", number) for number in plain[-1:]]


def _equation(left: str, right: str) -> Equation:
    numbers = Counter(_value(number) for number in re.findall(_NUMBER, left))
    return Equation(frozenset(numbers.items()), _value(right))


def _value(number: str) -> Decimal:
    tidied = parse_number(number.rstrip(","))
    return Decimal(number.replace(",", "")) if tidied is None else tidied


def label_by_solution(steps: Sequence[str], solution: str) -> list[bool | None]:
    """Compares a chain with a worked solution, step by step.

    A step is right if each of its equations occurs in the solution after those found before: the same value and, where
    it names them, from the same numbers. Only for a solution of bare values is the value enough. A step that works
    nothing out is None.

    Args:
        steps: texts of the chain's steps.
        solution: the worked solution.

    Raises:
        InputError: for a chain without steps, or a solution without any number.
    """
    if not steps:
        raise InputError("steps: the chain has none; decompose the response first")
    left = [equation for step in split_steps(solution) for equation in equations(step)]
    if not left:
        raise InputError(f"solution: {solution[:40]!r} has no number to compare with; give a worked solution")
    bare = not any(equation.numbers for equation in left)
    labels: list[bool | None] = []
    for step in steps:
        verdicts = []
        for equation in equations(step):
            place = next((i for i, known in enumerate(left) if _agree(equation, known, bare)), None)
            verdicts.append(place is not None)
            left = left if place is None else left[place + 1 :]
        labels.append(all(verdicts) if verdicts else None)
    return labels


def _agree(written: Equation, known: Equation, bare: bool) -> bool:
    return written.value == known.value and (bare or not written.numbers or written.numbers == known.numbers)


def first_wrong(labels: Sequence[bool | None]) -> int | None:
    """Index of the first step that is wrong; None if there is none."""
    return next((index for index, right in enumerate(labels) if right is False), None)
