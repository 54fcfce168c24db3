"""Discovery by ReasonScore over a model's own responses: `reasonscore` with a test, support and stability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from mechreward.errors import InputError
from mechreward.features.contrast import ContrastTable, q_values, ranked
from mechreward.features.halves import HalfSamples, stability
from mechreward.features.means import QuestionMeans, varies
from mechreward.features.mixed import Array
from mechreward.features.nodes import check_fit
from mechreward.features.reasonscore import (
    DEFAULT_REASONING_VOCAB,
    INSIDE,
    OUTSIDE,
    WORDS,
    Windows,
    check_alpha,
    check_found,
    resolve_vocab_token_ids,
    sample_sums,
    scores,
    share,
)
from mechreward.models import LoadedModel, iter_residuals, norm_outliers
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE


def reasonscore_table(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    *,
    words: Sequence[str] = DEFAULT_REASONING_VOCAB,
    context_before: int = 2,
    context_after: int = 3,
    entropy_alpha: float = 0.7,
    min_support: float = 0.05,
    top_k: int = 50,
    halves: int = 20,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], object] = lambda _: None,
) -> ContrastTable:
    """One row a feature, largest |effect| first; verdicts on the answers are not used.

    Columns: id; effect, the ReasonScore over all tokens; entropy, prob_reasoning and prob_baseline as in
    `FeatureScore`; p_value, one-sample t over questions of a feature's share inside less outside the windows of the
    question's answers, those with tokens on both sides; q_value (Benjamini and Hochberg); stability, share of
    half-samples of questions in which the ReasonScore is among the `top_k` largest by size, with its sign; support,
    share of answers in which the feature fires; scale, standard deviation within a question of its mean activation.
    Features below `min_support`, or with no such deviation, are not tested: q is 1, stability 0. Nor are features whose
    ReasonScore has another sign than what p tests, the mean of inside less outside: the factor H^alpha makes the inside
    smaller, so that a feature of one word can fire more inside and still have a score below 0.

    Raises:
        InputError: if no word occurs, fewer than two questions have tokens inside and outside of windows, no question
            has two answers, the SAE does not fit the model, or `entropy_alpha` is negative or not finite.
    """
    check_fit(loaded, sae)
    check_alpha(entropy_alpha)
    windows = Windows(resolve_vocab_token_ids(loaded.tokenizer, words), context_before, context_after)
    sums = _Sums(WORDS + len(windows.vocabulary), sae.d_sae, halves, seed)
    for question in _questions(loaded, sae, responses, windows, batch_size):
        sums.add(question)
        on_batch(len(question.sums_BRF))
    check_found(sums.counts_R)
    if sums.means.n < 2 or sums.n == sums.n_questions:
        raise InputError(
            f"responses: {sums.means.n} questions have tokens inside and outside of windows, and {sums.n} answers are "
            f"to {sums.n_questions}; there must be at least 2 such questions, and one question with 2 answers"
        )
    frame = _frame(sums, entropy_alpha, min_support, top_k)
    return ContrastTable(
        frame, sums.n_questions, sums.means.n, sums.n, "reasonscore", pooling="mean",
        prompts=prompt_hashes(r.prompt_ids for r in responses),
    )  # fmt: skip


@dataclass(frozen=True)
class _Question:
    """Sums over the tokens of each answer to one question."""

    sums_BRF: Array
    counts_BR: Array


class _Sums:
    def __init__(self, n_rows: int, n_features: int, halves: int, seed: int) -> None:
        self.means, self._samples = QuestionMeans(n_features, 2, seed), HalfSamples(halves, seed)
        self.sums_RF, self.counts_R = np.zeros((n_rows, n_features)), np.zeros(n_rows)
        self.half_SRF, self.half_SR = np.zeros((halves, n_rows, n_features), np.float32), np.zeros((halves, n_rows))
        self.fires_F, self.spread_F, self.acts_F = np.zeros((3, n_features))
        self.n = self.n_questions = 0

    def add(self, question: _Question) -> None:
        sums_RF, counts_R = question.sums_BRF.sum(0), question.counts_BR.sum(0)
        in_S = self._samples.draw(1)[:, 0]
        self.half_SRF[in_S] += sums_RF.astype(np.float32)
        self.half_SR[in_S] += counts_R
        self.sums_RF += sums_RF
        self.counts_R += counts_R
        total_BF = question.sums_BRF[:, INSIDE] + question.sums_BRF[:, OUTSIDE]
        tokens_B = question.counts_BR[:, INSIDE] + question.counts_BR[:, OUTSIDE]
        self.fires_F += (total_BF > 0).sum(0)
        acts_BF = total_BF / np.maximum(tokens_B, 1)[:, None]
        self.acts_F += acts_BF.sum(0)
        self.spread_F += np.var(acts_BF, axis=0) * len(acts_BF)
        self.n, self.n_questions = self.n + len(total_BF), self.n_questions + 1
        if counts_R[INSIDE] and counts_R[OUTSIDE]:
            inside_F, outside_F = (share(sums_RF[row] / counts_R[row]) for row in (INSIDE, OUTSIDE))
            self.means.add(inside_F - outside_F)


def _questions(
    loaded: LoadedModel, sae: SAE, responses: Sequence[Response], windows: Windows, batch_size: int
) -> Iterator[_Question]:
    by_question: dict[str, list[Response]] = {}
    for response in responses:
        by_question.setdefault(response.question_id, []).append(response)
    n_rows = WORDS + len(windows.vocabulary)
    for answers in by_question.values():
        sums_BRF, counts_BR = np.zeros((len(answers), n_rows, sae.d_sae)), np.zeros((len(answers), n_rows))
        prompts, completions = [list(r.prompt_ids) for r in answers], [list(r.completion_ids) for r in answers]
        for batch in iter_residuals(loaded.model, prompts, completions, sae.layer, batch_size):
            keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
            for at, row in enumerate(batch.rows):
                length = len(completions[row])
                keep_T = keep_BT[at, :length].cpu()
                rows_RT = windows.rows(torch.tensor(completions[row])) & keep_T
                sums_BRF[row], counts_BR[row] = sample_sums(sae, batch.h_BTD[at, :length], rows_RT)
        yield _Question(sums_BRF, counts_BR)


def _frame(sums: _Sums, alpha: float, min_support: float, top_k: int) -> pd.DataFrame:
    score_F, entropy_F, inside_F, outside_F = scores(sums.sums_RF, sums.counts_R, alpha)
    support_F = sums.fires_F / sums.n
    scale_F = np.sqrt(sums.spread_F / (sums.n - sums.n_questions))
    tested_F = (support_F >= min_support) & varies(scale_F, sums.acts_F / sums.n)
    tested_F &= np.sign(score_F) == np.sign(sums.means.mean_F)
    halves = zip(sums.half_SRF, sums.half_SR, strict=True)
    half_SF = np.stack([scores(sums_RF.astype(np.float64), counts_R, alpha)[0] for sums_RF, counts_R in halves])
    p_F = sums.means.p_values()
    return ranked(
        pd.DataFrame(
            {
                "id": np.arange(len(score_F)),
                "effect": score_F,
                "entropy": entropy_F,
                "prob_reasoning": inside_F,
                "prob_baseline": outside_F,
                "p_value": p_F,
                "q_value": q_values(p_F, tested_F),
                "stability": stability(half_SF, score_F, tested_F, top_k),
                "support": support_F,
                "scale": scale_F,
            }
        )
    )
