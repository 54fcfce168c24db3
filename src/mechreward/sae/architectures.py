"""The four SAEs that can be trained: sae-lens' training class of each, and the frozen reader that comes out.

`k` means the same in all: active features a token.

- topk: the k largest of each token (Gao et al. 2024), with an auxiliary loss for dead features.
- batchtopk: the k times B largest of a batch (Bussmann et al. 2024); read as JumpReLU with one threshold.
- matryoshka: BatchTopK whose first F/32, 3F/32, ... features have to rebuild the input alone as well (Bussmann et al.
  2025), so that frequent, general features come first; read the same way.
- jumprelu: a learnt threshold a feature (Rajamanoharan et al. 2024), with the quadratic penalty around L0 = k of Gemma
  Scope 2 in place of the paper's linear one, so that no coefficient has to be tuned to reach a wanted L0, and with the
  gradient of threshold and penalty passed to the encoder too, over a wide band (Anthropic's circuits update of January
  2025).

Deviations from sae-lens' defaults. BatchTopK's threshold is a running mean from 0 with rate .01, which a run of a few
hundred steps leaves far too low, so the rate is at least 10 over the steps. A JumpReLU's thresholds start where each
feature fires on a share k/F of the held-out tokens: from one small value for all, a short run ends with L0 still at
hundreds. Its decoder rows end with norm 1 (folded into encoder and thresholds, which changes no output), as the
others' do: activations are in residual units.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.recipe import Trainable
from mechreward.sae.io import sae_from_parts
from mechreward.sae.sae import SAE, SAEMeta

NESTED = (1, 3, 7, 15)
"""Widths of the inner Matryoshka levels, in 32nds of F, as in the paper's 65k dictionary."""

THRESHOLD_TOKENS = 2048
"""Held-out tokens that set the first thresholds of a JumpReLU."""


@dataclass(frozen=True, kw_only=True)
class SAEShape:
    """What is to be trained."""

    d_model: int
    d_sae: int
    k: int
    architecture: Trainable = "topk"
    widths: tuple[int, ...] = ()
    """Features of the inner Matryoshka levels; empty for the paper's."""
    l0_coefficient: float = 1.0
    """Weight of a JumpReLU's penalty on L0."""
    bandwidth: float = 2.0
    """Width around a JumpReLU's threshold within which it is learnt, in units of the scaled input."""


def check_shape(shape: SAEShape) -> None:
    """Raises:
    InputError: for a size below 1, a k beyond F, an unknown architecture, or widths that do not grow towards F.
    """
    for name, value in {"d_model": shape.d_model, "d_sae": shape.d_sae}.items():
        if value < 1:
            raise InputError(f"{name}: {value} is not at least 1")
    if not 1 <= shape.k <= shape.d_sae:
        raise InputError(f"k: {shape.k} is not between 1 and the SAE's {shape.d_sae} features")
    if shape.architecture not in get_args(Trainable):
        allowed = ", ".join(get_args(Trainable))
        raise InputError(f"architecture: {shape.architecture!r} cannot be trained; allowed are {allowed}")
    if shape.widths and shape.architecture != "matryoshka":
        raise InputError(f"widths: {list(shape.widths)} are for matryoshka, not for {shape.architecture}")
    levels = [0, *shape.widths, shape.d_sae]
    if sorted(set(levels)) != levels:
        raise InputError(f"widths: {list(shape.widths)} do not grow from 1 to less than the SAE's {shape.d_sae}")
    if shape.l0_coefficient <= 0 or shape.bandwidth <= 0:
        raise InputError(f"l0_coefficient, bandwidth: {shape.l0_coefficient}, {shape.bandwidth} must both be above 0")


def new_sae(lens: ModuleType, shape: SAEShape, n_steps: int, device: str) -> Any:
    """A `sae_lens.TrainingSAE` with initial weights drawn from torch's global generator."""
    common: dict[str, Any] = {
        "d_in": shape.d_model,
        "d_sae": shape.d_sae,
        "device": device,
        "normalize_activations": "expected_average_only_in",
    }
    threshold_lr = min(1.0, max(0.01, 10 / n_steps))
    if shape.architecture == "topk":
        return lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(k=shape.k, **common))
    if shape.architecture == "batchtopk":
        config = lens.BatchTopKTrainingSAEConfig(k=shape.k, topk_threshold_lr=threshold_lr, **common)
        return lens.BatchTopKTrainingSAE(config)
    if shape.architecture == "matryoshka":
        widths = nested_widths(shape)
        config = lens.MatryoshkaBatchTopKTrainingSAEConfig(
            k=shape.k, topk_threshold_lr=threshold_lr, matryoshka_widths=widths, **common
        )
        return lens.MatryoshkaBatchTopKTrainingSAE(config)
    config = lens.JumpReLUTrainingSAEConfig(
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=shape.k,
        l0_coefficient=shape.l0_coefficient,
        jumprelu_bandwidth=shape.bandwidth,
        jumprelu_ste_to_input=True,
        **common,
    )
    return lens.JumpReLUTrainingSAE(config)


def start_at(lens_sae: Any, sample_ND: Tensor, scale: float) -> None:
    """Puts the decoder bias at the mean of the scaled inputs, and a JumpReLU's thresholds where each feature fires on
    a share k/F of them."""
    lens_sae.b_dec.data.copy_(sample_ND.mean(0) * scale)
    if lens_sae.cfg.architecture() != "jumprelu":
        return
    with torch.no_grad():
        centred_ND = sample_ND[:THRESHOLD_TOKENS].to(lens_sae.device) * scale - lens_sae.b_dec
        pre_NF = centred_ND @ lens_sae.W_enc + lens_sae.b_enc
        firing = max(1, round(len(pre_NF) * lens_sae.cfg.target_l0 / lens_sae.cfg.d_sae))
        lens_sae.threshold.copy_(pre_NF.topk(firing, dim=0).values[-1].clamp_min(0))


def nested_widths(shape: SAEShape) -> list[int]:
    """Features of each Matryoshka level, the last of which is F."""
    inner: Sequence[int] = shape.widths or [n * shape.d_sae // 32 for n in NESTED]
    return [*sorted({width for width in inner if width}), shape.d_sae]


def frozen(lens_sae: Any, meta: SAEMeta, scale: float) -> SAE:
    """The inference form that sae-lens would save, for inputs that are not scaled; `lens_sae` itself is not touched."""
    lens_sae = deepcopy(lens_sae)
    lens_sae.fold_activation_norm_scaling_factor(scale)
    if lens_sae.cfg.architecture() == "jumprelu":
        lens_sae.fold_W_dec_norm()
    state = {name: tensor.detach().clone() for name, tensor in lens_sae.state_dict().items()}
    lens_sae.process_state_dict_for_saving_inference(state)
    # The rows have norm 1 now: scaling by them again would only cost time and rounding.
    cfg = {**lens_sae.cfg.get_inference_sae_cfg_dict(), "metadata": asdict(meta), "rescale_acts_by_decoder_norm": False}
    return sae_from_parts(cfg, state, release=meta.release, sae_id=meta.sae_id)
