"""Repair of wrong responses to KNOWN questions, cross-fitted: no chain is steered by features found on itself.

KNOWN questions are halved. The features that steer one half (within-question contrast at the ends of steps, significant
and stable) are found, and calibrated, on the other, and so are cDPO's adapters. One wrong chain a question is tried, so
that chains are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Literal, get_args

from mechreward.chains import ContrastiveConfig, Roller
from mechreward.errors import InputError, named
from mechreward.features import NoFeatures, build_aggregation, discover
from mechreward.features.fired import FIRES
from mechreward.features.selection import select
from mechreward.rollout import Response
from mechreward.sae import SAE
from mechreward.steering.conditions import Condition
from mechreward.steering.cuts import check_critical, find_cuts
from mechreward.steering.repair import Attempt, check_span, repair
from mechreward.steering.variant import Variant
from mechreward.tasks import split_questions

When = Literal["always", "wrong"]


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """How wrong chains are repaired.

    Raises:
        InputError: naming the first field that is not allowed.
    """

    critical: str = "rollouts"
    """How the critical token is found: `rollouts`, `contrast` or `solution`."""
    rollouts: int = 16
    """Rollouts a place, for `rollouts`."""
    contrastive: ContrastiveConfig | None = None
    tries: int = 4
    """Tries a chain, in every arm."""
    n_features: int = 10
    """Most features to pin, those of right and of wrong chains together."""
    strength: float = 1.0
    """Where features of right chains are pinned, in their 99th percentiles; those of wrong chains are pinned to 0."""
    when: str = "always"
    """Steer each token, or with `wrong` only those on which a feature of wrong chains fires."""
    span: str = "step"
    """Steer the step that is written anew, or with `rest` all that follows."""
    pooling: str = "mean"
    """What of a response features are found on, as for `discover`; `step_end:.` takes the ends of sentences."""
    chains: int = 300
    """At most so many wrong chains."""

    def __post_init__(self) -> None:
        for name in ("rollouts", "tries", "n_features", "chains"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; it must be at least 1")
        if not 0 < self.strength < float("inf"):
            raise InputError(f"strength: {self.strength} is not allowed; it must be above 0, and finite")
        if self.when not in get_args(When):
            raise InputError(f"when: {self.when!r} is not known; use one of {', '.join(get_args(When))}")
        check_critical(self.critical)
        check_span(self.span)
        with named(aggregation="pooling", k="pooling"):
            build_aggregation(self.pooling)


def steering_features(
    variant: Variant, responses: Sequence[Response], config: RepairConfig
) -> tuple[list[int], list[int]]:
    """Features that go with right and with wrong responses to the same question: of each, those of largest |effect|, at
    most half of `n_features` (if it is odd, one more of right ones).

    Raises:
        NoFeatures: if none goes with right ones.
    """
    table = discover(variant.loaded, variant.sae, responses, pooling=config.pooling)
    passing = select(table, n_features=len(table.frame))
    right, wrong = [f.id for f in passing if f.weight > 0], [f.id for f in passing if f.weight < 0]
    if not right:
        raise NoFeatures(
            f"features: all {len(wrong)} that are significant and stable go with wrong answers; none to steer with"
        )
    half = config.n_features // 2
    return right[: config.n_features - half], wrong[:half]


def set_edits(variant: Variant, right: Sequence[int], wrong: Sequence[int], config: RepairConfig) -> None:
    """Pins the features of right chains up and those of wrong chains to 0, everywhere or where one of these fires."""
    values = dict.fromkeys(right, config.strength) | dict.fromkeys(wrong, 0.0)
    if config.when == "always":
        variant.set(values, mode="pin")
        return
    if not wrong:
        raise InputError("when: wrong needs features of wrong chains, and none is significant; use always")
    fires: list[Condition] = [variant.feature(feature) > FIRES for feature in wrong]
    variant.set_when(reduce(or_, fires), values, mode="pin")


def repair_known(roller: Roller, sae: SAE, responses: Sequence[Response], config: RepairConfig) -> list[Attempt]:
    """All arms on one wrong response to each of `roller.questions` that has one with a critical token.

    Args:
        roller: the model, the KNOWN questions and nothing else, the verifier, and how to sample.
        responses: verified, several to each question.

    Raises:
        InputError: if no response is wrong, no critical token is found, or a half has no features to steer with.
    """
    check_critical(config.critical, roller.questions)
    ids = _half_ids(roller)
    strange = next((r.question_id for r in responses if r.question_id not in ids[0] | ids[1]), None)
    if strange is not None:
        raise InputError(f"responses: question {strange} is not among the KNOWN questions given")
    chosen = []
    for wrong, other in zip(wrong_chains(roller, responses, config.chains), ids[::-1], strict=True):
        others = [r for r in responses if r.question_id in other]
        if wrong:
            # Both halves before any critical token: those are dear to find, and of no use without features.
            chosen.append((wrong, others, _steered_by(roller, sae, others, config)))
    attempts = [one for wrong, others, variant in chosen for one in _repair(roller, variant, wrong, others, config)]
    if not attempts:
        raise InputError(f"responses: none of {len(responses)} is wrong with a critical token; nothing to repair")
    return attempts


def wrong_chains(roller: Roller, responses: Sequence[Response], most: int) -> tuple[list[Response], list[Response]]:
    """The wrong responses that `repair_known` tries, by half of the questions: one a question, at most `most` in all,
    as many of each half where both have enough."""
    first, second = (
        _one_each([r for r in responses if r.question_id in ids and r.correct is False]) for ids in _half_ids(roller)
    )
    first = first[: most - min(len(second), most // 2)]
    return first, second[: most - len(first)]


def count_uncut(roller: Roller, responses: Sequence[Response], most: int, attempts: Sequence[Attempt]) -> int:
    """How many of `wrong_chains` have no critical token, and so no attempt."""
    return sum(map(len, wrong_chains(roller, responses, most))) - len(attempts)


def _half_ids(roller: Roller) -> tuple[set[str], set[str]]:
    first, second = split_questions(roller.questions, 0.5, roller.seed)
    return {question.id for question in first}, {question.id for question in second}


def _steered_by(roller: Roller, sae: SAE, others: Sequence[Response], config: RepairConfig) -> Variant:
    variant = Variant(roller.loaded, sae, where="completion")
    variant.calibrate(others)
    set_edits(variant, *steering_features(variant, others, config), config)
    return variant


def _one_each(responses: Sequence[Response]) -> list[Response]:
    first: dict[str, Response] = {}
    for response in responses:
        first.setdefault(response.question_id, response)
    return list(first.values())


def _repair(
    roller: Roller, variant: Variant, wrong: Sequence[Response], others: Sequence[Response], config: RepairConfig
) -> list[Attempt]:
    cuts = find_cuts(
        roller,
        wrong,
        config.critical,
        others=others,
        rollouts=config.rollouts,
        contrastive=config.contrastive,
    )
    found = [(response, cut) for response, cut in zip(wrong, cuts, strict=True) if cut is not None]
    if not found:
        return []
    chains, places = [response for response, _ in found], [cut for _, cut in found]
    return repair(variant, roller, chains, places, tries=config.tries, span=config.span)
