"""Do answers, and a pack's signal, survive another wording? Families of an original question and its variations.

- Accuracy of the originals, of the variations, and of each kind of variation.
- Agreement: the chance that answers to two different members of a family are both right or both wrong; beside it the
  chance for two answers to the *same* member, which is all that can be asked of answers that are sampled.
- Signal: the reward's within-question AUROC on originals and on variations, of the families that have both; a family's
  variations weigh together as much as one of them, like its original. *Kept* is what is left of its lead over chance,
  (AUROC_variations - .5) / (AUROC_originals - .5). The interval of what is kept says whether a pack
  survives (all of it at or above `KEPT`) or is brittle (all below). Where the originals' own reaches .5 there is no
  signal to keep. Fewer than `MIN_MIXED` families with right and wrong answers on both sides are inconclusive: over one
  family a resample is that family again, and the interval has no width.

Every interval resamples whole families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import isfinite, isnan, nan
from typing import Any, Literal

import numpy as np

from mechreward.errors import InputError
from mechreward.features import PackRephrasing
from mechreward.gates.statistics import (
    Array,
    Interval,
    accuracy_interval,
    cluster_bootstrap,
    question_pairs,
    ratio,
)

KEPT = 0.5
"""Share of the lead over chance that has to be kept."""
MIN_MIXED = 10
"""Fewest families for any verdict but inconclusive."""
ORIGINAL = "original"


@dataclass(frozen=True)
class FamilyAnswer:
    """One verified answer to one member of a family."""

    family: str
    """Id of the original question."""
    kind: str
    """`original`, or the kind of variation."""
    member: str
    """Id of the question that was answered."""
    correct: bool


@dataclass(frozen=True)
class Signal:
    """A reward's discrimination on originals and variations."""

    originals: Interval
    variations: Interval
    kept: Interval
    verdict: Literal["survives", "brittle", "inconclusive", "no signal"]
    n_mixed: int
    """Families with right and wrong answers to an original, and to a variation, whichever are fewer."""

    def mark(self, spec_hash: str, answers: Sequence[FamilyAnswer]) -> PackRephrasing:
        """What goes into the pack whose reward has this `spec_hash`; `answers` are those that were judged."""
        kept, known = self.kept, self.verdict != "no signal" and isfinite(self.kept.value)
        return PackRephrasing(
            spec_hash=spec_hash,
            verdict=self.verdict,
            kept=kept.value if known else None,
            interval=(kept.low, kept.high) if known and isfinite(kept.low) and isfinite(kept.high) else None,
            kinds=sorted({answer.kind for answer in answers} - {ORIGINAL}),
            n_families=len(_varied_families(answers)),
        )


def accuracies(answers: Sequence[FamilyAnswer]) -> dict[str, dict[str, Any]]:
    """Accuracy by kind, and of all variations together (`variations`), clustered by family; with the number of answers.

    Raises:
        InputError: if there are no answers.
    """
    if not answers:
        raise InputError("answers: there are none to take an accuracy of")
    kinds = {answer.kind: [a for a in answers if a.kind == answer.kind] for answer in answers}
    varied = [answer for answer in answers if answer.kind != ORIGINAL]
    parts = kinds | ({"variations": varied} if varied else {})
    return {
        kind: asdict(accuracy_interval([a.correct for a in part], [a.family for a in part])) | {"n": len(part)}
        for kind, part in parts.items()
    }


def consistency(answers: Sequence[FamilyAnswer]) -> dict[str, dict[str, Any]]:
    """Agreement `across` members of a family and `within` a member; the second is left out where some member has one
    answer alone, and so are families of one member.

    Raises:
        InputError: if no family has two members.
    """
    counts: dict[str, dict[str, list[bool]]] = {}
    for answer in answers:
        counts.setdefault(answer.family, {}).setdefault(answer.member, []).append(answer.correct)
    counts = {family: members for family, members in counts.items() if len(members) > 1}
    if not counts:
        raise InputError("answers: no family has two members; agreement needs an original and a variation")
    across = [_mean([_agree(a, b) for a, b in combinations(members.values(), 2)]) for members in counts.values()]
    found = {"across": asdict(_mean_interval(across)) | {"n_families": len(counts)}}
    if all(len(rights) > 1 for members in counts.values() for rights in members.values()):
        within = [_mean([_agree_self(rights) for rights in members.values()]) for members in counts.values()]
        found["within"] = asdict(_mean_interval(within)) | {"n_families": len(counts)}
    return found


def judge_signal(answers: Sequence[FamilyAnswer], scores: Sequence[float], *, seed: int = 0) -> Signal:
    """What is kept of a reward's within-question AUROC.

    Args:
        scores: the reward's, of each answer.

    Raises:
        InputError: if no family has an original and a variation; as `auroc`.
    """
    families = _varied_families(answers)
    if not families:
        raise InputError("answers: no question has an original and a variation; there is nothing to compare")
    place = {family: index for index, family in enumerate(families)}
    sides: list[tuple[Array, Array]] = []
    for original in (True, False):
        chosen = [i for i, a in enumerate(answers) if (a.kind == ORIGINAL) == original and a.family in place]
        members = [answers[i].member for i in chosen]
        found = question_pairs([scores[i] for i in chosen], [answers[i].correct for i in chosen], members)
        family_of = {answers[i].member: place[answers[i].family] for i in chosen}
        at = [family_of[member] for member in sorted(family_of)]
        n_members_F = np.bincount(at, minlength=len(families))
        wins_F, pairs_F = (np.bincount(at, of_Q, len(families)) for of_Q in (found.wins_Q, found.pairs_Q))
        sides.append((wins_F / n_members_F, pairs_F / n_members_F))
    (first, second), n = (ratio(*side) for side in sides), len(families)
    n_mixed = min(int((pairs_F > 0).sum()) for _, pairs_F in sides)

    def kept(counts_RF: Array) -> Array:
        lead_R, left_R = first(counts_RF) - 0.5, second(counts_RF) - 0.5
        return np.divide(left_R, lead_R, out=np.full(len(lead_R), nan), where=lead_R > 0)

    before, after, share = (cluster_bootstrap(one, n, seed=seed) for one in (first, second, kept))
    return Signal(before, after, share, _verdict(before, share, n_mixed), n_mixed)


def _varied_families(answers: Sequence[FamilyAnswer]) -> list[str]:
    """Families with answers to an original and to a variation."""
    originals = {answer.family for answer in answers if answer.kind == ORIGINAL}
    return sorted(originals & {answer.family for answer in answers if answer.kind != ORIGINAL})


def _verdict(
    before: Interval, kept: Interval, n_mixed: int
) -> Literal["survives", "brittle", "inconclusive", "no signal"]:
    if n_mixed < MIN_MIXED:
        return "inconclusive"
    if isnan(before.low) or before.low <= 0.5:
        return "no signal"
    if kept.low >= KEPT:
        return "survives"
    return "brittle" if kept.high < KEPT else "inconclusive"


def _agree(one: Sequence[bool], other: Sequence[bool]) -> float:
    p, q = _mean(one), _mean(other)
    return p * q + (1 - p) * (1 - q)


def _agree_self(rights: Sequence[bool]) -> float:
    """Two different answers of the same ones."""
    right, n = sum(rights), len(rights)
    return (right * (right - 1) + (n - right) * (n - right - 1)) / (n * (n - 1))


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values))


def _mean_interval(values: Sequence[float]) -> Interval:
    values_F = np.array(values)
    return cluster_bootstrap(ratio(values_F, np.ones_like(values_F)), len(values_F))
