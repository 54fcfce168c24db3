"""Gate 1: does the reward tell right from wrong answers to the same, held-out question, and better than trivia does?

It scores the very `FeatureReward` that would train (`reward.compute` on the teacher-forced residuals) and keeps that
reward's `spec_hash`. It has to lead, on the same responses: length, mean and least log-probability, whether the
response has the form of an answer, a cross-fitted bag of words, what words explain of the reward itself, and random
packs of equal firing frequency. Each is turned round if that helps it (a choice made on the very data, which favours
it). And strings that deserve nothing (`adversarial`) must not be paid like right answers. Rivals from the same states
(`dense`) and correlations over all answers are reported and decide nothing. The questions must not be the ones the
features were found on: the caller splits them, and a pack that records its own (`FeaturePack.found_on`) is not judged
on any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from mechreward.errors import InputError
from mechreward.features import ContrastTable, FeaturePack, PackValidation, random_packs
from mechreward.features.pooling import check_responses
from mechreward.gates.adversarial import Attacks, attack
from mechreward.gates.baselines import check_logprobs
from mechreward.gates.dense import dense_rivals, matched_pack, random_weight_sae
from mechreward.gates.evidence import (
    Array,
    Correlations,
    Evidence,
    judge_scores,
    labels_of,
    mixed_questions,
    nothing_mixed,
    questions_of,
)
from mechreward.gates.judgement import Judgement, ScoreRow, Thresholds, Verdict
from mechreward.gates.reading import Readings, read_scores
from mechreward.models import LoadedModel
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE

ASKED_FOR = (
    "has to be judged on others; give another --seed where questions are generated, other rows of a file, or "
    "--responses to others"
)


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
    correlations: Correlations | None = None
    """Over all answers: the figures most papers print. Reported."""
    attacks: Attacks | None = None
    """What strings that deserve nothing are paid."""

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
        record: dict[str, Any] = _json(asdict(self) | {"rows": self.table()})
        return record


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
        thresholds: what decides; with `rephrased`, the pack has to carry what `mechreward eval --fuzz` found of it.
        draws: bootstrap resamples, and label shuffles.

    Raises:
        InputError: if a response has no tokens, no verdict or no log-probabilities, the pack was found on one of the
            questions or was not tried in other words though it has to survive them, the reward does not fit the
            model, or a residual or score is not finite.
    """
    check_responses(responses)
    if not responses:
        raise InputError("responses: there are none to judge the reward on")
    check_logprobs(responses)
    check_held_out(reward.pack, (response.prompt_ids for response in responses))
    reward.check_model(loaded.model)
    bars = thresholds or Thresholds()
    if bars.rephrased:
        check_rephrased(reward.pack)
    if not mixed_questions(responses):
        return _result(reward, responses, nothing_mixed(responses, bars), bars, draws, seed)
    randoms = random_packs(reward.pack, table, n_random, seed=seed) if table is not None and n_random else []
    noise = _noise(reward, responses, loaded, seed)
    read = read_scores(reward, randoms, responses, loaded, noise=noise, batch_size=batch_size)
    found = judge_scores(
        read.judged_N,
        responses,
        random_PN=read.packs_PN,
        reported=_reported(reward, read, responses, seed),
        thresholds=bars,
        draws=draws,
        seed=seed,
    )
    attacks = attack(reward, responses, read.judged_N, loaded, seed=seed)
    return _result(reward, responses, found, bars, draws, seed, attacks)


def check_held_out(pack: FeaturePack, prompts: Iterable[Sequence[int]], asked_for: str = ASKED_FOR) -> None:
    """Checks that the pack was found on none of the questions that it is to be judged on; it cannot be told of a pack
    that does not record its own. The same question in another prompt is another one here.

    Args:
        prompts: token ids.
        asked_for: the end of the error, what is asked of the pack and what to do.

    Raises:
        InputError: naming how many of them the pack was found on.
    """
    asked = prompt_hashes(prompts)
    seen = set(asked).intersection(pack.found_on)
    if seen:
        raise InputError(f"questions: pack {pack.name} was found on {len(seen)} of these {len(asked)}, and {asked_for}")


def check_rephrased(pack: FeaturePack) -> None:
    """Raises:
    InputError: if nobody has measured whether exactly this reward survives another wording.
    """
    if pack.rephrased is None:
        raise InputError(
            f"rephrased: whether pack {pack.name} survives another wording was not measured; run mechreward eval "
            "--fuzz --pack, and judge the pack.json that it writes"
        )


def _noise(
    reward: FeatureReward, responses: Sequence[Response], loaded: LoadedModel, seed: int
) -> tuple[SAE, FeaturePack] | None:
    sae = random_weight_sae(reward.sae, seed=seed)
    pack = matched_pack(reward.pack, reward.sae, sae, responses, loaded, seed=seed)
    return None if pack is None else (sae, pack)


def _reported(reward: FeatureReward, read: Readings, responses: Sequence[Response], seed: int) -> dict[str, Array]:
    found = {}
    if len(mixed_questions(responses)) >= 2:
        labels, questions = labels_of(responses), questions_of(responses)
        found = dense_rivals(reward.pack, reward.sae, read.states_ND, labels, questions, seed=seed)
    if read.noise_N is not None:
        found["random-weight SAE"] = read.noise_N
    return found


def _result(
    reward: FeatureReward,
    responses: Sequence[Response],
    found: Evidence,
    bars: Thresholds,
    draws: int,
    seed: int,
    attacks: Attacks | None = None,
) -> Gate1Result:
    decided = with_attacks(found.judgement, attacks)
    if bars.rephrased:
        decided = with_rephrasing(decided, reward.pack)
    return Gate1Result(
        verdict=decided.verdict,
        reason=decided.reason,
        spec_hash=reward.spec_hash,
        rows=found.rows,
        p_value=found.p_value,
        accuracy=float(labels_of(responses).mean()),
        questions_needed=decided.questions_needed,
        n_questions=len(set(questions_of(responses))),
        n_mixed=len(mixed_questions(responses)),
        n_responses=len(responses),
        thresholds=bars,
        draws=draws,
        seed=seed,
        correlations=found.correlations,
        attacks=attacks,
    )


def with_attacks(found: Judgement, attacks: Attacks | None) -> Judgement:
    """A string that deserves nothing and is paid like a right answer settles the matter, enough questions or not."""
    if attacks is None or not attacks.reason:
        return found
    return Judgement("fail", f"{found.reason}; {attacks.reason}" if found.verdict == "fail" else attacks.reason)


def with_rephrasing(found: Judgement, pack: FeaturePack) -> Judgement:
    """A pack whose signal another wording takes fails; one of which that is not known cannot pass."""
    if pack.rephrased == "survives":
        return found
    reason = f"in other words the pack's signal is: {pack.rephrased}"
    if pack.rephrased == "brittle":
        return Judgement("fail", f"{found.reason}; {reason}" if found.verdict == "fail" else reason)
    return Judgement("inconclusive", reason) if found.verdict == "pass" else found


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
        "required": row.required,
    }
    return {name: _json(value) for name, value in record.items()}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
