"""A frozen sparse autoencoder that is only read: TopK, ReLU, JumpReLU or Gated, in float32, without gradient.

Weights are in SAE Lens' orientation and so is the arithmetic (checked against sae-lens 6.54 in the tests)::

    x    = norm(h) - b_dec * apply_b_dec_to_input                  norm: see `InputNorm`
    pre  = x @ W_enc + b_enc                                       [times ||W_dec_f|| if rescale_acts_by_decoder_norm]
    acts = ReLU(pre)                                               relu      (Bricken et al. 2023)
           ReLU(pre) where pre > threshold, else 0                 jumprelu  (Rajamanoharan et al. 2024; strict >)
           ReLU(pre) for the k largest of a token, else 0          topk      (Gao et al. 2024)
           ReLU(x @ W_enc * exp(r_mag) + b_enc)                    gated     (Rajamanoharan et al. 2024)
             where x @ W_enc + b_gate > 0, else 0
    h'   = norm back of (acts @ W_dec + b_dec)                     [acts divided by ||W_dec_f|| first if rescaled]

One rule decides what is active, whatever the shape of the call: see `arithmetic`. So `read` has the support of `encode`
exactly. Under `torch.autocast` the arithmetic stays float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.files import sha256_bytes
from mechreward.sae.arithmetic import Encoder
from mechreward.sae.few import FewReader
from mechreward.sae.kinds import Architecture, InputNorm, check_fields, checked_ids, norm_statistics
from mechreward.sae.precision import plain_float32
from mechreward.sae.reading import block_tokens, blocks, input_tokens, read_topk

if TYPE_CHECKING:
    from mechreward.sae.check import SAECheck

_SMALLEST = torch.finfo(torch.float32).tiny


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
        InputError: if a tensor's shape does not fit, a weight is not finite, or a field does not suit the architecture.
    """

    architecture: Architecture
    W_enc_DF: Tensor = field(repr=False)
    b_enc_F: Tensor = field(repr=False)
    """Encoder bias; of a gated SAE that of the magnitudes."""
    W_dec_FD: Tensor = field(repr=False)
    b_dec_D: Tensor = field(repr=False)
    meta: SAEMeta
    threshold_F: Tensor | None = field(default=None, repr=False)
    """Activation thresholds (jumprelu only)."""
    b_gate_F: Tensor | None = field(default=None, repr=False)
    """Bias of the gates (gated only)."""
    r_mag_F: Tensor | None = field(default=None, repr=False)
    """Logarithm of a magnitude's weights over its gate's (gated only)."""
    k: int | None = None
    """Features kept a token (topk only)."""
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    """Pre-activations are multiplied by the decoder rows' norms before the choice of k (topk only)."""
    input_norm: InputNorm = "none"
    frequency_F: Tensor | None = field(default=None, repr=False)
    """Share of tokens on which each feature fires, if measured (`calibrated`): it speeds `read` up, and changes no
    value, so it is in no hash."""

    def __post_init__(self) -> None:
        for name, given in self.tensors().items():
            tensor = given.detach().to(torch.float32)
            # The encoder is stored feature by feature, so that picking features copies whole rows of memory.
            turned = name == "W_enc_DF"
            stored = tensor.transpose(0, -1).contiguous().transpose(0, -1) if turned else tensor.contiguous()
            object.__setattr__(self, name, stored)
        check_fields(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made from the weights: pickled beside them, the encoder would be a second copy of them."""
        return {name: part for name, part in vars(self).items() if name not in ("_encoder", "_order_F")}

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

    @property
    def release(self) -> str:
        return self.meta.release

    @property
    def sae_id(self) -> str:
        return self.meta.sae_id

    @property
    def layer(self) -> int:
        return self.meta.layer

    @property
    def model_name(self) -> str:
        return self.meta.model_name

    @property
    def hook_name(self) -> str:
        return self.meta.hook_name

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over architecture, k, flags, and names, shapes and little-endian float32 bytes of all weights."""
        head = f"{self.architecture} {self.k} {self.apply_b_dec_to_input} {self.rescale_acts_by_decoder_norm}"
        if self.input_norm != "none":
            head += f" {self.input_norm}"
        chunks = [head.encode()]
        for name, tensor in self.weights().items():
            values = tensor.cpu().contiguous().numpy().astype("<f4")
            chunks += [f" {name} {tuple(tensor.shape)} ".encode(), values.tobytes()]
        return sha256_bytes(*chunks)

    def weights(self) -> dict[str, Tensor]:
        """The tensors that decide its values, by field name, in a fixed order."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "frequency_F"}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors it has, by field name, in a fixed order."""
        named = {
            "W_enc_DF": self.W_enc_DF,
            "b_enc_F": self.b_enc_F,
            "W_dec_FD": self.W_dec_FD,
            "b_dec_D": self.b_dec_D,
            "threshold_F": self.threshold_F,
            "b_gate_F": self.b_gate_F,
            "r_mag_F": self.r_mag_F,
            "frequency_F": self.frequency_F,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: str | torch.device) -> SAE:
        """The same SAE with its tensors on another device; itself if they are there."""
        if torch.device(device) == self.device:
            return self
        moved: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def calibrated(self, h: Float[Tensor, "*batch d"]) -> SAE:
        """The same SAE with `frequency_F` counted on these residuals.

        Raises:
            InputError: as `encode`, and if there is no token.
        """
        rows_ND = self._rows(h)
        if not len(rows_ND):
            raise InputError("h: firing frequencies need at least one token")
        with plain_float32(self.device):
            fired_F = torch.stack([(self.encode(rows) > 0).sum(0) for rows in self._blocks(rows_ND)]).sum(0)
        return replace(self, frequency_F=fired_F / len(rows_ND))

    def encode(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch f"]:
        """Activations of all features, in the SAE's own units: [..., D] of any float type -> [..., F] float32.

        Raises:
            InputError: if the residuals have another width or hold NaN or infinity.
        """
        rows_ND = self._rows(h)
        acts_NF = torch.empty(len(rows_ND), self.d_sae, device=self.device)
        with plain_float32(self.device):
            for block_ND, out_NF in zip(self._blocks(rows_ND), self._blocks(acts_NF), strict=True):
                out_NF.copy_(self._encoder.activations(self._inputs(block_ND)))
        return acts_NF.view(*h.shape[:-1], self.d_sae)

    def read(self, h: Float[Tensor, "*batch d"], feature_ids: Sequence[int]) -> Float[Tensor, "*batch k"]:
        """Activations of K chosen features: those of ``encode(h)[..., feature_ids]``, without ever holding [N, F].

        The features that are active are exactly the same; their values are equal up to float32 rounding. ReLU, JumpReLU
        and Gated compute the chosen columns only. In TopK every feature has a say; `reading` tells how most of the work
        is saved, the more if the SAE is `calibrated`. Ids may repeat.

        Raises:
            InputError: as `encode`, and if an id is not one of the SAE's features.
        """
        ids_K = self._feature_index(feature_ids)
        rows_ND = self._rows(h)
        acts_NK = torch.empty(len(rows_ND), len(ids_K), device=self.device)
        if len(ids_K):
            with plain_float32(self.device):
                chosen_U, place_K = ids_K.unique(return_inverse=True)
                self._read(rows_ND, chosen_U, place_K, acts_NK)
        return acts_NK.view(*h.shape[:-1], len(ids_K))

    def reader(self, feature_ids: Sequence[int]) -> FewReader:
        """`read` of these features for many calls on a few tokens [N, D] each, as while steering.

        Raises:
            InputError: if an id is not one of the SAE's features.
        """
        ids_K = self._feature_index(feature_ids)
        return FewReader(partial(self.read, feature_ids=ids_K.tolist()), self._inputs, self._encoder, ids_K)

    def decode(self, acts: Float[Tensor, "*batch f"], h: Tensor | None = None) -> Float[Tensor, "*batch d"]:
        """Residuals rebuilt from activations: [..., F] -> [..., D] float32.

        Args:
            acts: activations of all features.
            h: the residuals [..., D] they were encoded from; needed where `input_norm` has to be undone.

        Raises:
            InputError: if the last axis is not F wide, or `h` is needed and missing.
        """
        if acts.shape[-1] != self.d_sae:
            raise InputError(f"acts: the SAE has {self.d_sae} features but the activations have {acts.shape[-1]}")
        if self.input_norm != "none" and h is None:
            raise InputError(
                f"h: undoing {self.input_norm} needs the residuals that were encoded; pass decode(acts, h)"
            )
        with plain_float32(self.device):
            acts = acts.to(self.device, torch.float32)
            if self._encoder.scale_F is not None:
                # A dead decoder row (norm 0) has activation 0: keep 0 / 0 from spoiling the token.
                acts = acts / self._encoder.scale_F.clamp_min(1e-8)
            rebuilt = acts @ self.W_dec_FD + self.b_dec_D
            if h is None or self.input_norm == "none":
                return rebuilt
            shift, scale = norm_statistics(h.to(self.device, torch.float32), self.input_norm)
            return rebuilt * scale + shift

    def decoder_rows(self, feature_ids: Sequence[int]) -> Float[Tensor, "k d"]:
        """What one unit of each feature adds to a reconstruction, in units of `residual_unit`.

        Raises:
            InputError: if an id is not one of the SAE's features.
        """
        ids_K = self._feature_index(feature_ids)
        rows_KD, scale_F = self.W_dec_FD[ids_K], self._encoder.scale_F
        return rows_KD if scale_F is None else rows_KD / scale_F[ids_K, None].clamp_min(1e-8)

    def residual_unit(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """Size of what the decoder works in at each residual: 1, or the factor by which `input_norm` is undone."""
        h = h.detach().to(self.device, torch.float32)
        return torch.ones_like(h[..., :1]) if self.input_norm == "none" else norm_statistics(h, self.input_norm)[1]

    def fvu(self, h: Float[Tensor, "*batch d"]) -> float:
        """Fraction of variance unexplained on these tokens: squared error of the reconstruction over squared distance
        from the mean residual, both summed over tokens and widths (1 - explained variance).

        Raises:
            InputError: as `encode`, and if the tokens do not differ from each other.
        """
        rows_ND = self._rows(h)
        if not len(rows_ND) or bool((rows_ND == rows_ND[0]).all()):
            raise InputError(f"h: variance needs at least two different tokens; these {len(rows_ND)} do not differ")
        with plain_float32(self.device):
            total = _square_sum(rows_ND - rows_ND.mean(0))
            rebuilt = ((rows, self.decode(self.encode(rows), rows)) for rows in self._blocks(rows_ND))
            return sum(_square_sum(rows - back) for rows, back in rebuilt) / total

    def check(self, h: Tensor | Mapping[int, Tensor]) -> SAECheck:
        """How well the SAE fits these residuals, and which mistake is likely if it does not: see `check.check_sae`."""
        from mechreward.sae.check import check_sae

        return check_sae(self, h)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(
            W_FD=self.W_enc_DF.T,
            bias_F=self.b_enc_F,
            scale_F=self.W_dec_FD.norm(dim=-1) if self.rescale_acts_by_decoder_norm else None,
            threshold_F=self.threshold_F,
            gate_bias_F=self.b_gate_F,
            magnitude_F=None if self.r_mag_F is None else self.r_mag_F.exp(),
            k=self.k,
        )

    @cached_property
    def _order_F(self) -> Tensor | None:
        return None if self.frequency_F is None else self.frequency_F.argsort(descending=True, stable=True)

    def _read(self, rows_ND: Tensor, chosen_U: Tensor, place_K: Tensor, acts_NK: Tensor) -> None:
        tokens = input_tokens(self.d_model, self.device)
        for block_ND, out_NK in zip(blocks(rows_ND, tokens), blocks(acts_NK, tokens), strict=True):
            x_ND = self._inputs(block_ND)
            if self.k is None:
                acts_NU = self._encoder.activations(x_ND, chosen_U)
            else:
                acts_NU = read_topk(self._encoder, x_ND, chosen_U, self._order_F, self._block_tokens)
            out_NK.copy_(acts_NU[:, place_K])

    def _rows(self, h: Tensor) -> Tensor:
        if h.shape[-1] != self.d_model:
            raise InputError(f"sae: the SAE reads width {self.d_model} but the residuals have width {h.shape[-1]}")
        rows_ND = h.detach().to(self.device, torch.float32).reshape(-1, self.d_model)
        # One number that is not finite makes a row's sum so: one cheap pass, and a count only where it is needed.
        if not rows_ND.sum(-1).isfinite().all() and (bad := int((~rows_ND.isfinite()).any(-1).sum())):
            raise InputError(f"h: {bad} of {len(rows_ND)} residuals hold NaN or infinity; all must be finite")
        return rows_ND

    def _inputs(self, rows_ND: Tensor) -> Tensor:
        """What the encoder's weights are applied to."""
        if self.input_norm != "none":
            shift_N1, scale_N1 = norm_statistics(rows_ND, self.input_norm)
            # A residual of zeros has no norm to be brought to: it stays zeros, and its reconstruction is zeros too.
            divisor_N1 = scale_N1 + 1e-5 if self.input_norm == "layer_norm" else scale_N1.clamp_min(_SMALLEST)
            rows_ND = (rows_ND - shift_N1) / divisor_N1
        return rows_ND - self.b_dec_D if self.apply_b_dec_to_input else rows_ND

    def _feature_index(self, feature_ids: Iterable[Any]) -> Tensor:
        return torch.tensor(checked_ids(feature_ids, self.d_sae), dtype=torch.long, device=self.device)

    @property
    def _block_tokens(self) -> int:
        return block_tokens(self.d_sae, self.device)

    def _blocks(self, rows: Tensor) -> Iterator[Tensor]:
        return blocks(rows, self._block_tokens)


def _square_sum(x: Tensor) -> float:
    return x.double().pow(2).sum().item()
