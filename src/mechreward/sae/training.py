"""Trains an SAE on a stream of residuals with SAE Lens' trainer; what comes out is our own frozen reader.

What can be trained is in `architectures.py`. The steps, losses and schedules are sae-lens'. Around them, unlike its own
`fit`: no progress bar and no wandb; the decoder bias starts at the mean residual; inputs are scaled to a mean distance
of sqrt(D) from it (both statistics of the held-out tokens), and the scale is folded into the weights at the end; what
is reported on the way is measured on held-out tokens and on the SAE as it would be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.models import find_device
from mechreward.sae.activations import ActivationStream, first_tokens
from mechreward.sae.architectures import SAEShape, check_shape, frozen, new_sae, start_at
from mechreward.sae.checkpoint import Checkpoint
from mechreward.sae.formats import layer_of_hook
from mechreward.sae.io import require_sae_lens
from mechreward.sae.sae import SAE, SAEMeta

# A feature counts as dead for the auxiliary loss after this share of the training steps without firing.
DEAD_WINDOW = 0.05
EVAL_TOKENS = 4096
"""Held-out tokens that a measurement on the way uses; the last one uses all."""


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE with what it does on tokens it was not trained on."""

    sae: SAE
    """With `frequency_F` counted on the held-out tokens."""
    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of active features a token."""
    dead_share: float
    """Share of features that never fire on the held-out tokens."""
    n_held_out: int
    """Held-out tokens the three numbers rest on."""


@dataclass(frozen=True)
class TrainingPoint:
    """A line of the training's metrics; the last three as in `TrainedSAE`."""

    step: int
    tokens: int
    loss: float
    """sae-lens' loss of this step, in units of the scaled input."""
    fvu: float
    l0: float
    dead_share: float


@dataclass(frozen=True)
class Watch:
    """Who is told what while an SAE is trained."""

    on_step: Callable[[int, float], None] = lambda tokens, loss: None  # noqa: ARG005
    """Called after each step with tokens seen and the loss."""
    on_point: Callable[[TrainingPoint], None] = lambda point: None  # noqa: ARG005
    """Called after every `every` steps, and after the last."""
    every: int | None = None


