"""The check of an SAE on a model's own residuals, read from rows of token ids as training and rewards read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.models import LoadedModel, check_layer, d_model, iter_blocks, n_blocks, norm_outliers
from mechreward.sae.activations import special_ids
from mechreward.sae.check import HEALTHY, SAECheck, check_sae
from mechreward.sae.rows import Row
from mechreward.sae.sae import SAE


def check_on_model(
    sae: SAE,
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    max_tokens: int = 512,
    every_block: bool = False,
    batch_size: int = 16,
) -> SAECheck:
    """Checks an SAE on about `max_tokens` completion tokens, of rows spread evenly over those given.

    Args:
        every_block: read every block in any case. Without it the others are read only if the SAE does not fit its own,
            to tell what is wrong: encoding costs more than the forward does.

    Raises:
        InputError: if the SAE does not fit the model's width or number of blocks, or no token is left to read.
    """
    check_layer(loaded.model, sae.meta.layer)
    if sae.d_model != d_model(loaded.model):
        raise InputError(
            f"sae: it reads residuals of width {sae.d_model}, but {loaded.name} has width {d_model(loaded.model)}"
        )
    rows = _spread(rows, max_tokens)
    blocks = range(n_blocks(loaded.model))
    if not every_block:
        check = check_sae(sae, block_states(loaded, rows, [sae.meta.layer], batch_size=batch_size))
        if check.fvu <= HEALTHY:
            return check
    return check_sae(sae, block_states(loaded, rows, blocks, batch_size=batch_size))


def block_states(
    loaded: LoadedModel, rows: Sequence[Row], layers: Sequence[int], *, batch_size: int = 16
) -> dict[int, Tensor]:
    """Residuals [N, D] of the completion tokens by block, on the CPU, without special tokens (but EOS) and those of
    massive norm.

    Raises:
        InputError: as `iter_blocks`, or if no token is left.
    """
    prompts, completions = [list(prompt) for prompt, _ in rows], [list(completion) for _, completion in rows]
    special = torch.tensor(sorted(special_ids(loaded.tokenizer)), dtype=torch.long)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in iter_blocks(loaded.model, prompts, completions, layers, batch_size):
        ids_N = torch.cat([torch.tensor(completions[row]) for row in batch.rows])
        plain_N = ~torch.isin(ids_N, special)
        for layer, h_BTD in batch.h_BTD.items():
            mask_BT = batch.mask_BT.to(h_BTD.device)
            keep_N = norm_outliers(h_BTD, mask_BT)[mask_BT].cpu() & plain_N
            found[layer].append(h_BTD[mask_BT].cpu()[keep_N])
    states = {layer: torch.cat(pieces) for layer, pieces in found.items()}
    if not all(map(len, states.values())):
        raise InputError("rows: no token is left to read once special and massive-norm tokens are excluded")
    return states


def _spread(rows: Sequence[Row], max_tokens: int) -> list[Row]:
    """Every n-th row, such that at least `max_tokens` tokens are left where there are as many."""
    if not rows:
        raise InputError("rows: there are none; give at least one (prompt ids, completion ids)")
    n_tokens = sum(len(completion) for _, completion in rows)
    return list(rows[:: max(1, n_tokens // max_tokens)])
