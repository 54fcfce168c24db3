"""A frozen sparse autoencoder that is only read: TopK, ReLU or JumpReLU, in float32, without gradient.

Weights are in SAE Lens' orientation and so is the arithmetic (checked against sae-lens 6.54 in the tests)::

    pre  = (h - b_dec * apply_b_dec_to_input) @ W_enc + b_enc      [times ||W_dec_f|| if rescale_acts_by_decoder_norm]
    acts = ReLU(pre)                                               relu      (Bricken et al. 2023)
           ReLU(pre) where pre > threshold, else 0                 jumprelu  (Rajamanoharan et al. 2024; strict >)
           ReLU(pre) for the k largest of a token, else 0          topk      (Gao et al. 2024)
    h'   = acts @ W_dec + b_dec                                    [acts divided by ||W_dec_f|| first if rescaled]

Deviation from sae-lens: where several features of a token tie at the k-th value, the lowest feature indices are kept
(`torch.topk` leaves the choice open), so that `encode` and `read` always agree. Under `torch.autocast` the arithmetic
stays float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.files import sha256_bytes

Architecture = Literal["topk", "relu", "jumprelu"]

# Full pre-activations exist for a chunk of tokens at a time; this bounds one such block.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SAEMeta:
    """Where an SAE comes from and which residual stream it reads."""

    release: str
    """Release name, repository or folder it was loaded from."""
    sae_id: str
    """Name within the release; empty where there is only one."""
    layer: int
    """0-based decoder block whose output it reads."""
    model_name: str
    """Model it was trained on; empty if the file does not say."""
    hook_name: str
    """Name of the hook point, as written by whoever trained it."""


@dataclass(frozen=True, eq=False)
class SAE:
    """A frozen SAE with D inputs and F features. Tensors are cast to float32 and checked when it is made.

    Raises:
        InputError: if a tensor's shape does not fit, a weight is not finite, or `k` or `threshold_F` does not suit the
            architecture.
    """

    architecture: Architecture
    W_enc_DF: Tensor = field(repr=False)
    b_enc_F: Tensor = field(repr=False)
    W_dec_FD: Tensor = field(repr=False)
    b_dec_D: Tensor = field(repr=False)
    meta: SAEMeta
    threshold_F: Tensor | None = field(default=None, repr=False)
    """Activation thresholds (jumprelu only)."""
    k: int | None = None
    """Features kept a token (topk only)."""
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    """Pre-activations are multiplied by the decoder rows' norms before the choice of k (topk only)."""

    def __post_init__(self) -> None:
        for name, tensor in self.weights().items():
            object.__setattr__(self, name, tensor.detach().to(torch.float32).contiguous())
        _check(self)

    @property
    def d_model(self) -> int:
        """Width D of the residuals it reads."""
        return self.W_enc_DF.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features F."""
        return self.W_enc_DF.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_enc_DF.device

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over architecture, k, flags, and names, shapes and little-endian float32 bytes of all weights."""
        head = f"{self.architecture} {self.k} {self.apply_b_dec_to_input} {self.rescale_acts_by_decoder_norm}"
        chunks = [head.encode()]
        for name, tensor in self.weights().items():
            chunks += [f" {name} {tuple(tensor.shape)} ".encode(), tensor.cpu().numpy().astype("<f4").tobytes()]
        return sha256_bytes(*chunks)

    def weights(self) -> dict[str, Tensor]:
        """All weight tensors by field name, in a fixed order."""
        tensors = {
            "W_enc_DF": self.W_enc_DF,
            "b_enc_F": self.b_enc_F,
            "W_dec_FD": self.W_dec_FD,
            "b_dec_D": self.b_dec_D,
        }
        return tensors if self.threshold_F is None else {**tensors, "threshold_F": self.threshold_F}

    def to(self, device: str | torch.device) -> SAE:
        """The same SAE with its weights on another device."""
        return replace(
            self,
            W_enc_DF=self.W_enc_DF.to(device),
            b_enc_F=self.b_enc_F.to(device),
            W_dec_FD=self.W_dec_FD.to(device),
            b_dec_D=self.b_dec_D.to(device),
            threshold_F=None if self.threshold_F is None else self.threshold_F.to(device),
        )

    def encode(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch f"]:
        """Activations of all features, in the SAE's own units: [..., D] of any float type -> [..., F] float32.

        Raises:
            InputError: if the residuals have another width or hold NaN or infinity.
        """
        with _float32(self.device):
            acts_NF = self._collect(self._rows(h), None)
        return acts_NF.view(*h.shape[:-1], self.d_sae)

    def read(self, h: Float[Tensor, "*batch d"], feature_ids: Sequence[int]) -> Float[Tensor, "*batch k"]:
        """Activations of K chosen features: equal to ``encode(h)[..., feature_ids]``, without ever holding [N, F].

        ReLU and JumpReLU compute the chosen columns only (equal up to float32 rounding); TopK, whose choice of k
        depends on every feature, computes the same blocks of tokens as `encode` and is bit-equal to it. Ids may repeat.

        Raises:
            InputError: as `encode`, and if an id is not one of the SAE's features.
        """
        ids = self._feature_index(feature_ids)
        with _float32(self.device):
            acts_NK = self._collect(self._rows(h), ids)
        return acts_NK.view(*h.shape[:-1], len(ids))

    def decode(self, acts: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch d"]:
        """Residuals rebuilt from activations: [..., F] -> [..., D] float32.

        Raises:
            InputError: if the last axis is not F wide.
        """
        if acts.shape[-1] != self.d_sae:
            raise InputError(f"acts: the SAE has {self.d_sae} features but the activations have {acts.shape[-1]}")
        with _float32(self.device):
            acts = acts.to(self.device, torch.float32)
            if self.rescale_acts_by_decoder_norm:
                # A dead decoder row (norm 0) has activation 0: keep 0 / 0 from spoiling the token.
                acts = acts / self._decoder_norm_F.clamp_min(1e-8)
            return acts @ self.W_dec_FD + self.b_dec_D

    def fvu(self, h: Float[Tensor, "*batch d"]) -> float:
        """Fraction of variance unexplained on these tokens: squared error of the reconstruction over squared distance
        from the mean residual, both summed over tokens and widths (1 - explained variance).

        Raises:
            InputError: as `encode`, and if the tokens do not differ from each other.
        """
        with _float32(self.device):
            rows_ND = self._rows(h)
            if not len(rows_ND) or bool((rows_ND == rows_ND[0]).all()):
                raise InputError(f"h: variance needs at least two different tokens; these {len(rows_ND)} do not differ")
            total = _square_sum(rows_ND - rows_ND.mean(0))
            error = sum(_square_sum(rows - self.decode(self._encode_block(rows))) for rows in self._blocks(rows_ND))
            return error / total

    @cached_property
    def _decoder_norm_F(self) -> Tensor:
        return self.W_dec_FD.norm(dim=-1)

    def _rows(self, h: Tensor) -> Tensor:
        if h.shape[-1] != self.d_model:
            raise InputError(f"sae: the SAE reads width {self.d_model} but the residuals have width {h.shape[-1]}")
        rows_ND = h.to(self.device, torch.float32).reshape(-1, self.d_model)
        bad = int((~rows_ND.isfinite()).any(-1).sum())
        if bad:
            raise InputError(f"h: {bad} of {len(rows_ND)} residuals hold NaN or infinity; all must be finite")
        return rows_ND

    def _feature_index(self, feature_ids: Sequence[int]) -> Tensor:
        wrong = [i for i in feature_ids if not 0 <= i < self.d_sae]
        if wrong:
            raise InputError(f"feature_ids: {wrong[0]} is not a feature of this SAE; ids go from 0 to {self.d_sae - 1}")
        return torch.tensor(list(feature_ids), dtype=torch.long, device=self.device)

    def _blocks(self, rows_ND: Tensor) -> Iterator[Tensor]:
        return iter(rows_ND.split(max(1, CHUNK_BYTES // (4 * self.d_sae))))

    def _collect(self, rows_ND: Tensor, ids: Tensor | None) -> Tensor:
        """Activations of all features, or of `ids`, written block by block into the result."""
        if ids is not None and self.architecture != "topk":
            return self._gate(self._pre(rows_ND, ids), ids)
        out = torch.empty(len(rows_ND), self.d_sae if ids is None else len(ids), device=self.device)
        start = 0
        for block_ND in self._blocks(rows_ND):
            acts_NF = self._encode_block(block_ND)
            out[start : start + len(block_ND)] = acts_NF if ids is None else acts_NF[:, ids]
            start += len(block_ND)
        return out

    def _encode_block(self, rows_ND: Tensor) -> Tensor:
        pre_NF = self._pre(rows_ND, slice(None))
        return self._gate(pre_NF, slice(None)) if self.k is None else keep_topk(pre_NF, self.k)

    def _pre(self, rows_ND: Tensor, ids: Tensor | slice) -> Tensor:
        centred_ND = rows_ND - self.b_dec_D if self.apply_b_dec_to_input else rows_ND
        pre_NK = centred_ND @ self.W_enc_DF[:, ids] + self.b_enc_F[ids]
        return pre_NK * self._decoder_norm_F[ids] if self.rescale_acts_by_decoder_norm else pre_NK

    def _gate(self, pre_NK: Tensor, ids: Tensor | slice) -> Tensor:
        acts_NK = pre_NK.relu()
        return acts_NK if self.threshold_F is None else acts_NK * (pre_NK > self.threshold_F[ids])


def keep_topk(pre_NF: Float[Tensor, "n f"], k: int) -> Float[Tensor, "n f"]:
    """ReLU of each row's k largest values, else zero; among equal values at the k-th place the lowest index wins."""
    acts_NF = pre_NF.relu()
    if k >= acts_NF.shape[1] or not len(acts_NF):
        return acts_NF
    kth_N1 = acts_NF.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    acts_NF *= acts_NF >= kth_N1
    # More than k left over means a tie at the k-th value: rare, so only those rows pay for the rule.
    tied = (acts_NF.count_nonzero(-1) > k).nonzero().squeeze(-1)
    if len(tied):
        rows, kth = acts_NF[tied], kth_N1[tied]
        at_kth = rows == kth
        room_N1 = k - (rows > kth).sum(-1, keepdim=True)
        acts_NF[tied] = rows.masked_fill(at_kth & (at_kth.cumsum(-1) > room_N1), 0)
    return acts_NF


def _square_sum(x: Tensor) -> float:
    return x.double().pow(2).sum().item()


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """No gradient, and no autocast: a trainer's bfloat16 context must not change what the gate measured."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _check(sae: SAE) -> None:
    if sae.architecture not in get_args(Architecture):
        raise InputError(f"architecture: {sae.architecture!r} is not one of {', '.join(get_args(Architecture))}")
    if sae.W_enc_DF.ndim != 2 or 0 in sae.W_enc_DF.shape:
        raise InputError(f"W_enc_DF: shape {tuple(sae.W_enc_DF.shape)} is not [d_model, d_sae] with both at least 1")
    d, f = sae.W_enc_DF.shape
    wanted = {"W_enc_DF": (d, f), "b_enc_F": (f,), "W_dec_FD": (f, d), "b_dec_D": (d,), "threshold_F": (f,)}
    for name, tensor in sae.weights().items():
        if tuple(tensor.shape) != wanted[name]:
            raise InputError(f"{name}: shape {tuple(tensor.shape)} is not {wanted[name]}, as an SAE of {d} x {f} needs")
        if not tensor.isfinite().all():
            raise InputError(f"{name}: the SAE's weights hold NaN or infinity; all must be finite")
    if sae.architecture == "topk" and not (sae.k is not None and 1 <= sae.k <= f):
        raise InputError(f"k: {sae.k} is not between 1 and the SAE's {f} features")
    if sae.architecture != "topk" and (sae.k is not None or sae.rescale_acts_by_decoder_norm):
        raise InputError(f"architecture: k and rescale_acts_by_decoder_norm are for topk, not for {sae.architecture}")
    if (sae.threshold_F is not None) != (sae.architecture == "jumprelu"):
        raise InputError(f"threshold_F: needed by jumprelu and only by it; the architecture is {sae.architecture}")
