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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features import ContrastTable, FeaturePack, PackValidation, random_packs
from mechreward.features.pooling import check_responses
from mechreward.gates.baselines import bag_of_words, length, mean_logprob, reward_from_words
from mechreward.gates.judgement import Judgement, ScoreRow, Thresholds, Verdict, judge, too_few
from mechreward.gates.statistics import (
    Interval,
    QuestionPairs,
    auroc_statistic,
    cluster_bootstrap,
    label_permutation_p,
    question_pairs,
    ratio,
)
from mechreward.models import LoadedModel, ResidualBatch, iter_residuals
from mechreward.reward import FeatureReward
from mechreward.reward.aggregation import pool
from mechreward.rollout import Response

Array = NDArray[np.float64]
JUDGED = "feature reward"


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
    reward.check_model(loaded.model)
    bars = thresholds or Thresholds()
    scores = {"mean log-probability": [mean_logprob(responses)], "length": [length(responses)]}
    n_mixed = len(_mixed(responses))
    if n_mixed == 0:
        return _result(reward, responses, (), None, _nothing_mixed(responses, bars), bars, draws, seed)
    randoms = random_packs(reward.pack, table, n_random, seed=seed) if table is not None and n_random else []
    judged_N, random_PN = read_scores(reward, randoms, responses, loaded, batch_size=batch_size)
    if n_mixed >= 2:
        scores["bag of words"] = [bag_of_words(responses, seed=seed)]
        scores["reward predicted from words"] = [reward_from_words(responses, judged_N, seed=seed)]
    if randoms:
        scores["random features of equal frequency"] = list(random_PN)
    rows = compare(judged_N, scores, responses, draws=draws, seed=seed)
    labels, questions = _labels(responses), _questions(responses)
    p_value = label_permutation_p(judged_N, labels, questions, draws=draws, seed=seed)
    decided = judge(rows[0], rows[1:], p_value, len(set(questions)), n_mixed, bars)
    return _result(reward, responses, rows, p_value, decided, bars, draws, seed)


@torch.no_grad()
def read_scores(
    reward: FeatureReward,
    packs: Sequence[FeaturePack],
    responses: Sequence[Response],
    loaded: LoadedModel,
    *,
    batch_size: int = 32,
) -> tuple[Array, Array]:
    """The reward's own score of each response [N], and each pack's [P, N] read and pooled the same way, in one forward.

    Raises:
        InputError: if a score is not finite.
    """
    judged_N = torch.full((len(responses),), torch.nan)
    packs_PN = torch.full((len(packs), len(responses)), torch.nan)
    prompts = [list(response.prompt_ids) for response in responses]
    completions = [list(response.completion_ids) for response in responses]
    ends_NT = reward.step_ends(loaded.tokenizer, completions)
    for batch in iter_residuals(loaded.model, prompts, completions, reward.layer, batch_size):
        ends_BT = None
        if ends_NT is not None:
            ends_BT = ends_NT[batch.rows, : batch.mask_BT.shape[1]].to(batch.mask_BT.device)
        judged_N[batch.rows] = reward.compute(batch.h_BTD, batch.mask_BT, ends_BT).cpu()
        if packs:
            packs_PN[:, batch.rows] = _pack_scores(reward, packs, batch, ends_BT).cpu()
    bad = (~judged_N.isfinite()).nonzero()
    if len(bad):
        question = responses[int(bad[0])].question_id
        raise InputError(f"reward: its score of an answer to question {question} is not finite")
    return judged_N.double().numpy(), packs_PN.double().numpy()


