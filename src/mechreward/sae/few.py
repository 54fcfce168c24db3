"""A few features of a few tokens at a time, as at every step of a steered generation, with little beside the products.

`SAE.read` is made for many tokens: it checks, sorts and stages, and for one token that takes longer than the product
itself. Here all that does not depend on the tokens is made ready once. ReLU, JumpReLU and Gated compute the chosen
features by the rule of `arithmetic`, as `SAE.read` does. TopK computes every pre-activation and compares the chosen
ones with the k-th largest, or encodes the tokens in full where rounding could decide (`Encoder.activations` has the
bars): exactly the same features are active. What is not finite, or of another width, is left to `SAE.read`, which
refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.sae.arithmetic import Encoder
from mechreward.sae.precision import plain_float32, stays_plain

FEW = 2**23
"""Products, N x D x F, up to which a full matrix product is faster than the staged reading, measured on a CPU."""

Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FewReader:
    """Reads K chosen features; made by `SAE.reader`."""

    read: Read
    """The reading that it falls back to."""
    inputs: Read
    """From residuals to what the encoder's weights are applied to."""
    encoder: Encoder
    ids_K: Tensor
    chosen: Encoder = field(init=False)
    """The encoder with the chosen features alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", self.encoder.part(self.ids_K))

    def __call__(self, h_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Activations as `SAE.read` gives them: the same ones active, values equal up to float32 rounding.

        Raises:
            InputError: as `SAE.read`.
        """
        fits = h_ND.shape[-1] == self.encoder.W_FD.shape[1]
        if not len(self.ids_K) or not fits or not 0 < h_ND.numel() * self.encoder.n_features <= FEW:
            return self.read(h_ND)
        device = self.ids_K.device
        with nullcontext() if stays_plain(device) else plain_float32(device):
            x_ND = self.inputs(h_ND.detach().to(device, torch.float32))
            acts_NK = self._plain(x_ND) if self.encoder.k is None else self._topk(x_ND, self.encoder.k)
        return self.read(h_ND) if acts_NK is None else acts_NK

    def _plain(self, x_ND: Tensor) -> Tensor | None:
        """None for what is not finite."""
        return self.chosen.activations(x_ND) if x_ND.sum().isfinite() else None

    def _topk(self, x_ND: Tensor, k: int) -> Tensor | None:
        """None for what is not finite."""
        if k < self.encoder.n_features:
            pre_NF = self.encoder.affine(x_ND)
            top_NJ = pre_NF.topk(k + 1, dim=-1).values
            # In plain numbers: for a few tokens, tensor operations take longer than what they compute.
            norm = max(torch.linalg.vector_norm(x_ND, dim=-1).tolist())
            both = 2 * self.encoder.bound(norm, x_ND.shape[1])
            if all(kth > both and kth - follows > both for kth, follows in top_NJ[:, -2:].tolist()):
                own_NK = pre_NF.index_select(1, self.ids_K)
                return own_NK.mul_(own_NK >= top_NJ[:, -2:-1])
        return self.encoder.activations(x_ND).index_select(1, self.ids_K) if x_ND.sum().isfinite() else None