def train_sae(
    activations: Iterable[Tensor],
    shape: SAEShape,
    *,
    n_tokens: int,
    meta: SAEMeta,
    lr: float | None = None,
    batch_size: int = 4096,
    held_out: Float[Tensor, "n d"] | None = None,
    n_held_out: int = 16384,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainedSAE:
    """Trains an SAE on `n_tokens` residuals and measures it on held-out ones. Same seed and input, same weights.

    Args:
        activations: shuffled batches [any, D] of at least `n_tokens` tokens (plus `n_held_out`); see
            `activation_batches`.
        shape: architecture, D, F and k.
        n_tokens: tokens to train on, at least one batch; a remainder smaller than a batch is not used.
        meta: recorded with the SAE.
        lr: peak learning rate of Adam; by default 2e-4 * sqrt(2**14 / F) (the scaling of Gao et al. 2024). The last
            fifth of the steps decays it to zero.
        batch_size: tokens a step.
        held_out: tokens to measure on. Without it the first `n_held_out` of the stream are set aside; if the stream
            repeats its rows, they come again in training, so give your own.
        seed: of the initial weights.
        device: where it is trained; "auto" is CUDA where there is one (`find_device`).
        watch: who is told what on the way.
        checkpoint: where the training puts itself down, and from where it goes on if the file is there already. Wants
            a stream of `activation_batches` with the same batch size, and `held_out`.

    Raises:
        InputError: for a wrong option, a stream of another width, NaN, or one that ends too early.
    """
    check_shape(shape)
    _check_options(activations, n_tokens, batch_size, meta, held_out, checkpoint)
    watch, device = watch or Watch(), str(find_device(device))
    batches = _rebatched(activations, batch_size, shape.d_model)
    held_out_ND = _set_aside(batches, n_held_out) if held_out is None else held_out
    _check_held_out(held_out_ND, shape.d_model)
    lens = require_sae_lens()
    config = _schedule(n_tokens // batch_size, batch_size, lr or 2e-4 * (2**14 / shape.d_sae) ** 0.5, device)
    # sae-lens draws the initial weights from the device's global generator: leave the caller's as it was.
    with torch.random.fork_rng(devices=_gpus(device)), torch.enable_grad():
        torch.manual_seed(seed)
        lens_sae = new_sae(lens, shape, config.total_training_steps, device)
        trainer = lens.SAETrainer(config, lens_sae, data_provider=batches)
        if checkpoint is None or not checkpoint.resume(trainer, activations):
            _start(trainer, held_out_ND.float())
        loss = _fit(trainer, activations, meta, held_out_ND, watch, checkpoint)
    trained = _measured(_frozen(trainer, meta), held_out_ND)
    watch.on_point(_point(trainer, loss, trained))
    return trained


def _gpus(device: str) -> list[torch.device]:
    """The CUDA devices whose generators `fork_rng` keeps beside the CPU's: the one that is trained on."""
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _check_options(
    activations: Iterable[Tensor],
    n_tokens: int,
    batch_size: int,
    meta: SAEMeta,
    held_out: Tensor | None,
    checkpoint: Checkpoint | None,
) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} is not at least 1")
    if n_tokens < batch_size:
        raise InputError(f"n_tokens: {n_tokens} is less than one batch of {batch_size}")
    if meta.layer != layer_of_hook(meta.hook_name):
        raise InputError(f"meta.layer: {meta.layer} does not agree with hook_name {meta.hook_name!r}")
    if checkpoint is not None and (
        held_out is None or not isinstance(activations, ActivationStream) or activations.batch_size != batch_size
    ):
        raise InputError(
            f"checkpoint: needs held_out and a stream made by activation_batches with batch_size={batch_size}"
        )


def _check_held_out(held_out_ND: Tensor, d_model: int) -> None:
    same = held_out_ND.ndim != 2 or held_out_ND.shape[1] != d_model or bool((held_out_ND == held_out_ND[:1]).all())
    if same:
        shape = tuple(held_out_ND.shape)
        raise InputError(f"held_out: needs tokens [n, {d_model}] that differ; these {shape} do not fit")


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
    taken = first_tokens(stream, n_held_out)
    if len(taken) < n_held_out:
        raise InputError(f"activations: the stream ended before {n_held_out} held-out tokens were read")
    return taken


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


def _start(trainer: Any, sample_ND: Tensor) -> None:
    """Centres and scales: distance from the mean, not raw norm as in sae-lens, because an offset shared by all tokens
    must not shrink the signal."""
    scale = sample_ND.shape[1] ** 0.5 / (sample_ND - sample_ND.mean(0)).norm(dim=-1).mean().item()
    trainer.activation_scaler.scaling_factor = scale
    start_at(trainer.sae, sample_ND, scale)


def _fit(
    trainer: Any,
    stream: Iterable[Tensor],
    meta: SAEMeta,
    held_out_ND: Tensor,
    watch: Watch,
    checkpoint: Checkpoint | None,
) -> float:
    """`SAETrainer.fit` over its public `step`, from wherever the trainer is; returns the last step's loss."""
    loss, total = 0.0, trainer.cfg.total_training_steps
    while trainer.n_training_steps < total:
        batch_ND = next(trainer.data_provider, None)
        done = trainer.n_training_steps
        if batch_ND is None:
            raise InputError(f"activations: the stream ended after {done} of {total} training batches")
        loss = trainer.step(batch_ND).loss.item()
        trainer.n_training_steps = done = done + 1
        watch.on_step(trainer.n_training_samples, loss)
        if watch.every is not None and done % watch.every == 0 and done < total:
            watch.on_point(_point(trainer, loss, _measured(_frozen(trainer, meta), held_out_ND[:EVAL_TOKENS])))
        if checkpoint is not None and done % checkpoint.every == 0 and done < total:
            checkpoint.save(trainer, stream)
    return loss


def _frozen(trainer: Any, meta: SAEMeta) -> SAE:
    return frozen(trainer.sae, meta, trainer.activation_scaler.scaling_factor)


def _point(trainer: Any, loss: float, trained: TrainedSAE) -> TrainingPoint:
    step, tokens = trainer.n_training_steps, trainer.n_training_samples
    return TrainingPoint(step, tokens, loss, trained.fvu, trained.l0, trained.dead_share)


def _measured(sae: SAE, held_out_ND: Tensor) -> TrainedSAE:
    sae = sae.calibrated(held_out_ND)
    frequency_F = sae.frequency_F
    assert frequency_F is not None
    return TrainedSAE(
        sae=sae,
        fvu=sae.fvu(held_out_ND),
        l0=frequency_F.sum().item(),
        dead_share=(frequency_F == 0).float().mean().item(),
        n_held_out=len(held_out_ND),
    )
