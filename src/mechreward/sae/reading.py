"""A few features of a TopK SAE, exactly, without most of the encoder's matrix product.

A chosen feature is active only if fewer than k features exceed it, so a token is done with as soon as k features are
known to exceed the largest of its chosen ones: a count, which only grows. Features are tried in stages of doubling
size, those that fire most often first (`SAE.calibrated`); tokens leave after each stage. The few that stay, most of
which do have an active chosen feature, are encoded in full, by the code that `SAE.encode` runs.

Only a feature that exceeds by more than rounding can explain is counted, so a token that leaves has no active chosen
feature by the rule of `arithmetic`. Staged counting is our own; the plain road, which it is tested against, is
``encode(h)[..., feature_ids]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechreward.sae.arithmetic import Encoder

FIRST_STAGE = 4
"""Features of the first stage, in multiples of k."""
STAGE_FLOATS = 2**20
"""Pre-activations of a stage held at once."""


def read_topk(
    encoder: Encoder,
    x_ND: Float[Tensor, "n d"],
    ids_K: Int[Tensor, " k"],
    order_F: Int[Tensor, " f"] | None,
    block_tokens: int,
) -> Float[Tensor, "n k"]:
    """Activations of the features `ids_K` of a TopK encoder.

    Args:
        x_ND: the encoder's inputs.
        ids_K: distinct features.
        order_F: features by how often they fire, most often first; None takes them as they come.
        block_tokens: tokens encoded in full at a time.
    """
    acts_NK = torch.zeros(len(x_ND), len(ids_K), device=x_ND.device)
    largest_N = encoder.pre(x_ND @ encoder.W_FD[ids_K].T, ids_K).amax(-1)
    for rows in blocks(_not_outnumbered(encoder, x_ND, largest_N, order_F), block_tokens):
        acts_NK[rows] = encoder.activations(x_ND[rows])[:, ids_K]
    return acts_NK


def blocks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Rows in order, at most `size` at a time; none of an empty tensor."""
    return iter(rows.split(size) if len(rows) else ())


def _not_outnumbered(
    encoder: Encoder, x_ND: Float[Tensor, "n d"], largest_N: Float[Tensor, " n"], order_F: Tensor | None
) -> Int[Tensor, " stay"]:
    """The tokens of which the stages do not show that k features exceed `largest_N`."""
    assert encoder.k is not None
    margin_N = encoder.margin(x_ND)[:, 0]
    stay_M = (largest_N > -margin_N).nonzero()[:, 0]
    bar_N = largest_N + 2 * margin_N
    count_N = torch.zeros(len(x_ND), dtype=torch.long, device=x_ND.device)
    for start, end in _stages(encoder.n_features, FIRST_STAGE * encoder.k):
        before = len(stay_M)
        if not before:
            break
        ids_S = torch.arange(start, end, device=x_ND.device) if order_F is None else order_F[start:end]
        count_N[stay_M] += _exceeding(encoder, x_ND, stay_M, bar_N, ids_S)
        stay_M = stay_M[count_N[stay_M] < encoder.k]
        # A token that leaves saves a full encoding; the next stage costs each that stays twice as much as this one.
        if (before - len(stay_M)) * encoder.n_features < 2 * len(stay_M) * (end - start):
            break
    return stay_M


def _stages(n_features: int, first: int) -> Iterator[tuple[int, int]]:
    start, size = 0, first
    while start < n_features:
        yield start, min(start + size, n_features)
        start, size = start + size, 2 * size


def _exceeding(encoder: Encoder, x_ND: Tensor, rows_M: Tensor, bar_N: Tensor, ids_S: Tensor) -> Int[Tensor, " m"]:
    """How many of the features exceed the bar of each row."""
    W_DS = encoder.W_FD[ids_S].T
    pieces = rows_M.split(max(1, STAGE_FLOATS // len(ids_S)))
    return torch.cat([(encoder.pre(x_ND[rows] @ W_DS, ids_S) > bar_N[rows, None]).sum(-1) for rows in pieces])
