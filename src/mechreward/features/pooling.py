"""Every SAE feature, pooled over each completion, one group of whole questions at a time.

Streaming: at most one residual batch's tokens (in slices of `TOKENS` x F) and one group's responses are held, never all
tokens and never all responses. Tokens of massive norm are left out, as they are from the reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.aggregation import MaxAggregation, StepEndAggregation, build_aggregation
from mechreward.features.pack import Pooling
from mechreward.features.steps import step_ends
from mechreward.models import LoadedModel, iter_residuals, norm_outliers
from mechreward.rollout import Response
from mechreward.sae import SAE

TOKENS = 1024
"""Tokens encoded at once: bounds memory at TOKENS x F floats."""


@dataclass(frozen=True)
class PooledBatch:
    """All responses to one or more questions: row i answers `question_ids[i]`."""

    question_ids: list[str]
    correct_B: Bool[Tensor, " b"]
    acts_BF: Float[Tensor, "b f"]
    """Pooled activations in the SAE's units, float32, on the CPU."""


@torch.no_grad()
def pooled_activations(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    pooling: Pooling = "mean",
    *,
    batch_size: int = 32,
) -> Iterator[PooledBatch]:
    """Reads the residual stream at the SAE's layer and pools every feature over each response's completion tokens.

    A response whose every token is of massive norm has nothing to pool and is left out.

    Raises:
        InputError: if a completion has no tokens, was not verified, or reads as NaN or infinity, or there is no such
            pooling.
    """
    check_responses(responses)
    aggregation = build_aggregation(pooling)
    for group in _question_groups(responses, batch_size):
        prompts = [list(response.prompt_ids) for response in group]
        completions = [list(response.completion_ids) for response in group]
        acts_BF = torch.zeros(len(group), sae.d_sae)
        counts_B = torch.zeros(len(group), dtype=torch.long)
        ends_BT = None
        if isinstance(aggregation, StepEndAggregation):
            ends_BT = step_ends(loaded.tokenizer, completions, aggregation.mark)
        for batch in iter_residuals(loaded.model, prompts, completions, sae.meta.layer, batch_size):
            keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
            rows = torch.tensor(batch.rows)
            here_BT = None if ends_BT is None else ends_BT[rows, : keep_BT.shape[1]].to(keep_BT.device)
            acts_BF[rows] = pool_features(sae, batch.h_BTD, keep_BT, pooling, here_BT).cpu()
            counts_B[rows] = keep_BT.sum(1).cpu()
        used = (counts_B > 0).nonzero()[:, 0]
        yield PooledBatch(
            question_ids=[group[row].question_id for row in used.tolist()],
            correct_B=torch.tensor([group[row].correct is True for row in used.tolist()], dtype=torch.bool),
            acts_BF=acts_BF[used],
        )


def pool_features(
    sae: SAE,
    h_BTD: Float[Tensor, "b t d"],
    mask_BT: Bool[Tensor, "b t"],
    pooling: Pooling,
    step_end_BT: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b f"]:
    """Each feature pooled over the masked-in tokens of each row; 0 for a row with none. Only what counts is encoded.

    `step_end_BT` is for the pooling `step_end` alone.
    """
    aggregation = build_aggregation(pooling)
    of_max = isinstance(aggregation, MaxAggregation)
    counted_BT = aggregation.counted(mask_BT, step_end_BT)
    weight_BT = counted_BT.float() if of_max else aggregation.weights(counted_BT)
    pooled_BF = torch.zeros(len(h_BTD), sae.d_sae, device=h_BTD.device)
    used_BT = weight_BT > 0
    row_N, weight_N, h_ND = used_BT.nonzero()[:, 0], weight_BT[used_BT], h_BTD[used_BT]
    for start in range(0, len(h_ND), TOKENS):
        piece = slice(start, start + TOKENS)
        acts_NF = sae.encode(h_ND[piece]).float()
        if of_max:
            # Activations are never negative, so that a start of 0 is the maximum of nothing.
            pooled_BF.scatter_reduce_(0, row_N[piece, None].expand_as(acts_NF), acts_NF, "amax")
        else:
            pooled_BF.index_add_(0, row_N[piece], acts_NF.mul_(weight_N[piece, None]))
    return pooled_BF if of_max else pooled_BF / weight_BT.sum(1, keepdim=True).clamp(min=1)


def check_responses(responses: Sequence[Response]) -> None:
    """Checks that every response has tokens and a verdict.

    Raises:
        InputError: naming the first question where one is missing.
    """
    for response in responses:
        if not response.completion_ids:
            raise InputError(f"responses: a completion for question {response.question_id} has no tokens")
        if response.correct is None:
            raise InputError(f"correct: it is None in an answer to question {response.question_id}, verify it first")


def _question_groups(responses: Sequence[Response], size: int) -> Iterator[list[Response]]:
    """Whole questions in order of first appearance, gathered until there are at least `size` responses."""
    by_question: dict[str, list[Response]] = {}
    for response in responses:
        by_question.setdefault(response.question_id, []).append(response)
    group: list[Response] = []
    for answers in by_question.values():
        group.extend(answers)
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group
