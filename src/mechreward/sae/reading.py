"""A few features of a TopK SAE, exactly, without most of the encoder's matrix product.

A chosen feature is active only if fewer than k features exceed it, so a token is done with as soon as k features are
known to exceed the largest of its chosen ones: a count, which only grows. Features are tried in growing stages, those
that fire most often first (`SAE.calibrated`); tokens leave after each stage. Of the few that stay, most of which do
have an active chosen feature, all pre-activations are computed, and chosen features counted against them, the largest
first, until one is outnumbered: no top-k is needed.

Only a feature that exceeds by more than rounding can explain is counted. A token of which counts do not decide is
encoded by the code that `SAE.encode` runs, so what is active is what the rule of `arithmetic` says. Staged counting is
our own; the plain road, which it is tested against, is ``encode(h)[..., feature_ids]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechreward.sae.arithmetic import Encoder

LEAST_STAGED = 1 / 8
"""Share of the features that is tried before the stages may be given up: counts need some to grow."""
FIRST_STAGE = 4
"""Features of the first stage, in multiples of k."""
GROWTH = 1.5
"""Of each stage over the one before."""
STAGE_FLOATS = 2**20
"""Pre-activations of a stage held at once."""
PIECE_FLOATS = 2**22
"""Weights, and inputs, copied together at once for a stage."""
COPY_ROWS = 64
"""Copying a feature's weights together takes as long as its product with about so many rows."""


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
    margin_N = encoder.margin(x_ND)[:, 0]
    largest_N = encoder.part(ids_K).affine(x_ND).amax(-1)
    for rows in blocks(_not_outnumbered(encoder, x_ND, largest_N, margin_N, order_F), block_tokens):
        acts_NK[rows] = _counted(encoder, x_ND[rows], margin_N[rows], ids_K)
    return acts_NK


def _counted(encoder: Encoder, x_SD: Tensor, margin_S: Tensor, ids_K: Tensor) -> Float[Tensor, "s k"]:
    """Activations of the features `ids_K`, by counting for each what exceeds it."""
    pre_SF = encoder.affine(x_SD)
    value_SK, place_SK = pre_SF[:, ids_K].sort(-1, descending=True)
    acts_SK = torch.zeros_like(value_SK)
    unsure_S = torch.zeros(len(x_SD), dtype=torch.bool, device=x_SD.device)
    rows = torch.arange(len(x_SD), device=x_SD.device)
    for rank, (value_S, place_S) in enumerate(zip(value_SK.T, place_SK.T, strict=True)):
        rows = rows[(value_S > -margin_S)[rows]]
        if not len(rows):
            break
        fits, open_ = _decided(encoder, pre_SF, rows, value_S, margin_S, likely=rank == 0)
        positive = (value_S > margin_S)[fits]
        unsure_S[open_] = True
        unsure_S[fits[~positive]] = True
        rows = fits[positive]
        acts_SK[rows, place_S[rows]] = value_S[rows]
    rows = unsure_S.nonzero()[:, 0]
    if len(rows):
        acts_SK[rows] = encoder.activations(x_SD[rows])[:, ids_K]
    return acts_SK


def _decided(
    encoder: Encoder, pre_SF: Tensor, rows: Tensor, value_S: Tensor, margin_S: Tensor, likely: bool
) -> tuple[Tensor, Tensor]:
    """Of the rows, those in which `value_S` is certainly among the k largest, and those in which it may be.

    `likely` says which question is asked first, so that few rows are left for the other.
    """
    assert encoder.k is not None
    low_S, high_S = value_S - 2 * margin_S, value_S + 2 * margin_S
    if likely:
        fits = _rows_above(pre_SF, rows, low_S) <= encoder.k
        rest = rows[~fits]
        return rows[fits], rest[_rows_above(pre_SF, rest, high_S) < encoder.k]
    rest = rows[_rows_above(pre_SF, rows, high_S) < encoder.k]
    fits = _rows_above(pre_SF, rest, low_S) <= encoder.k
    return rest[fits], rest[~fits]


def _rows_above(pre_SF: Tensor, rows: Tensor, bar_S: Tensor) -> Int[Tensor, " m"]:
    """`_above` of some rows: of all if they are most, which spares a copy."""
    if 2 * len(rows) > len(pre_SF):
        return _above(pre_SF, bar_S[:, None])[rows]
    return _above(pre_SF[rows], bar_S[rows, None])


def blocks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Rows in order, at most `size` at a time; none of an empty tensor."""
    return iter(rows.split(size) if len(rows) else ())


def _not_outnumbered(
    encoder: Encoder,
    x_ND: Float[Tensor, "n d"],
    largest_N: Float[Tensor, " n"],
    margin_N: Float[Tensor, " n"],
    order_F: Tensor | None,
) -> Int[Tensor, " stay"]:
    """The tokens of which the stages do not show that k features exceed `largest_N`."""
    assert encoder.k is not None
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
        # A token that leaves saves a full encoding; the next stage costs each that stays more than this one.
        gain, price = (before - len(stay_M)) * encoder.n_features, GROWTH * (len(stay_M) + COPY_ROWS) * (end - start)
        if gain < price and end >= LEAST_STAGED * encoder.n_features:
            break
    return stay_M


def _stages(n_features: int, first: int) -> Iterator[tuple[int, int]]:
    start, size = 0, first
    while start < n_features:
        yield start, min(start + size, n_features)
        start, size = start + size, math.ceil(GROWTH * size)


def _exceeding(encoder: Encoder, x_ND: Tensor, rows_M: Tensor, bar_N: Tensor, ids_S: Tensor) -> Int[Tensor, " m"]:
    """How many of the features exceed the bar of each row."""
    count_M = torch.zeros_like(rows_M)
    for ids in ids_S.split(max(1, PIECE_FLOATS // x_ND.shape[1])):
        part = encoder.part(ids)
        size = max(1, min(STAGE_FLOATS // len(ids), PIECE_FLOATS // x_ND.shape[1]))
        for count, rows in zip(count_M.split(size), rows_M.split(size), strict=True):
            count += _above(part.affine(x_ND[rows]), bar_N[rows, None])
    return count_M


def _above(values_MF: Tensor, bar_M1: Tensor) -> Int[Tensor, " m"]:
    """How many values of each row exceed its bar. Compared into floats: torch sums booleans four times slower."""
    return torch.gt(values_MF, bar_M1, out=torch.empty_like(values_MF)).sum(-1).long()
