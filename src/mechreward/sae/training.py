"""Trains an SAE on a stream of residuals with SAE Lens' trainer; what comes out is our own frozen reader.

TopK after Gao et al. 2024 (k features a token; auxiliary loss for dead features) or BatchTopK after Bussmann et al.
2024 (k on average; it becomes a JumpReLU SAE, whose chosen features cost almost nothing to read). The steps, losses and
schedules are sae-lens'. Around them, unlike its own `fit`: no progress bar and no wandb; the decoder bias starts at the
mean residual; inputs are scaled to a mean distance of sqrt(D) from it (both statistics of the held-out tokens), and the
scale is folded into the weights at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae.io import layer_of_hook, require_sae_lens, sae_from_parts
from mechreward.sae.sae import SAE, SAEMeta

# A feature counts as dead for the auxiliary loss after this share of the training steps without firing.
DEAD_WINDOW = 0.05


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE with what it does on tokens it was not trained on."""

    sae: SAE
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of active features a token."""
    dead_share: float
    """Share of features that never fire on the held-out tokens."""
    n_held_out: int
    """Held-out tokens the three numbers rest on."""


def train_sae(
    activations: Iterable[Tensor],
    *,
    d_model: int,
    d_sae: int,
    k: int,
    n_tokens: int,
    meta: SAEMeta,
    architecture: Literal["topk", "batchtopk"] = "topk",
    lr: float | None = None,
    batch_size: int = 4096,
    held_out: Float[Tensor, "n d"] | None = None,
    n_held_out: int = 16384,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> TrainedSAE:
    """Trains an SAE on `n_tokens` residuals and measures it on held-out ones. Same seed and input, same weights.

    Args:
        activations: shuffled batches [any, D] of at least `n_tokens` tokens (plus `n_held_out`); see
            `activation_batches`.
        d_model: D.
        d_sae: F, number of features.
        k: features active a token (on average for "batchtopk").
        n_tokens: tokens to train on, at least one batch; a remainder smaller than a batch is not used.
        meta: recorded with the SAE.
        architecture: "topk", or "batchtopk" which gives a JumpReLU SAE.
        lr: peak learning rate of Adam; by default 2e-4 * sqrt(2**14 / F) (the scaling of Gao et al. 2024). The last
            fifth of the steps decays it to zero.
        batch_size: tokens a step.
        held_out: tokens to measure on. Without it the first `n_held_out` of the stream are set aside; if the stream
            repeats its rows, they come again in training, so give your own.
        seed: of the initial weights.
        on_step: called after each step with tokens seen and the loss.

    Raises:
        InputError: for a wrong option, a stream of another width, NaN, or one that ends too early.
    """
    _check_options(d_model, d_sae, k, n_tokens, batch_size, architecture, meta)
    stream = _rebatched(activations, batch_size, d_model)
    if held_out is None:
        held_out = _set_aside(stream, n_held_out)
    if held_out.ndim != 2 or held_out.shape[1] != d_model or bool((held_out == held_out[:1]).all()):
        raise InputError(f"held_out: needs tokens [n, {d_model}] that differ; these {tuple(held_out.shape)} do not fit")
    lens = require_sae_lens()
    # sae-lens draws the initial weights from torch's global generator: leave the caller's as it was.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        lens_sae = _new_sae(lens, architecture, d_model, d_sae, k, device)
        config = _schedule(n_tokens // batch_size, batch_size, lr or 2e-4 * (2**14 / d_sae) ** 0.5, device)
        _fit(lens.SAETrainer(config, lens_sae, data_provider=stream), held_out.float(), on_step)
    return _measured(_finished(lens_sae, meta), held_out)


def _check_options(
    d_model: int, d_sae: int, k: int, n_tokens: int, batch_size: int, architecture: str, meta: SAEMeta
) -> None:
    for name, value in {"d_model": d_model, "d_sae": d_sae, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name}: {value} is not at least 1")
    if not 1 <= k <= d_sae:
        raise InputError(f"k: {k} is not between 1 and the SAE's {d_sae} features")
    if n_tokens < batch_size:
        raise InputError(f"n_tokens: {n_tokens} is less than one batch of {batch_size}")
    if architecture not in ("topk", "batchtopk"):
        raise InputError(f"architecture: {architecture!r} cannot be trained; allowed are topk, batchtopk")
    if meta.layer != layer_of_hook(meta.hook_name):
        raise InputError(f"meta.layer: {meta.layer} does not agree with hook_name {meta.hook_name!r}")


def _rebatched(activations: Iterable[Tensor], batch_size: int, d_model: int) -> Iterator[Tensor]:
    """Batches of exactly `batch_size` tokens, float32, checked; a shorter remainder is dropped."""
    held: list[Tensor] = []
    size = 0
    for chunk_ND in activations:
        if chunk_ND.ndim != 2 or chunk_ND.shape[1] != d_model:
            raise InputError(f"activations: a batch of shape {tuple(chunk_ND.shape)} is not [any, {d_model}]")
        if not chunk_ND.isfinite().all():
            raise InputError("activations: a residual holds NaN or infinity; all must be finite")
        held.append(chunk_ND.detach().float())
        size += len(chunk_ND)
        if size >= batch_size:
            *full, rest = torch.cat(held).tensor_split(list(range(batch_size, size + 1, batch_size)))
            yield from full
            held, size = [rest], len(rest)


def _set_aside(stream: Iterator[Tensor], n_held_out: int) -> Tensor:
    if n_held_out < 2:
        raise InputError(f"n_held_out: {n_held_out} is not at least 2")
    taken: list[Tensor] = []
    while sum(map(len, taken)) < n_held_out:
        batch_ND = next(stream, None)
        if batch_ND is None:
            raise InputError(f"activations: the stream ended before {n_held_out} held-out tokens were read")
        taken.append(batch_ND)
    return torch.cat(taken)[:n_held_out]


def _new_sae(lens: ModuleType, architecture: str, d_model: int, d_sae: int, k: int, device: str) -> Any:
    kinds = {
        "topk": (lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig),
        "batchtopk": (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig),
    }
    make, configure = kinds[architecture]
    return make(
        configure(d_in=d_model, d_sae=d_sae, k=k, normalize_activations="expected_average_only_in", device=device)
    )


def _schedule(n_steps: int, batch_size: int, lr: float, device: str) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=n_steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=min(n_steps // 20, 1000),
        lr_decay_steps=n_steps // 5,
        dead_feature_window=max(10, int(DEAD_WINDOW * n_steps)),
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )


def _fit(trainer: Any, sample_ND: Tensor, on_step: Callable[[int, float], None] | None) -> None:
    """`SAETrainer.fit` without its progress bar and wandb histograms, over its public `step`."""
    mean_D = sample_ND.mean(0)
    # Distance from the mean, not raw norm as in sae-lens: an offset shared by all tokens must not shrink the signal.
    scale = sample_ND.shape[1] ** 0.5 / (sample_ND - mean_D).norm(dim=-1).mean().item()
    trainer.activation_scaler.scaling_factor = scale
    trainer.sae.b_dec.data.copy_(mean_D * scale)
    for done in range(trainer.cfg.total_training_steps):
        batch_ND = next(trainer.data_provider, None)
        if batch_ND is None:
            raise InputError(
                f"activations: the stream ended after {done} of {trainer.cfg.total_training_steps} training batches"
            )
        output = trainer.step(batch_ND)
        trainer.n_training_steps += 1
        if on_step is not None:
            on_step(trainer.n_training_samples, output.loss.item())
    trainer.sae.fold_activation_norm_scaling_factor(scale)


def _finished(lens_sae: Any, meta: SAEMeta) -> SAE:
    """The inference form that sae-lens would save (decoder rows of norm 1), as our reader."""
    state = {name: tensor.detach().clone() for name, tensor in lens_sae.state_dict().items()}
    lens_sae.process_state_dict_for_saving_inference(state)
    # The rows have norm 1 now: scaling by them again would only cost time and rounding.
    cfg = {**lens_sae.cfg.get_inference_sae_cfg_dict(), "metadata": asdict(meta), "rescale_acts_by_decoder_norm": False}
    return sae_from_parts(cfg, state, release=meta.release, sae_id=meta.sae_id)


def _measured(sae: SAE, held_out_ND: Tensor) -> TrainedSAE:
    fired_F = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)
    for block_ND in held_out_ND.split(1024):
        fired_F += (sae.encode(block_ND) > 0).sum(0)
    return TrainedSAE(
        sae=sae,
        fvu=sae.fvu(held_out_ND),
        l0=fired_F.sum().item() / len(held_out_ND),
        dead_share=(fired_F == 0).float().mean().item(),
        n_held_out=len(held_out_ND),
    )
