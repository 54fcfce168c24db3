"""A few features of a TopK SAE, exactly, without most of the encoder's matrix product.

A chosen feature is active only if fewer than k features exceed it, so a token is done with as soon as k features are
known to exceed the largest of its chosen ones: a count, which only grows. Features are tried in growing stages, those
that fire most often first (`SAE.calibrated`); tokens leave after each stage. Of the few that stay, most of which do
have an active chosen feature, all pre-activations are computed, and chosen features counted against them, the largest
first, until one is outnumbered: no top-k is needed.

Counts come from a `Screen`, in half precision on a GPU: only a feature that exceeds by more than its error is counted.
The chosen features themselves are computed in float32. Where counts do not decide, the features that are too near to
call are ranked by their exact values, pair by pair, which is the rule of `arithmetic` that `SAE.encode` follows too:
what is active does not depend on the screen. Staged counting is our own; the plain road, which it is tested against, is
``encode(h)[..., feature_ids]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechreward.sae.arithmetic import Encoder
from mechreward.sae.screening import Screen, float16_screen, float32_screen

LEAST_STAGED = 1 / 8
"""Share of the features that is tried before the stages may be given up: counts need some to grow."""
FIRST_STAGE = 4
"""Features of the first stage, in multiples of k."""
GROWTH = 1.5
"""Of each stage over the one before."""
COPY_ROWS = 64
"""Copying a feature's weights together takes as long as its product with about so many rows."""
BLOCK_TOKENS = 128
"""Least number of tokens whose pre-activations of all features are computed at a time."""


@dataclass(frozen=True)
class Sizes:
    """How much is held at once: what fits a CPU's caches, or keeps a GPU busy."""

    stage: int = 2**20
    """Pre-activations of a stage."""
    piece: int = 2**22
    """Weights, and inputs, copied together for a stage; pre-activations compared with the settled ones."""
    block: int = 2**20
    """Pre-activations of all features, of as many tokens as fit."""
    inputs: int = 10 * 2**20
    """Inputs of the encoder, of as many tokens as fit: everything above is done once for each such piece."""


ON_CPU, ON_CUDA = Sizes(), Sizes(stage=2**27, piece=2**27, block=2**26, inputs=2**27)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The chosen features of every token: float32 pre-activations, right within `exact_N`, and how far these and the
    screen's can be apart."""

    ids_K: Int[Tensor, " k"]
    value_NK: Float[Tensor, "n k"]
    exact_N: Float[Tensor, " n"]
    apart_N: Float[Tensor, " n"]

    def rows(self, rows_M: Tensor) -> Chosen:
        """Those of some tokens."""
        return Chosen(self.ids_K, self.value_NK[rows_M], self.exact_N[rows_M], self.apart_N[rows_M])


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
    exact_N = encoder.margin(x_ND)[:, 0]
    screen = (float16_screen if half_pays(x_ND) else float32_screen)(encoder, x_ND, exact_N)
    # A little more than the sum, so that a chosen feature never misses its own bar by rounding.
    chosen = Chosen(ids_K, encoder.part(ids_K).affine(x_ND), exact_N, 1.001 * (exact_N + screen.margin_N))
    acts_NK = torch.zeros_like(chosen.value_NK)
    for rows in blocks(_not_outnumbered(encoder, screen, chosen, order_F), block_tokens):
        acts_NK[rows] = _counted(encoder, x_ND[rows], screen.pre(rows), screen.unit, chosen.rows(rows))
    return acts_NK


