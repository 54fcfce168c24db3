"""Shuffled batches of residuals to train an SAE on, read from a model by the function that gate and reward use.

Rows are visited in random order in groups of about half a buffer of tokens; each buffer is shuffled and its first half
handed out, so a batch mixes tokens of many rows (the mixing buffer of SAE Lens). BOS, pads and other special tokens are
left out by id, and massive-norm tokens (attention sinks) by norm; EOS is kept, because rewards are read there too.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_residuals, norm_outliers

Row = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, completion ids)"""


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None = None) -> list[Row]:
    """Plain texts as rows: the first token (BOS, where the tokenizer adds one) is the prompt, the rest is read.

    Texts of fewer than two tokens are left out; longer ones are cut to `max_tokens`.
    """
    ids = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return [(row[:1], row[1:max_tokens]) for row in ids if len(row[:max_tokens]) > 1]


def activation_batches(
    loaded: LoadedModel,
    rows: Sequence[Row],
    layer: int,
    *,
    batch_size: int = 4096,
    buffer_size: int = 65536,
    seed: int = 0,
    epochs: int | None = 1,
    include_prompt: bool = False,
    exclude_ids: Collection[int] | None = None,
    outlier_factor: float = 10.0,
    read_batch_size: int = 32,
) -> Iterator[Tensor]:
    """Yields shuffled residuals [B, D] float32 after block `layer`; the last batch of all may be shorter.

    Args:
        rows: prompt and completion ids; completion tokens are read.
        layer: 0-based decoder block.
        batch_size: B, tokens a batch.
        buffer_size: tokens held in memory and shuffled together; at least two batches.
        seed: of the order of rows and tokens.
        epochs: passes over the rows, each in a new order; None goes on for ever.
        include_prompt: read the prompt's tokens too, all but its first.
        exclude_ids: token ids never read; by default all special tokens except EOS.
        outlier_factor: a token is left out if its norm exceeds this many times the median norm.
        read_batch_size: rows a forward pass.

    Raises:
        InputError: at once for a wrong option or no rows; while iterating, if no token is left to read.
    """
    if not rows:
        raise InputError("rows: there are none; give at least one (prompt ids, completion ids)")
    if batch_size < 1 or buffer_size < 2 * batch_size:
        raise InputError(f"buffer_size: {buffer_size} is not at least two batches of batch_size={batch_size}")
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs: {epochs} is not at least 1 (or None, for ever)")
    if include_prompt:
        rows = [(prompt[:1], [*prompt[1:], *completion]) for prompt, completion in rows]
    excluded = torch.tensor(sorted(special_ids(loaded.tokenizer) if exclude_ids is None else exclude_ids))

    def read(group: Sequence[Row]) -> Iterator[Tensor]:
        prompts, completions = [list(prompt) for prompt, _ in group], [list(completion) for _, completion in group]
        for batch in iter_residuals(loaded.model, prompts, completions, layer, batch_size=read_batch_size):
            keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT, outlier_factor)
            keep_BT = keep_BT & ~_listed([completions[row] for row in batch.rows], excluded, keep_BT)
            yield batch.h_BTD[keep_BT].float().cpu()

    order = random.Random(seed)
    chunks = (chunk for group in _groups(rows, buffer_size // 2, epochs, order) for chunk in read(group))
    return _shuffled(_some(chunks, len(rows)), batch_size, buffer_size, torch.Generator().manual_seed(seed))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens other than EOS."""
    return set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}


def _listed(completions: Sequence[Sequence[int]], excluded: Tensor, like_BT: Tensor) -> Tensor:
    """True at tokens whose id is excluded."""
    listed_BT = torch.zeros_like(like_BT)
    for i, ids in enumerate(completions):
        listed_BT[i, : len(ids)] = torch.isin(torch.tensor(ids, dtype=torch.long), excluded).to(like_BT.device)
    return listed_BT


def _groups(rows: Sequence[Row], n_tokens: int, epochs: int | None, order: random.Random) -> Iterator[list[Row]]:
    """Rows in a new random order each epoch, in groups of about `n_tokens` completion tokens."""
    for _ in count() if epochs is None else range(epochs):
        group: list[Row] = []
        size = 0
        for row in order.sample(list(rows), len(rows)):
            group.append(row)
            size += len(row[1])
            if size >= n_tokens:
                yield group
                group, size = [], 0
        if group:
            yield group


def _some(chunks: Iterator[Tensor], n_rows: int) -> Iterator[Tensor]:
    """Passes on chunks that hold tokens; an error, rather than an endless search, where there are none."""
    seen, empty = False, 0
    for chunk_ND in chunks:
        empty = 0 if len(chunk_ND) else empty + 1
        if empty > n_rows:
            break
        if len(chunk_ND):
            seen = True
            yield chunk_ND
    if not seen:
        raise InputError("rows: no token is left to read once special and massive-norm tokens are excluded")


def _shuffled(
    chunks: Iterator[Tensor], batch_size: int, buffer_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    held: list[Tensor] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= buffer_size:
            pool_ND = _permuted(torch.cat(held), generator)
            cut = len(pool_ND) // 2 // batch_size * batch_size
            yield from pool_ND[:cut].split(batch_size)
            held, size = [pool_ND[cut:].clone()], len(pool_ND) - cut
    if size:
        yield from _permuted(torch.cat(held), generator).split(batch_size)


def _permuted(pool_ND: Tensor, generator: torch.Generator) -> Tensor:
    return pool_ND[torch.randperm(len(pool_ND), generator=generator)]
