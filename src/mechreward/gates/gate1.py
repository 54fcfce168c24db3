"""Gate 1: does the reward tell right from wrong answers to the same, held-out question, and better than trivia does?

It scores the very `FeatureReward` that would train (`reward.compute` on the teacher-forced residuals) and keeps that
reward's `spec_hash`. Against it, on the same responses: mean log-probability, length, a cross-fitted bag of words, what
words explain of the reward itself, and random packs of equal firing frequency. Each baseline is turned round if that
helps it (a choice made on the very data, which favours the baseline). The questions must not be the ones the features
were found on: the caller splits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from mechreward.errors import InputError
from mechreward.features import ContrastTable, PackValidation, random_packs
from mechreward.features.pooling import check_responses
from mechreward.gates.baselines import check_logprobs
from mechreward.gates.evidence import (
    Evidence,
    judge_scores,
    labels_of,
    mixed_questions,
    nothing_mixed,
    questions_of,
)
from mechreward.gates.judgement import ScoreRow, Thresholds, Verdict
from mechreward.gates.reading import read_scores
from mechreward.models import LoadedModel
from mechreward.reward import FeatureReward
from mechreward.rollout import Response


@dataclass(frozen=True)
class Gate1Result:
    """The verdict and every number behind it; `rows[0]` is the judged reward. No rows where no question is mixed."""

    verdict: Verdict
    reason: str
    spec_hash: str
    rows: tuple[ScoreRow, ...]
    p_value: float | None
    """One-sided, labels shuffled within questions."""
    accuracy: float
    questions_needed: int | None
    n_questions: int
    n_mixed: int
    n_responses: int
    thresholds: Thresholds
    draws: int
    seed: int

    @property
    def passed(self) -> bool:
        """Whether the verdict is pass."""
        return self.verdict == "pass"

    def validation(self) -> PackValidation:
        """What goes into the pack that was judged."""
        within = self.rows[0].within if self.rows else None
        return PackValidation(
            spec_hash=self.spec_hash,
            verdict=self.verdict,
            within_auroc=within.value if within else None,
            interval=(within.low, within.high) if within else None,
            n_questions=self.n_questions,
        )

    def table(self) -> list[dict[str, Any]]:
        """One dictionary a score: name, auroc, within_auroc with low and high, and the reward's lead over it."""
        return [_row_dict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON; None where a number is undefined."""
        record = asdict(self) | {"rows": self.table()}
        return {name: _json(value) for name, value in record.items()}


def gate1(
    reward: FeatureReward,
    responses: Sequence[Response],
    loaded: LoadedModel,
    *,
    table: ContrastTable | None = None,
    n_random: int = 5,
    thresholds: Thresholds | None = None,
    draws: int = 2000,
    seed: int = 0,
    batch_size: int = 32,
) -> Gate1Result:
    """Judges a reward on verified responses to held-out questions.

    Args:
        table: the contrast the pack was built from; random packs are matched to its firing frequencies. Without it
            there is no random baseline.
        draws: bootstrap resamples, and label shuffles.

    Raises:
        InputError: if a response has no tokens, no verdict or no log-probabilities, the reward does not fit the model,
            or a residual or score is not finite.
    """
    check_responses(responses)
    if not responses:
        raise InputError("responses: there are none to judge the reward on")
    check_logprobs(responses)
    reward.check_model(loaded.model)
    bars = thresholds or Thresholds()
    if not mixed_questions(responses):
        return _result(reward, responses, nothing_mixed(responses, bars), bars, draws, seed)
    randoms = random_packs(reward.pack, table, n_random, seed=seed) if table is not None and n_random else []
    judged_N, random_PN = read_scores(reward, randoms, responses, loaded, batch_size=batch_size)
    found = judge_scores(judged_N, responses, random_PN=random_PN, thresholds=bars, draws=draws, seed=seed)
    return _result(reward, responses, found, bars, draws, seed)


def _result(
    reward: FeatureReward, responses: Sequence[Response], found: Evidence, bars: Thresholds, draws: int, seed: int
) -> Gate1Result:
    return Gate1Result(
        verdict=found.judgement.verdict,
        reason=found.judgement.reason,
        spec_hash=reward.spec_hash,
        rows=found.rows,
        p_value=found.p_value,
        accuracy=float(labels_of(responses).mean()),
        questions_needed=found.judgement.questions_needed,
        n_questions=len(set(questions_of(responses))),
        n_mixed=len(mixed_questions(responses)),
        n_responses=len(responses),
        thresholds=bars,
        draws=draws,
        seed=seed,
    )


def _row_dict(row: ScoreRow) -> dict[str, Any]:
    lead = row.difference
    record = {
        "name": row.name,
        "auroc": row.auroc.value,
        "auroc_low": row.auroc.low,
        "auroc_high": row.auroc.high,
        "within_auroc": row.within.value,
        "low": row.within.low,
        "high": row.within.high,
        "difference": lead.value if lead else None,
        "difference_low": lead.low if lead else None,
        "difference_high": lead.high if lead else None,
    }
    return {name: _json(value) for name, value in record.items()}


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
