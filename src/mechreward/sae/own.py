"""An SAE of a model's own residual stream, from rows of token ids to a measured SAE in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechreward.models import LoadedModel, block_name, d_model
from mechreward.sae.activations import ActivationStream, activation_batches, first_tokens
from mechreward.sae.architectures import SAEShape
from mechreward.sae.checkpoint import Checkpoint
from mechreward.sae.rows import Row, set_aside
from mechreward.sae.sae import SAEMeta
from mechreward.sae.training import TrainedSAE, Watch, train_sae

BUFFER_TOKENS = 65536
"""Most tokens that are shuffled together."""


def own_shape(loaded: LoadedModel, *, expansion: int, k: int, **options: Any) -> SAEShape:
    """The shape of an SAE that is `expansion` times as wide as the model; `options` are `SAEShape`'s other fields."""
    width = d_model(loaded.model)
    return SAEShape(d_model=width, d_sae=expansion * width, k=k, **options)


def own_meta(loaded: LoadedModel, layer: int, *, release: str, model_name: str) -> SAEMeta:
    """The origin of an SAE of the model's block `layer`, with the block's own module path as its hook point."""
    return SAEMeta(release, "", layer, model_name, block_name(loaded.model, layer))


def train_own_sae(
    loaded: LoadedModel,
    rows: Sequence[Row],
    shape: SAEShape,
    *,
    meta: SAEMeta,
    n_tokens: int,
    held_out: Sequence[Row] | None = None,
    n_held_out: int | None = None,
    include_prompt: bool = True,
    reuse: int = 1,
    outlier_factor: float = 10.0,
    batch_size: int = 512,
    lr: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainedSAE:
    """Trains an SAE of `meta.layer` on the rows' tokens, in as many passes as `n_tokens` takes.

    Args:
        rows: prompt and completion ids.
        shape: what is to be trained; see `own_shape`.
        n_tokens: tokens to train on; see `train_sae` for the options that are not named here.
        held_out: rows that are only measured on. Without it one in 20 of `rows` (at least 20) is.
        n_held_out: measure on at most so many tokens of them.
        include_prompt, reuse, outlier_factor: see `activation_batches`.

    Raises:
        InputError: too few rows, or as `train_sae`.
    """
    if held_out is None:
        rows, held_out = set_aside([[row] for row in rows])

    def stream(rows: Sequence[Row], wanted: int | None, epochs: int | None, reuse: int) -> ActivationStream:
        held = sum(len(completion) for _, completion in rows)
        return activation_batches(
            loaded,
            rows,
            meta.layer,
            batch_size=batch_size,
            # No more than is wanted: to fill a buffer means reading.
            buffer_size=max(2 * batch_size, min(BUFFER_TOKENS, held, wanted or held)),
            seed=seed,
            epochs=epochs,
            reuse=reuse,
            include_prompt=include_prompt,
            outlier_factor=outlier_factor,
        )

    return train_sae(
        stream(rows, n_tokens // max(1, reuse), None, reuse),
        shape,
        n_tokens=n_tokens,
        meta=meta,
        lr=lr,
        batch_size=batch_size,
        held_out=first_tokens(stream(held_out, n_held_out, 1, 1), n_held_out),
        seed=seed,
        device=device,
        watch=watch,
        checkpoint=checkpoint,
    )
