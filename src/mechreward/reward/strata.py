"""Dense scores bounded inside each outcome of each prompt: HERO's stratified normalisation (2510.07242).

Within one prompt's group, with d the dense score and the minimum and maximum taken over the completions of the group
that have the same outcome (a stratum),

    wrong:  R = false - alpha * gap + 2 * alpha * gap * u
    right:  R = true  - beta  * gap + 2 * beta  * gap * u      u = (d - min) / (max - min + eps)

where gap = true - false; with outcomes of 0 and 1 these are the paper's own two lines. A stratum of one has
u = 0: a lone right answer is paid true - beta * gap. As alpha + beta < 1, no wrong answer reaches a right one of its
group, and inside a stratum the order is that of d.

Deviation: HERO's second part, which weighs whole prompts by the spread of their dense scores, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mechreward.errors import InputError

EPS = 1e-6


def stratified(
    outcomes: Sequence[float | None],
    dense: Sequence[float | None],
    prompts: Sequence[Any],
    levels: tuple[float, float],
    bounds: tuple[float, float],
    num_generations: int | None = None,
) -> list[float | None]:
    """One reward a row; None, and out of every stratum, where outcome or dense score is None.

    Args:
        outcomes: each one of the two `levels`.
        levels: (false, true), what a wrong and a right answer are worth.
        bounds: (alpha, beta).
        num_generations: as in `prompt_groups`.

    Raises:
        InputError: if a dense score is infinite, or the rows are no whole groups.
    """
    rewards: list[float | None] = [None] * len(outcomes)
    gap = levels[1] - levels[0]
    for group in prompt_groups(prompts, num_generations):
        for level, bound in zip(levels, bounds, strict=True):
            stratum = [(row, score) for row in group if (score := dense[row]) is not None and outcomes[row] == level]
            for row, share in _shares(stratum):
                rewards[row] = level + bound * gap * (2 * share - 1)
    return rewards


def prompt_groups(prompts: Sequence[Any], num_generations: int | None = None) -> Iterator[range]:
    """The rows of each prompt: runs of equal prompts, or `num_generations` rows each where that is given.

    Raises:
        InputError: if the rows do not make whole groups of `num_generations`, or one holds different prompts.
    """
    if num_generations is not None and len(prompts) % num_generations:
        raise InputError(f"num_generations: {len(prompts)} rows are not whole groups of {num_generations}")
    start = 0
    while start < len(prompts):
        end = start + 1
        while end < len(prompts) and prompts[end] == prompts[start] and end - start != num_generations:
            end += 1
        if num_generations is not None and end - start != num_generations:
            raise InputError(f"num_generations: rows {start} to {start + num_generations - 1} hold different prompts")
        yield range(start, end)
        start = end


def check_bounds(alpha: float, beta: float, num_generations: int | None) -> None:
    """Raises InputError unless the strata stay apart and a group can have a size."""
    if not (alpha > 0 and beta > 0 and alpha + beta < 1):
        raise InputError(f"alpha, beta: {alpha}, {beta} must be more than 0 and less than 1 in sum")
    if num_generations is not None and num_generations < 1:
        raise InputError(f"num_generations: {num_generations} is not allowed; it must be at least 1")


def _shares(stratum: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """u of each row: 0 for the lowest score, just below 1 for the highest."""
    for row, score in stratum:
        if math.isinf(score):
            raise InputError(f"rewards: the dense score of row {row} is infinite; mode 'stratified' needs finite ones")
    if stratum:
        # Halved, so that the difference of any two finite scores is finite too.
        low, high = (limit(score / 2 for _, score in stratum) for limit in (min, max))
        yield from ((row, (score / 2 - low) / (high - low + EPS / 2)) for row, score in stratum)
