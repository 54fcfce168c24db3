"""An SAE of a model's own residual stream, from rows of token ids to a measured SAE in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mechreward.errors import InputError
from mechreward.models import LoadedModel, d_model
from mechreward.sae.activations import Row, activation_batches
from mechreward.sae.sae import SAEMeta
from mechreward.sae.training import TrainedSAE, train_sae

HELD_OUT_EVERY = 20
"""One row in so many is kept out of training and measured on."""


def train_own_sae(
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    meta: SAEMeta,
    expansion: int,
    k: int,
    n_tokens: int,
    batch_size: int = 512,
    lr: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> TrainedSAE:
    """Trains a TopK SAE of `meta.layer` on prompt and completion tokens, in as many passes as `n_tokens` takes.

    Args:
        rows: prompt and completion ids, at least 20; one in 20 is only measured on.
        expansion: features, in multiples of the model's width.
        k: active features a token.
        n_tokens: tokens to train on; see `train_sae` for the others.

    Raises:
        InputError: too few rows, or as `train_sae`.
    """
    if len(rows) < HELD_OUT_EVERY:
        raise InputError(
            f"rows: {len(rows)} are too few to train and measure an SAE on; at least {HELD_OUT_EVERY} are needed"
        )
    options: dict[str, Any] = {"include_prompt": True, "batch_size": batch_size, "seed": seed}
    training = [row for at, row in enumerate(rows) if at % HELD_OUT_EVERY]
    held_out_ND = torch.cat(list(activation_batches(loaded, rows[::HELD_OUT_EVERY], meta.layer, **options)))
    return train_sae(
        activation_batches(loaded, training, meta.layer, epochs=None, **options),
        d_model=d_model(loaded.model),
        d_sae=expansion * d_model(loaded.model),
        k=k,
        n_tokens=n_tokens,
        meta=meta,
        lr=lr,
        batch_size=batch_size,
        held_out=held_out_ND,
        seed=seed,
        device=device,
        on_step=on_step,
    )
