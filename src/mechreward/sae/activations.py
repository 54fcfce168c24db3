"""Shuffled batches of residuals to train an SAE on, read from a model by the function that gate and reward use.

Rows are visited in random order in groups of about half a buffer of tokens; each buffer is shuffled and its first half
handed out, so a batch mixes tokens of many rows (the mixing buffer of SAE Lens). BOS, pads and other special tokens are
left out by id, and massive-norm tokens (attention sinks) by norm; EOS is kept, because rewards are read there too.

A stream can be put down and taken up again (`state_dict`, `load_state_dict`): what is left of the buffer is in the
state, and the rows are found again by counting, so the batches that follow are the very ones that would have followed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_residuals, norm_outliers
from mechreward.sae.rows import Row


class ActivationStream:
    """An iterator over batches [B, D], float32 on the CPU; made by `activation_batches`."""

    def __init__(
        self,
        read: Callable[[Sequence[Row]], Iterator[Tensor]],
        rows: Sequence[Row],
        batch_size: int,
        buffer_size: int,
        seed: int,
        epochs: int | None,
        reuse: int,
    ) -> None:
        self.batch_size = batch_size
        self._read, self._rows, self._seed, self._epochs, self._reuse = read, rows, seed, epochs, reuse
        self._buffer_size = buffer_size
        self._generator = torch.Generator().manual_seed(seed)
        self._held: list[Tensor] = []
        self._pool_ND, self._order, self._passes = torch.empty(0, 0), torch.empty(0, dtype=torch.long), 0
        self._group, self._chunk = 0, 0
        self._chunks = _some(self._walk(), len(rows))

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while not len(self._order):
            if self._passes:
                self._order = torch.randperm(len(self._pool_ND), generator=self._generator)
                self._passes -= 1
            else:
                self._fill()
        batch_BD, self._order = self._pool_ND[self._order[: self.batch_size]], self._order[self.batch_size :]
        return batch_BD

    def state_dict(self) -> dict[str, Any]:
        """All that the batches to come depend on, besides the model, the rows and the options."""
        return {
            "group": self._group,
            "chunk": self._chunk,
            "held": torch.cat(self._held) if self._held else torch.empty(0, 0),
            "pool": self._pool_ND.clone(),
            "order": self._order.clone(),
            "passes": self._passes,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the stream that gave this state was; the model reads at most half a buffer again."""
        self._group, self._chunk = state["group"], state["chunk"]
        self._held = [state["held"]] if len(state["held"]) else []
        self._pool_ND, self._order, self._passes = state["pool"], state["order"], state["passes"]
        self._generator.set_state(state["generator"])
        self._chunks = self._walk()

    def _fill(self) -> None:
        """Reads until the buffer is full (or the rows are at an end), shuffles it and makes its first half ready."""
        for chunk_ND in self._chunks:
            self._held.append(chunk_ND)
            if sum(map(len, self._held)) >= self._buffer_size:
                mixed_ND = self._shuffled()
                cut = len(mixed_ND) // 2 // self.batch_size * self.batch_size
                self._serve(mixed_ND[:cut].clone())
                self._held = [mixed_ND[cut:].clone()]
                return
        if not self._held:
            raise StopIteration
        self._serve(self._shuffled())
        self._held = []

    def _serve(self, pool_ND: Tensor) -> None:
        self._pool_ND, self._order, self._passes = pool_ND, torch.arange(len(pool_ND)), self._reuse - 1

    def _shuffled(self) -> Tensor:
        pool_ND = torch.cat(self._held)
        return pool_ND[torch.randperm(len(pool_ND), generator=self._generator)]

    def _walk(self) -> Iterator[Tensor]:
        """States of the rows from where the stream is, counting groups and the chunks within one."""
        first, skipped = self._group, self._chunk
        groups = _groups(self._rows, self._buffer_size // 2, self._epochs, random.Random(self._seed))
        for group, rows in enumerate(groups):
            for chunk, h_ND in enumerate(self._read(rows) if group >= first else ()):
                if group > first or chunk >= skipped:
                    self._group, self._chunk = group, chunk + 1
                    yield h_ND


def activation_batches(
    loaded: LoadedModel,
    rows: Sequence[Row],
    layer: int,
    *,
    batch_size: int = 4096,
    buffer_size: int = 65536,
    seed: int = 0,
    epochs: int | None = 1,
    reuse: int = 1,
    include_prompt: bool = False,
    exclude_ids: Collection[int] | None = None,
    outlier_factor: float = 10.0,
    read_batch_size: int = 32,
) -> ActivationStream:
    """Iterates over shuffled residuals [B, D] float32 after block `layer`; the last batch of all may be shorter.

    Args:
        rows: prompt and completion ids; completion tokens are read.
        layer: 0-based decoder block.
        batch_size: B, tokens a batch.
        buffer_size: tokens held in memory and shuffled together; at least two batches.
        seed: of the order of rows and tokens.
        epochs: passes over the rows, each in a new order; None goes on for ever.
        reuse: times each state is handed out, in a new order each time, before the next half buffer is read. Reading
            costs more than training on a small SAE, and half a buffer holds many more states than a batch.
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
    if reuse < 1:
        raise InputError(f"reuse: {reuse} is not at least 1")
    excluded = torch.tensor(sorted(special_ids(loaded.tokenizer) if exclude_ids is None else exclude_ids))

    def read(group: Sequence[Row]) -> Iterator[Tensor]:
        prompts, completions = [list(prompt) for prompt, _ in group], [list(completion) for _, completion in group]
        for batch in iter_residuals(loaded.model, prompts, completions, layer, batch_size=read_batch_size):
            keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT, outlier_factor)
            keep_BT = keep_BT & ~_listed([completions[row] for row in batch.rows], excluded, keep_BT)
            yield batch.h_BTD[keep_BT].float().cpu()

    return ActivationStream(read, rows, batch_size, buffer_size, seed, epochs, reuse)


def first_tokens(stream: Iterator[Tensor], n: int | None = None) -> Tensor:
    """The first `n` states of a stream [n, D], or all: for None, and where there are fewer."""
    taken: list[Tensor] = []
    for batch_BD in stream:
        taken.append(batch_BD)
        if n is not None and sum(map(len, taken)) >= n:
            break
    return torch.cat(taken)[:n]


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
