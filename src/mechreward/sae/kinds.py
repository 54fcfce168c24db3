"""The kinds of SAE that are read, and what each must and must not have; ids of its features."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechreward.errors import InputError

if TYPE_CHECKING:
    from mechreward.sae.sae import SAE

Architecture = Literal["topk", "relu", "jumprelu", "gated"]
InputNorm = Literal["none", "center", "layer_norm", "constant_norm_rescale"]
"""What is done to a residual first: nothing; subtract its mean over the width; do that and divide by its standard
deviation + 1e-5 (with Bessel's correction, as OpenAI's and SAE Lens' code); or scale it to norm sqrt(D)."""

NEEDED: dict[str, tuple[str, ...]] = {"jumprelu": ("threshold_F",), "gated": ("b_gate_F", "r_mag_F")}
"""Tensors of an architecture beyond the four that all have; the others must not have them."""


def check_fields(sae: SAE) -> None:
    """Checks a new SAE.

    Raises:
        InputError: if a tensor's shape does not fit, a weight is not finite, or a field does not suit the architecture.
    """
    if sae.architecture not in get_args(Architecture):
        raise InputError(f"architecture: {sae.architecture!r} is not one of {', '.join(get_args(Architecture))}")
    if sae.input_norm not in get_args(InputNorm):
        raise InputError(f"input_norm: {sae.input_norm!r} is not one of {', '.join(get_args(InputNorm))}")
    if sae.W_enc_DF.ndim != 2 or 0 in sae.W_enc_DF.shape:
        raise InputError(f"W_enc_DF: shape {tuple(sae.W_enc_DF.shape)} is not [d_model, d_sae] with both at least 1")
    d, f = sae.W_enc_DF.shape
    wanted = {"W_enc_DF": (d, f), "W_dec_FD": (f, d), "b_dec_D": (d,)}
    for name, tensor in sae.tensors().items():
        if tuple(tensor.shape) != wanted.get(name, (f,)):
            shape = wanted.get(name, (f,))
            raise InputError(f"{name}: shape {tuple(tensor.shape)} is not {shape}, as an SAE of {d} x {f} needs")
        # One number that is not finite makes the sum so: `isfinite` copies the tensor, the sum does not.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise InputError(f"{name}: the SAE's weights hold NaN or infinity; all must be finite")
    if sae.architecture == "topk" and not (sae.k is not None and 1 <= sae.k <= f):
        raise InputError(f"k: {sae.k} is not between 1 and the SAE's {f} features")
    if sae.architecture != "topk" and (sae.k is not None or sae.rescale_acts_by_decoder_norm):
        raise InputError(f"architecture: k and rescale_acts_by_decoder_norm are for topk, not for {sae.architecture}")
    for kind, names in NEEDED.items():
        for name in names:
            if (name in sae.tensors()) != (kind == sae.architecture):
                raise InputError(f"{name}: needed by {kind} and only by it; the architecture is {sae.architecture}")


def checked_ids(feature_ids: Iterable[Any], d_sae: int) -> list[int]:
    """Ids of features as a list, of whichever kind they are given.

    Raises:
        InputError: if one is no whole number, or not of a feature.
    """
    ids = feature_ids.tolist() if isinstance(feature_ids, Tensor) else list(feature_ids)
    for i in ids:
        # A mask of booleans would be read as features 0 and 1, and 3.7 as feature 3.
        if isinstance(i, bool | np.bool_) or not isinstance(i, Integral):
            raise InputError(f"feature_ids: {i!r} is not a whole number; ids of features are, e.g. [3, 17]")
        if not 0 <= int(i) < d_sae:
            raise InputError(f"feature_ids: {i} is not a feature of this SAE; ids go from 0 to {d_sae - 1}")
    return [int(i) for i in ids]


def norm_statistics(rows: Tensor, norm: InputNorm) -> tuple[Tensor, Tensor]:
    """(shift, scale) of each residual: `norm` makes it (h - shift) / scale."""
    if norm == "center":
        return rows.mean(-1, keepdim=True), torch.ones_like(rows[..., :1])
    if norm == "layer_norm":
        return rows.mean(-1, keepdim=True), rows.std(-1, keepdim=True)
    scale = rows.norm(dim=-1, keepdim=True) / rows.shape[-1] ** 0.5
    return torch.zeros_like(scale), scale
