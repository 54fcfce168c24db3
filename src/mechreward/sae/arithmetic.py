"""The arithmetic of one encoder, and the rule by which features are active.

A matrix product in float32 comes out a little different for every shape of the call, so that a feature within rounding
distance of the point where it becomes active may be active in one call and not in another. The rule that removes this:

    **Where rounding could decide, the product x . W_f is computed in float64 and rounded once to float32; everything
    after it is elementwise float32. Among equal values at the k-th place the lowest feature index wins.**

"Could decide" means within a margin of the boundary: `margin` bounds the rounding error of a product of length D as
u * sqrt(D) * |x| * |W_f|, u = 2^-24, the statistical growth of a sum's error taken at its full magnitude. Few entries
lie there, so the rule costs little. Deviation from sae-lens and torch.topk: they leave those cases to chance.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

UNIT = 2.0**-24
"""Unit roundoff of float32."""
EXACT_FLOATS = 2**21
"""Numbers held at once while products are computed in float64."""


FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


@dataclass(frozen=True, eq=False)
class HalfWeights:
    """An encoder's weights in float16, the factors of its pre-activations multiplied in: see `screening`."""

    W_FD: Float[Tensor, "f d"]
    """In `unit`s, so that the largest is 1 in size."""
    bias_F: Float[Tensor, " f"]
    """Of the pre-activations, in float32 and the SAE's own units."""
    unit: float
    norm: float
    """Largest norm of a feature's weights, in the SAE's own units."""
    bias: float
    """Largest bias in size."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder with F features of width D; None where its architecture has no such part."""

    W_FD: Float[Tensor, "f d"]
    bias_F: Float[Tensor, " f"]
    scale_F: Float[Tensor, " f"] | None
    """Factors of the pre-activations."""
    threshold_F: Float[Tensor, " f"] | None
    gate_bias_F: Float[Tensor, " f"] | None
    magnitude_F: Float[Tensor, " f"] | None
    """Factors of the products in the magnitudes of a gated SAE."""
    k: int | None

    @property
    def n_features(self) -> int:
        return self.W_FD.shape[0]

    def activations(self, x_ND: Float[Tensor, "n d"], ids_K: Int[Tensor, " k"] | None = None) -> Tensor:
        """Activations [N, K] of the features `ids_K`, or [N, F] of all; of a TopK encoder all only."""
        if self.k is not None:
            assert ids_K is None, "which k are kept depends on every feature"
            return self._keep_topk(x_ND)
        z_NK = x_ND @ (self.W_FD if ids_K is None else self.W_FD[ids_K]).T
        self._settle(z_NK, x_ND, (z_NK - _pick(self._switch_F, ids_K)).abs() <= self.margin(x_ND), ids_K)
        return self._activate(z_NK, ids_K)

    def pre(self, z: Tensor, ids: Tensor | None = None) -> Tensor:
        """Pre-activations from products `z`, elementwise; `ids` are the features of its last axis."""
        pre = z + _pick(self.bias_F, ids)
        return pre if self.scale_F is None else pre * _pick(self.scale_F, ids)

    def part(self, ids_K: Int[Tensor, " k"]) -> Encoder:
        """The encoder of some features alone; of a TopK encoder for `affine` only."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: dict[str, Any] = {name: part[ids_K] for name, part in named.items() if isinstance(part, Tensor)}
        return replace(self, **parts)

    def affine(self, x_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Pre-activations in one go, the bias added inside the product: right within `margin`."""
        pre_NF = torch.addmm(self.bias_F, x_ND, self.W_FD.T)
        return pre_NF if self.scale_F is None else pre_NF.mul_(self.scale_F)

    def margin(self, x_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """How far rounding can move a pre-activation of each token."""
        return self.bound(torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True), x_ND.shape[1])

    def bound(self, norm: FloatOrTensor, width: int) -> FloatOrTensor:
        """`margin` of a token of this norm."""
        return norm * (UNIT * width**0.5 * self._reach) + 4 * UNIT * self._offset

    def exact(self, x_ND: Tensor, row_M: Int[Tensor, " m"], id_M: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Products of rows and features pair by pair, in float64, rounded to float32."""
        size = max(1, EXACT_FLOATS // x_ND.shape[1])
        pieces = zip(row_M.split(size), id_M.split(size), strict=True)
        return torch.cat([(x_ND[row].double() * self.W_FD[id_].double()).sum(-1) for row, id_ in pieces]).float()

    @cached_property
    def half(self) -> HalfWeights:
        """The weights for half-precision products."""
        scale_F = torch.ones_like(self.bias_F) if self.scale_F is None else self.scale_F
        W_FD, bias_F = self.W_FD * scale_F[:, None], self.bias_F * scale_F
        unit, norm, bias = W_FD.abs().max().clamp_min(2.0**-100), W_FD.norm(dim=-1).max(), bias_F.abs().max()
        return HalfWeights((W_FD / unit).half(), bias_F, unit.item(), norm.item(), bias.item())

    @cached_property
    def _reach(self) -> float:
        norm_F = self.W_FD.norm(dim=-1)
        return (norm_F if self.scale_F is None else norm_F * self.scale_F.clamp_min(1)).max().item()

    @cached_property
    def _offset(self) -> float:
        parts = [self.bias_F if self.scale_F is None else self.bias_F * self.scale_F.clamp_min(1), self._switch_F]
        return max(part.abs().max().item() for part in parts)

    @cached_property
    def _switch_F(self) -> Tensor:
        """The product beyond which each feature is active (of all architectures but TopK)."""
        if self.gate_bias_F is not None and self.magnitude_F is not None:
            return torch.maximum(-self.gate_bias_F, -self.bias_F / self.magnitude_F)
        least_F = torch.zeros_like(self.bias_F) if self.threshold_F is None else self.threshold_F.clamp_min(0)
        return least_F - self.bias_F

    def _activate(self, z_NK: Tensor, ids_K: Tensor | None) -> Tensor:
        if self.gate_bias_F is not None and self.magnitude_F is not None:
            open_NK = z_NK + _pick(self.gate_bias_F, ids_K) > 0
            return (z_NK * _pick(self.magnitude_F, ids_K) + _pick(self.bias_F, ids_K)).relu() * open_NK
        pre_NK = self.pre(z_NK, ids_K)
        return pre_NK.relu() if self.threshold_F is None else pre_NK.relu() * (pre_NK > _pick(self.threshold_F, ids_K))

    def _settle(self, z_NK: Tensor, x_ND: Tensor, near_NK: Bool[Tensor, "n k"], ids_K: Tensor | None) -> None:
        """Replaces the products that are near a boundary by exact ones, in place."""
        row_M, column_M = near_NK.nonzero(as_tuple=True)
        if len(row_M):
            z_NK[row_M, column_M] = self.exact(x_ND, row_M, column_M if ids_K is None else ids_K[column_M])

    def _keep_topk(self, x_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """ReLU of each token's k largest pre-activations, else zero."""
        pre_NF, margin_N1 = self.pre(x_ND @ self.W_FD.T), self.margin(x_ND)
        kth_N1, next_N1 = self._around_kth(pre_NF)
        # What is not positive is zero whether it is kept or not: the boundary never lies below zero.
        boundary_N1 = kth_N1.clamp_min(0)
        open_N = ((kth_N1 - next_N1 <= 2 * margin_N1) | (kth_N1 <= 2 * margin_N1))[:, 0].nonzero()[:, 0]
        if not len(open_N):
            return pre_NF.mul_(pre_NF >= boundary_N1)
        settled = self._settle_topk(pre_NF[open_N], x_ND[open_N], boundary_N1[open_N], margin_N1[open_N])
        acts_NF = pre_NF.mul_(pre_NF >= boundary_N1)
        acts_NF[open_N] = settled
        return acts_NF

    def _around_kth(self, pre_NF: Tensor) -> tuple[Tensor, Tensor]:
        """The k-th and the next value of each row; minus infinity where there is none."""
        assert self.k is not None
        if self.k >= self.n_features:
            none_N1 = torch.full_like(pre_NF[:, :1], -torch.inf)
            return none_N1, none_N1
        top_NJ = pre_NF.topk(self.k + 1, dim=-1).values
        return top_NJ[:, -2:-1], top_NJ[:, -1:]

    def _settle_topk(self, pre_MF: Tensor, x_MD: Tensor, boundary_M1: Tensor, margin_M1: Tensor) -> Tensor:
        """Keeps what is above the boundary for certain, and of what is near it the largest by exact value."""
        assert self.k is not None
        certain_MF = pre_MF > boundary_M1 + 2 * margin_M1
        row, column = ((pre_MF >= boundary_M1 - 2 * margin_M1) & ~certain_MF).nonzero(as_tuple=True)
        value = self.pre(self.exact(x_MD, row, column)[:, None], column[:, None])[:, 0]
        # Rows are in order and columns ascend within one: two stable sorts leave (row, value descending, column).
        order = value.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        row, column, value = row[order], column[order], value[order]
        per_row = torch.bincount(row, minlength=len(pre_MF))
        rank = torch.arange(len(row), device=row.device) - (per_row.cumsum(0) - per_row)[row]
        kept = (rank < (self.k - certain_MF.sum(-1))[row]) & (value > 0)
        acts_MF = pre_MF * certain_MF
        acts_MF[row[kept], column[kept]] = value[kept]
        return acts_MF


def _pick(values_F: Tensor, ids: Tensor | None) -> Tensor:
    return values_F if ids is None else values_F[ids]
