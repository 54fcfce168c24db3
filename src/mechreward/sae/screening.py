"""Pre-activations that are good enough to count with: float32, or half precision where that is fast.

Counting how many features exceed a bar needs no exact numbers, only a bound on how wrong they may be. A screen holds a
batch's inputs and an encoder's weights in one float type, and for every token the margin within which its
pre-activations are right; whoever counts leaves out what lies within it.

The half-precision screen brings both factors to at most 1 in size, folds the factors of the pre-activations into the
weights, and multiplies in float16, summed in float32 as tensor cores do (`precision` sees to it). With u = 2^-11 for
the rounding of each factor and of the result, and 2^-25 where a number is too small for float16's normal range, a
pre-activation of inputs x and weights w is wrong by at most

    3 u |x| |w| + 2^-25 sqrt(D) (|x| + |w|) + 3 u |bias|

besides float32's own margin, by the triangle and Cauchy-Schwarz inequalities; the largest |w| and |bias| of all
features stand for each. float16, not bfloat16: its bound is an eighth, and both run at the same speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechreward.sae.arithmetic import Encoder

HALF_UNIT = 2.0**-11
"""Unit roundoff of float16."""
HALF_LEAST = 2.0**-25
"""Largest absolute error of rounding a number below float16's normal range."""
LARGEST_BIAS = 2.0**10
"""Of a screen, in units of the largest weight times the largest input: keeps every sum far from float16's 65,504."""


@dataclass(frozen=True, eq=False)
class Screen:
    """An encoder in one float type, the inputs it is applied to, and how far its pre-activations can be trusted."""

    encoder: Encoder
    x_ND: Float[Tensor, "n d"]
    unit: float
    """A pre-activation in the SAE's own units is `unit` times what `pre` gives."""
    margin_N: Float[Tensor, " n"]
    """In the SAE's own units."""

    def part(self, ids_S: Int[Tensor, " s"]) -> Screen:
        """The screen of some features alone."""
        return replace(self, encoder=self.encoder.part(ids_S))

    def pre(self, rows_M: Int[Tensor, " m"]) -> Float[Tensor, "m f"]:
        """Pre-activations of some tokens, in `unit`s and the screen's float type."""
        return self.encoder.affine(self.x_ND[rows_M])


def float32_screen(encoder: Encoder, x_ND: Float[Tensor, "n d"], exact_N: Float[Tensor, " n"]) -> Screen:
    """The encoder as it is, right within `exact_N`: its own margins of the tokens."""
    return Screen(encoder, x_ND, 1.0, exact_N)


def float16_screen(encoder: Encoder, x_ND: Float[Tensor, "n d"], exact_N: Float[Tensor, " n"]) -> Screen:
    """A copy in half precision; the weights' is made once per encoder. `exact_N` as in `float32_screen`."""
    half = encoder.half
    # The bias is what may be large beside the product.
    least = torch.as_tensor(half.bias / (half.unit * LARGEST_BIAS), device=x_ND.device)
    largest = torch.maximum(x_ND.abs().amax() if x_ND.numel() else least, least).clamp_min(2.0**-100).item()
    x_norm_N = x_ND.norm(dim=-1) / largest
    w_norm, root = half.norm / half.unit, x_ND.shape[1] ** 0.5
    unit = half.unit * largest
    bound_N = 3 * HALF_UNIT * (x_norm_N * w_norm + half.bias / unit) + HALF_LEAST * root * (x_norm_N + w_norm)
    return Screen(
        encoder=replace(encoder, W_FD=half.W_FD, bias_F=(half.bias_F / unit).half(), scale_F=None),
        x_ND=(x_ND / largest).half(),
        unit=unit,
        margin_N=unit * bound_N + exact_N,
    )
