"""How well places agree: critical tokens with the truth, and ways of finding them with each other.

Places are steps (or tokens), one a response, None where none is named. Counting only; intervals are Wilson's, responses
taken as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechreward.chains.labels import Tally
from mechreward.errors import InputError

Places = Sequence[int | None]


@dataclass(frozen=True)
class Located:
    """Named places against the truth."""

    precision: Tally
    """Of the places named, those that are the true one; None of them is named where `total` is 0."""
    recall: Tally
    """Of the true places, those named."""


def locate(named: Places, true: Places) -> Located:
    """Precision and recall of places, one a response.

    Raises:
        InputError: if the two are not as many, or no true place is known.
    """
    hits = len(_both_same(named, true))
    n_named, n_true = len(named) - list(named).count(None), len(true) - list(true).count(None)
    if not n_true:
        raise InputError(f"true: none of {len(true)} places is known; there is nothing to find")
    return Located(Tally(hits, n_named), Tally(hits, n_true))


def agreement(one: Places, other: Places) -> Tally:
    """Of the responses for which both name a place, those for which it is the same."""
    both = [pair for pair in zip(one, other, strict=True) if None not in pair]
    return Tally(len(_both_same(one, other)), len(both))


def lowest(scores: Sequence[float]) -> int:
    """Place of the lowest score, the first of equal ones.

    Raises:
        InputError: if there are no scores.
    """
    if not scores:
        raise InputError("scores: there are none; a response has at least one token")
    return min(range(len(scores)), key=lambda t: scores[t])


def first_below(scores: Sequence[float], threshold: float) -> int | None:
    """First place whose score is below the threshold; None if no score is."""
    return next((t for t, score in enumerate(scores) if score < threshold), None)


def _both_same(one: Places, other: Places) -> list[int]:
    if len(one) != len(other):
        raise InputError(f"places: {len(one)} and {len(other)} are given; both need one a response")
    return [a for a, b in zip(one, other, strict=True) if a is not None and a == b]