def compare(
    judged_N: Array, baselines: dict[str, list[Array]], responses: Sequence[Response], *, draws: int, seed: int
) -> tuple[ScoreRow, ...]:
    """The judged score's row, then one a baseline: within-question AUROC with intervals clustered by question.

    A baseline of several scores (random packs) stands for their mean AUROC. Each is turned round if it is below .5.
    """
    labels, questions = _labels(responses), _questions(responses)
    n = len(set(questions))

    def interval(statistic: Any) -> Interval:
        return cluster_bootstrap(statistic, n, draws=draws, seed=seed)

    judged = question_pairs(judged_N, labels, questions)
    own = ratio(judged.wins_Q, judged.pairs_Q)
    rows = [ScoreRow(JUDGED, interval(auroc_statistic(judged_N, labels, questions)), interval(own))]
    for name, columns in baselines.items():
        turned = [_better_way(column, labels, questions) for column in columns]
        wins_Q = np.mean([pairs.wins_Q for _, pairs in turned], axis=0)
        over_all = [auroc_statistic(column, labels, questions) for column, _ in turned]
        theirs = ratio(wins_Q, judged.pairs_Q)
        rows.append(
            ScoreRow(
                name,
                interval(lambda counts, over_all=over_all: np.mean([f(counts) for f in over_all], axis=0)),
                interval(theirs),
                interval(lambda counts, theirs=theirs: own(counts) - theirs(counts)),
            )
        )
    return tuple(rows)


def _better_way(column: Array, labels: NDArray[np.bool_], questions: list[str]) -> tuple[Array, QuestionPairs]:
    pairs = question_pairs(column, labels, questions)
    return (column, pairs) if pairs.auroc >= 0.5 else (-column, question_pairs(-column, labels, questions))


def _pack_scores(
    reward: FeatureReward, packs: Sequence[FeaturePack], batch: ResidualBatch, step_end_BT: Tensor | None
) -> Tensor:
    """[P, B]: the union of the packs' features is read once."""
    ids = sorted({i for pack in packs for i in pack.feature_ids()})
    weight_KP = torch.zeros(len(ids), len(packs))
    for column, pack in enumerate(packs):
        for feature in pack.features:
            weight_KP[ids.index(feature.id), column] = feature.weight / feature.scale
    readable_BT = reward.readable(batch.h_BTD, batch.mask_BT)
    acts_NK = reward.sae.read(batch.h_BTD[readable_BT], ids)
    reward_PN = (acts_NK @ weight_KP.to(acts_NK.device)).T
    pooled = []
    for reward_N in reward_PN:
        reward_BT = torch.zeros(readable_BT.shape, device=reward_N.device)
        reward_BT[readable_BT] = reward_N
        pooled.append(pool(reward_BT, readable_BT, reward.aggregation, step_end_BT))
    return torch.stack(pooled)


def _result(
    reward: FeatureReward,
    responses: Sequence[Response],
    rows: tuple[ScoreRow, ...],
    p_value: float | None,
    decided: Judgement,
    bars: Thresholds,
    draws: int,
    seed: int,
) -> Gate1Result:
    return Gate1Result(
        verdict=decided.verdict,
        reason=decided.reason,
        spec_hash=reward.spec_hash,
        rows=rows,
        p_value=p_value,
        accuracy=float(_labels(responses).mean()),
        questions_needed=decided.questions_needed,
        n_questions=len(set(_questions(responses))),
        n_mixed=len(_mixed(responses)),
        n_responses=len(responses),
        thresholds=bars,
        draws=draws,
        seed=seed,
    )


def _nothing_mixed(responses: Sequence[Response], bars: Thresholds) -> Judgement:
    labels = _labels(responses)
    alike = "right" if labels.all() else "wrong" if not labels.any() else None
    return Judgement("inconclusive", too_few(len(set(_questions(responses))), 0, bars, alike))


def _mixed(responses: Sequence[Response]) -> set[str]:
    right = {response.question_id for response in responses if response.correct}
    return right & {response.question_id for response in responses if not response.correct}


def _labels(responses: Sequence[Response]) -> NDArray[np.bool_]:
    return np.array([response.correct is True for response in responses])


def _questions(responses: Sequence[Response]) -> list[str]:
    return [response.question_id for response in responses]


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
