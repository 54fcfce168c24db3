"""Every SAE feature, pooled over each completion, one group of whole questions at a time.

Streaming: at most one residual batch's tokens (in slices of `TOKENS` x F) and one group's responses are held, never all
tokens and never all responses. Tokens of massive norm are left out, as they are from the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.aggregation import (
    Aggregation,
    MaxAggregation,
    MeanAggregation,
    StepEndAggregation,
    build_aggregation,
)
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
    states_BD: Float[Tensor, "b d"] | None = None
    """Residuals pooled over the same tokens (by the mean where features are pooled by max), if they were asked for."""


@torch.no_grad()
def pooled_activations(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    pooling: Pooling = "mean",
    *,
    positions: Sequence[Sequence[int]] | None = None,
    with_states: bool = False,
    batch_size: int = 32,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Iterator[PooledBatch]:
    """Reads the residual stream at the SAE's layer and pools every feature over each response's completion tokens.

    A response of which nothing is left to pool (every token that counts is of massive norm) is left out.

    Args:
        positions: one list a response: places in its completion, from 0, of the only tokens that count, e.g. critical
            tokens. An empty list leaves the response out. All tokens count if None.
        with_states: give pooled residuals as well.
        on_batch: told how many responses were read, batch by batch.

    Raises:
        InputError: if a completion has no tokens, was not verified, or reads as NaN or infinity, there is no such
            pooling, or a position is not one of its completion's.
    """
    check_responses(responses)
    aggregation = build_aggregation(pooling)
    _check_positions(responses, positions, aggregation)
    for places in _question_groups(responses, batch_size):
        group = [responses[place] for place in places]
        chosen = None if positions is None else [positions[place] for place in places]
        yield _pooled_group(loaded, sae, group, aggregation, chosen, with_states, batch_size)
        on_batch(len(group))


def _pooled_group(
    loaded: LoadedModel,
    sae: SAE,
    group: list[Response],
    aggregation: Aggregation,
    positions: Sequence[Sequence[int]] | None,
    with_states: bool,
    batch_size: int,
) -> PooledBatch:
    completions = [list(response.completion_ids) for response in group]
    acts_BF, used_B = torch.zeros(len(group), sae.d_sae), torch.zeros(len(group), dtype=torch.bool)
    states_BD = torch.zeros(len(group), sae.d_model)
    # The mean of states where features are pooled by max: a maximum over each coordinate is no state.
    of_states = MeanAggregation() if isinstance(aggregation, MaxAggregation) else aggregation
    ends_BT = counted_BT = None
    if isinstance(aggregation, StepEndAggregation):
        ends_BT = step_ends(loaded.tokenizer, completions, aggregation.mark)
    if positions is not None:
        counted_BT = _at_positions(positions, max(map(len, completions)))
    prompts = [list(response.prompt_ids) for response in group]
    for batch in iter_residuals(loaded.model, prompts, completions, sae.meta.layer, batch_size):
        keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
        rows, width = torch.tensor(batch.rows), keep_BT.shape[1]
        if counted_BT is not None:
            keep_BT &= counted_BT[rows, :width].to(keep_BT.device)
        here_BT = None if ends_BT is None else ends_BT[rows, :width].to(keep_BT.device)
        acts_BF[rows] = pool_features(sae, batch.h_BTD, keep_BT, aggregation.spec, here_BT).cpu()
        used_B[rows] = keep_BT.any(1).cpu()
        if with_states:
            states_BD[rows] = of_states(batch.h_BTD, keep_BT, here_BT).cpu()
    used = used_B.nonzero()[:, 0]
    return PooledBatch(
        question_ids=[group[row].question_id for row in used.tolist()],
        correct_B=torch.tensor([group[row].correct is True for row in used.tolist()], dtype=torch.bool),
        acts_BF=acts_BF[used],
        states_BD=states_BD[used] if with_states else None,
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
    weight_BT = aggregation.weights(counted_BT)
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


def _question_groups(responses: Sequence[Response], size: int) -> Iterator[list[int]]:
    """Places of whole questions' responses, in order of first appearance, gathered until there are `size` or more."""
    by_question: dict[str, list[int]] = {}
    for place, response in enumerate(responses):
        by_question.setdefault(response.question_id, []).append(place)
    group: list[int] = []
    for places in by_question.values():
        group.extend(places)
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group


def _at_positions(positions: Sequence[Sequence[int]], width: int) -> Bool[Tensor, "b t"]:
    at_BT = torch.zeros(len(positions), width, dtype=torch.bool)
    for row, places in enumerate(positions):
        at_BT[row, list(places)] = True
    return at_BT


def _check_positions(
    responses: Sequence[Response], positions: Sequence[Sequence[int]] | None, aggregation: Aggregation
) -> None:
    if positions is None:
        return
    if aggregation.needs_steps:
        raise InputError(f"positions: they cannot be had together with the pooling {aggregation.spec!r}; give one")
    if len(positions) != len(responses):
        raise InputError(f"positions: {len(positions)} lists for {len(responses)} responses; give one each")
    for response, places in zip(responses, positions, strict=True):
        n = len(response.completion_ids)
        stray = next((place for place in places if not 0 <= place < n), None)
        if stray is not None:
            where = f"an answer to question {response.question_id} of {n} tokens"
            raise InputError(f"positions: {stray} is not a token of {where}; they go from 0 to {n - 1}")
