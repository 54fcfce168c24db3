"""Gate 1 from numbers alone: a score of each response, its rivals on the same responses, and the verdict.

`gate1` calls `judge_scores` with what it has read from a model; `benchmarks/gate_error_rates.py` calls it with made-up
scores whose truth is known, so that the error rates measured there are those of the code that ships. Everything a
verdict depends on is computed in here: the baselines from text and log-probabilities, the intervals, the permutation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechreward.errors import InputError
from mechreward.features.discovery import FEATURES, HeldOutScores
from mechreward.gates.baselines import (
    bag_of_words,
    format_flag,
    length,
    mean_logprob,
    min_logprob,
    reward_from_words,
)
from mechreward.gates.correlations import PlainCorrelation, others_mean, own_mean, partial_spearman, plain_correlation
from mechreward.gates.judgement import Judgement, ScoreRow, Thresholds, judge, too_few
from mechreward.gates.statistics import (
    Interval,
    QuestionPairs,
    auroc_statistic,
    cluster_bootstrap,
    label_permutation_p,
    question_pairs,
    ratio,
)
from mechreward.rollout import Response

Array = NDArray[np.float64]
JUDGED = "feature reward"
RANDOM = "random features of equal frequency"


@dataclass(frozen=True)
class Evidence:
    """`rows[0]` is the judged score; no rows and no p where no question has both right and wrong answers."""

    judgement: Judgement
    rows: tuple[ScoreRow, ...]
    p_value: float | None
    """One-sided, labels shuffled within questions."""
    correlations: Correlations | None = None


@dataclass(frozen=True)
class Correlations:
    """Over all answers, reported and not judged."""

    plain: PlainCorrelation
    partial: Interval
    """Spearman's, with `CONTROLS` held fixed; the accuracy of the question is the mean over all its answers."""
    partial_others: Interval
    """The same with the mean over the question's other answers."""


CONTROLS = ("length", "question mean accuracy", "mean log-probability", "truncation", "format flag")


def judge_scores(
    judged_N: Array,
    responses: Sequence[Response],
    *,
    random_PN: Array | None = None,
    reported: Mapping[str, Array] | None = None,
    thresholds: Thresholds | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Evidence:
    """The verdict on a score of verified responses to held-out questions.

    Args:
        judged_N: the score of each response.
        random_PN: scores of random packs of equal firing frequency; None leaves that baseline out.
        reported: scores that are shown beside the judged one, and that it need not lead.
        draws: bootstrap resamples, and label shuffles.

    Raises:
        InputError: if there are not as many scores as responses, one is not finite, or a response has no
            log-probabilities.
    """
    bars = thresholds or Thresholds()
    if len(judged_N) != len(responses):
        raise InputError(f"scores: {len(judged_N)} for {len(responses)} responses, they must be as many")
    bad = int((~np.isfinite(judged_N)).sum())
    if bad:
        raise InputError(f"scores: {bad} of {len(judged_N)} are NaN or infinite; all must be finite")
    labels, questions = labels_of(responses), questions_of(responses)
    n_questions, n_mixed = len(set(questions)), len(mixed_questions(responses))
    if n_mixed == 0:
        return nothing_mixed(responses, bars)
    rivals = {
        "mean log-probability": [mean_logprob(responses)],
        "least log-probability": [min_logprob(responses)],
        "length": [length(responses)],
        "format flag": [format_flag(responses)],
    }
    if n_mixed >= 2:
        rivals["bag of words"] = [bag_of_words(responses, seed=seed)]
        rivals["reward predicted from words"] = [reward_from_words(responses, judged_N, seed=seed)]
    if random_PN is not None and len(random_PN):
        rivals[RANDOM] = list(random_PN)
    shown = {name: [scores_N] for name, scores_N in (reported or {}).items()}
    judged, *others = compare(judged_N, rivals | shown, responses, draws=draws, seed=seed)
    rows = (judged, *(replace(row, required=row.name in rivals) for row in others))
    p_value = label_permutation_p(judged_N, labels, questions, draws=draws, seed=seed)
    decided = judge(judged, rows[1:], p_value, n_questions, n_mixed, bars)
    return Evidence(decided, rows, p_value, correlate(judged_N, responses, draws=draws, seed=seed))


def judge_held_out(held_out: HeldOutScores, responses: Sequence[Response], **options: Any) -> Evidence:
    """The verdict on a cross-fitted discovery (`features.explore`): every answer is scored by features that were chosen
    and weighted on other questions, in five folds. It judges the way of finding a pack; the pack itself, found on all
    of these questions, is judged by `gate1` on others. Dense readings of the discovery are reported.

    Args:
        responses: those the discovery was given.
        options: of `judge_scores`.

    Raises:
        InputError: if the scores are not of these responses.
    """
    mixed = mixed_questions(responses)
    by_question: dict[str, list[Response]] = {}
    for response in responses:
        if response.question_id in mixed:
            by_question.setdefault(response.question_id, []).append(response)
    kept = [response for answers in by_question.values() for response in answers]
    if questions_of(kept) != held_out.questions or not np.array_equal(labels_of(kept), held_out.right_N):
        raise InputError("responses: they are not the ones that were scored; give those that `explore` was given")
    dense = {name: scores_N for name, scores_N in held_out.scores.items() if name != FEATURES}
    return judge_scores(held_out.scores[FEATURES], kept, reported=dense, **options)


def correlate(judged_N: Array, responses: Sequence[Response], *, draws: int, seed: int) -> Correlations:
    """The plain and the partial correlations of a score with being right."""
    labels, questions = labels_of(responses), questions_of(responses)

    def partial(accuracy_N: Array) -> Interval:
        truncated_N = np.array([response.finish == "length" for response in responses])
        found_N = np.array([response.extracted is not None for response in responses])
        controls = [length(responses), accuracy_N, mean_logprob(responses), truncated_N, found_N]
        statistic = partial_spearman(judged_N, labels, controls, questions)
        return cluster_bootstrap(statistic, len(set(questions)), draws=draws, seed=seed)

    plain = plain_correlation(judged_N, labels)
    return Correlations(plain, partial(own_mean(labels, questions)), partial(others_mean(labels, questions)))


def compare(
    judged_N: Array, baselines: Mapping[str, list[Array]], responses: Sequence[Response], *, draws: int, seed: int
) -> tuple[ScoreRow, ...]:
    """The judged score's row, then one a baseline: within-question AUROC with intervals clustered by question.

    A baseline of several scores (random packs) stands for their mean AUROC. Each is turned round if it is below .5.
    """
    labels, questions = labels_of(responses), questions_of(responses)
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


def nothing_mixed(responses: Sequence[Response], bars: Thresholds) -> Evidence:
    """What can be said where no question has right and wrong answers: that, in words."""
    labels = labels_of(responses)
    alike = "right" if labels.all() else "wrong" if not labels.any() else None
    reason = too_few(len(set(questions_of(responses))), 0, bars, alike)
    return Evidence(Judgement("inconclusive", reason), (), None)


def mixed_questions(responses: Sequence[Response]) -> set[str]:
    """Ids of the questions that have right and wrong answers."""
    right = {response.question_id for response in responses if response.correct}
    return right & {response.question_id for response in responses if not response.correct}


def labels_of(responses: Sequence[Response]) -> NDArray[np.bool_]:
    """Which responses are right."""
    return np.array([response.correct is True for response in responses])


def questions_of(responses: Sequence[Response]) -> list[str]:
    """The question of each response."""
    return [response.question_id for response in responses]