def block_tokens(n_features: int, device: torch.device) -> int:
    """Tokens whose pre-activations of all features are computed at a time.

    On CUDA as many as fit 256 MiB: there a small block costs more in starting kernels than in computing.
    """
    return max(BLOCK_TOKENS, _sizes(device).block // n_features)


def input_tokens(width: int, device: torch.device) -> int:
    """Tokens whose inputs are made, and that go through the stages, at a time: 40 MiB of float32, on CUDA 512."""
    return max(1, _sizes(device).inputs // width)


def half_pays(x_ND: Tensor) -> bool:
    """Whether products in half precision are faster than in float32: on CUDA; a CPU gains nothing."""
    return x_ND.is_cuda


def _counted(encoder: Encoder, x_SD: Tensor, pre_SF: Tensor, unit: float, chosen: Chosen) -> Float[Tensor, "s k"]:
    """Activations of the chosen features, by counting for each what exceeds it."""
    value_SK, place_SK = chosen.value_NK.sort(-1, descending=True)
    acts_SK = torch.zeros_like(value_SK)
    unsure: list[tuple[Tensor, Tensor]] = []
    rows = torch.arange(len(x_SD), device=x_SD.device)
    for rank, (value_S, place_S) in enumerate(zip(value_SK.T, place_SK.T, strict=True)):
        rows = rows[(value_S > -chosen.exact_N)[rows]]
        if not len(rows):
            break
        low_S, high_S = (value_S - chosen.apart_N) / unit, (value_S + chosen.apart_N) / unit
        fits, open_ = _decided(encoder, pre_SF, rows, low_S, high_S, likely=rank == 0)
        positive = (value_S > chosen.exact_N)[fits]
        acts_SK[fits[positive], place_S[fits[positive]]] = value_S[fits[positive]]
        near = torch.cat([open_, fits[~positive]])
        unsure.append((near, place_S[near]))
        # Where a larger chosen feature is not active, no smaller one is; one that may be leaves the rest to be asked.
        rows = torch.cat([fits[positive], near])
    row_P, place_P = (torch.cat(parts) for parts in zip(*unsure, strict=True)) if unsure else (rows, rows)
    if len(row_P):
        acts_SK[row_P, place_P] = _settled(encoder, x_SD, pre_SF, unit, chosen, row_P, place_P)
    return acts_SK


def _settled(
    encoder: Encoder, x_SD: Tensor, pre_SF: Tensor, unit: float, chosen: Chosen, row_P: Tensor, place_P: Tensor
) -> Float[Tensor, " p"]:
    """Activations of pairs of a token and a chosen feature, which is ranked among those near it by exact value."""
    assert encoder.k is not None
    id_P = chosen.ids_K[place_P]
    act_P = _exact(encoder, x_SD, row_P, id_P).clamp_min(0)
    for pairs in blocks(act_P.nonzero()[:, 0], max(1, _sizes(x_SD.device).piece // pre_SF.shape[1])):
        row_B, value_B1, apart_B1 = row_P[pairs], act_P[pairs, None], chosen.apart_N[row_P[pairs], None]
        above_BF = pre_SF[row_B] > (value_B1 + apart_B1) / unit
        pair, near = ((pre_SF[row_B] >= (value_B1 - apart_B1) / unit) & ~above_BF).nonzero(as_tuple=True)
        # What is near one chosen feature of a token is often near its others: each is computed once a token.
        place_Q, found = (row_B[pair] * encoder.n_features + near).unique(return_inverse=True)
        exact_Q = _exact(encoder, x_SD, place_Q // encoder.n_features, place_Q % encoder.n_features)
        other, own = exact_Q[found], value_B1[pair, 0]
        ahead = (other > own) | ((other == own) & (near < id_P[pairs][pair]))
        rank_B = above_BF.sum(-1) + torch.bincount(pair[ahead], minlength=len(pairs))
        act_P[pairs[rank_B >= encoder.k]] = 0.0
    return act_P


def _exact(encoder: Encoder, x_SD: Tensor, row_M: Tensor, id_M: Tensor) -> Float[Tensor, " m"]:
    """Pre-activations by the rule of `arithmetic`."""
    if not len(row_M):
        return x_SD.new_zeros(0)
    return encoder.pre(encoder.exact(x_SD, row_M, id_M)[:, None], id_M[:, None])[:, 0]


def _decided(
    encoder: Encoder, pre_SF: Tensor, rows: Tensor, low_S: Tensor, high_S: Tensor, likely: bool
) -> tuple[Tensor, Tensor]:
    """Of the rows, those in which a value in (`low_S`, `high_S`) is certainly among the k largest, and those in which
    it may be.

    `likely` says which question is asked first, so that few rows are left for the other.
    """
    assert encoder.k is not None
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


def _not_outnumbered(encoder: Encoder, screen: Screen, chosen: Chosen, order_F: Tensor | None) -> Int[Tensor, " stay"]:
    """The tokens of which the stages do not show that k features exceed the largest chosen one."""
    assert encoder.k is not None
    largest_N = chosen.value_NK.amax(-1)
    stay_M = (largest_N > -chosen.exact_N).nonzero()[:, 0]
    bar_N = (largest_N + chosen.apart_N) / screen.unit
    count_N = torch.zeros(len(largest_N), dtype=torch.long, device=largest_N.device)
    for start, end in _stages(encoder.n_features, FIRST_STAGE * encoder.k):
        before = len(stay_M)
        if not before:
            break
        ids_S = torch.arange(start, end, device=stay_M.device) if order_F is None else order_F[start:end]
        count_N[stay_M] += _exceeding(screen, stay_M, bar_N, ids_S)
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


def _exceeding(screen: Screen, rows_M: Tensor, bar_N: Tensor, ids_S: Tensor) -> Int[Tensor, " m"]:
    """How many of the features exceed the bar of each row."""
    count_M, sizes, width = torch.zeros_like(rows_M), _sizes(rows_M.device), screen.x_ND.shape[1]
    for ids in ids_S.split(max(1, sizes.piece // width)):
        part = screen.part(ids)
        size = max(1, min(sizes.stage // len(ids), sizes.piece // width))
        for count, rows in zip(count_M.split(size), rows_M.split(size), strict=True):
            count += _above(part.pre(rows), bar_N[rows, None])
    return count_M


def _above(values_MF: Tensor, bar_M1: Tensor) -> Int[Tensor, " m"]:
    """How many values of each row exceed its bar."""
    if values_MF.is_cuda:
        return (values_MF > bar_M1).sum(-1)
    # On a CPU torch sums booleans four times slower than floats.
    return torch.gt(values_MF, bar_M1, out=torch.empty(values_MF.shape)).sum(-1).long()


def _sizes(device: torch.device) -> Sizes:
    return ON_CUDA if device.type == "cuda" else ON_CPU
