"""Where a wrong response was lost: the first token after which none of N rollouts is right.

The ground truth of critical tokens in "Critical Tokens Matter" (2411.19943), with its reset: a place whose prefix has
no right rollout counts for nothing if a later prefix has more than 3 of 64. Step ends are scanned first, then the
tokens of the step that is found. Every place is looked at in order: the chance of a right answer rises and falls along
a response (a model corrects itself, or guesses), so a binary search would not be valid.

Deviations: rollouts at a place stop as soon as its verdict is known (a right one inside the step, more than the reset's
share at a step's end), which changes no verdict; inside the step the reset is not asked again, since the step's end and
all that follow have passed it; the paper's check by forbidding the token is left out. N has to be large against the
policy's own chance: where a good prefix leads to a right answer with chance p, it is taken for lost with (1 - p)^N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechreward.chains.labels import Roller, Tally, check_chains
from mechreward.chains.steps import Step
from mechreward.errors import InputError
from mechreward.rollout import Response

RESET = 3 / 64
ROUND = 8
"""Rollouts drawn at a time from places that are still open."""


@dataclass(frozen=True)
class Lost:
    """Where a response was lost, by rollouts."""

    token: int
    step: int
    step_ends: tuple[Tally, ...]
    """From each step's end. `total` is below N where fewer settled it, so `soft` is not an estimate there."""


def rollout_critical(
    roller: Roller, responses: Sequence[Response], chains: Sequence[Sequence[Step]], n: int = 64, reset: float = RESET
) -> list[Lost | None]:
    """The critical token of each wrong response; None where right rollouts remain to the end.

    Args:
        responses: wrong, verified ones.
        chains: their steps.
        n: rollouts that have to be wrong, all of them.
        reset: share of right rollouts above which a later place takes back what was found.

    Raises:
        InputError: for a response that is not wrong, n below 1, a reset outside [0, 1), or as `label_by_rollouts`.
    """
    if n < 1:
        raise InputError(f"n: {n} is too small; at least 1 rollout is needed")
    if not 0 <= reset < 1:
        raise InputError(f"reset: {reset} is out of range; it is a share from 0 to below 1")
    check_chains(responses, chains)
    check_wrong(responses)
    places = [(row, step.token_end) for row, steps in enumerate(chains) for step in steps]
    tallies = iter(_settle(roller, responses, places, n, int(reset * n) + 1))
    ends = [tuple(next(tallies) for _ in steps) for steps in chains]
    steps = [first_lost(tallies, reset * n) for tallies in ends]
    tokens = _first_tokens(roller, responses, chains, steps, n)
    return [
        None if step is None else Lost(tokens[row], step, tallies)
        for row, (step, tallies) in enumerate(zip(steps, ends, strict=True))
    ]


def check_wrong(responses: Sequence[Response]) -> None:
    """Raises:
    InputError: if a response is right or not verified; only a wrong one was lost somewhere.
    """
    odd = next((r for r in responses if r.correct is not False), None)
    if odd is not None:
        raise InputError(f"responses: one to {odd.question_id} has correct={odd.correct}; give wrong, verified ones")


def first_lost(tallies: Sequence[Tally], most_right: float) -> int | None:
    """Index of the first place with no right rollout after which no place has more than `most_right` of them."""
    found = None
    for index, tally in enumerate(tallies):
        if tally.right > most_right:
            found = None
        elif tally.right == 0 and found is None:
            found = index
    return found


def _first_tokens(
    roller: Roller,
    responses: Sequence[Response],
    chains: Sequence[Sequence[Step]],
    steps: Sequence[int | None],
    n: int,
) -> dict[int, int]:
    """By row, the first token inside its step with no right rollout after it; all rows go one token on at a time."""
    open_rows = {row: chains[row][step] for row, step in enumerate(steps) if step is not None}
    found = {row: step.token_end - 1 for row, step in open_rows.items()}
    offset = 0
    while open_rows:
        # The step's last token needs no rollouts: its end has been settled.
        open_rows = {row: step for row, step in open_rows.items() if step.token_start + offset < step.token_end - 1}
        places = [(row, step.token_start + offset + 1) for row, step in open_rows.items()]
        for (row, place), tally in zip(places, _settle(roller, responses, places, n, 1), strict=True):
            if tally.right == 0:
                found[row] = place - 1
                del open_rows[row]
        offset += 1
    return found


def _settle(
    roller: Roller, responses: Sequence[Response], places: Sequence[tuple[int, int]], n: int, enough: int
) -> list[Tally]:
    """Tallies of (row, start) places, of `n` rollouts or of as many as gave `enough` right ones."""
    tallies = [Tally(0, 0)] * len(places)
    drawn = 0
    while drawn < n:
        count = min(ROUND, n - drawn)
        still = [i for i, tally in enumerate(tallies) if tally.right < enough]
        fresh = roller.tally([responses[places[i][0]] for i in still], [places[i][1] for i in still], count, salt=drawn)
        for i, more in zip(still, fresh, strict=True):
            tallies[i] = Tally(tallies[i].right + more.right, tallies[i].total + more.total)
        drawn += count
    return tallies
