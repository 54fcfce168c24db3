"""The residual stream of completions, read by one teacher-forced forward that stops after the last block it needs.

Alignment: `h_t` is the state *after* the model has read completion token t, so it sits at position `len(prompt) + t` of
the forward over prompt ids + completion ids. During generation the last sampled token is never fed back and has no
state; here it has one. Token ids go in as they were sampled; nothing is tokenised again.

Padding is on the right: under causal attention no real token sees what comes after it, and every row starts at position
0 even in models that do not derive positions from the attention mask (GPT-2's would be shifted by pads on the left).
So a row's states do not depend on the rows it shares a batch with.

A prompt that several rows share is read once (`prefix.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.models.blocks import check_causal, context_length, d_model, unwrap, vocabulary_size
from mechreward.models.capture import capture_blocks, check_layers
from mechreward.models.modes import eval_mode
from mechreward.models.prefix import SharedPrompts, can_share

Ids = Sequence[Sequence[int]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ResidualBatch:
    """States of some rows: `rows` are their places in the input lists; zeros pad completions on the right."""

    rows: list[int]
    h_BTD: Float[Tensor, "b t d"]
    mask_BT: Bool[Tensor, "b t"]


@dataclass(frozen=True)
class BlocksBatch:
    """States of some rows after several blocks, by layer; `rows` and `mask_BT` as in `ResidualBatch`."""

    rows: list[int]
    h_BTD: Mapping[int, Float[Tensor, "b t d"]]
    mask_BT: Bool[Tensor, "b t"]


def iter_blocks(
    model: nn.Module,
    prompt_ids: Ids,
    completion_ids: Ids,
    layers: Sequence[int],
    batch_size: int = 32,
    stop: bool = True,
) -> Iterator[BlocksBatch]:
    """As `iter_residuals`, but after each of several blocks, all from one forward a batch.

    Args:
        stop: end each forward after the last block that is read. Off for a model whose weights are sharded (FSDP,
            ZeRO-3): what follows a block there also gathers and frees weights, on all processes together.

    Raises:
        InputError: as `iter_residuals`, and if no layer is named.
    """
    check_rows(model, prompt_ids, completion_ids, batch_size)
    check_layers(model, layers)
    return _stream(model, prompt_ids, completion_ids, layers, batch_size, stop)


def iter_residuals(
    model: nn.Module, prompt_ids: Ids, completion_ids: Ids, layer: int, batch_size: int = 32
) -> Iterator[ResidualBatch]:
    """Streams the states after block `layer` on the completion tokens, in float32 and on the model's device.

    Rows of like length share a batch, so batches do not come in input order; each names its rows.

    Args:
        model: a transformers or PEFT model, in any mode (read in evaluation mode, left as it was).
        prompt_ids: token ids of each prompt, BOS included if the model was sampled with it.
        completion_ids: token ids of each completion, EOS included, pads left out.
        layer: block whose output is read, from 0.
        batch_size: rows a forward.

    Raises:
        InputError: at once for lists that do not match, empty completions, ids outside the vocabulary, rows longer than
            the context, a layer out of range or a model that is not causal; on the way for a state that is NaN or
            infinite.
    """
    batches = iter_blocks(model, prompt_ids, completion_ids, [layer], batch_size)
    return (ResidualBatch(batch.rows, batch.h_BTD[layer], batch.mask_BT) for batch in batches)


def read_residuals(
    model: nn.Module, prompt_ids: Ids, completion_ids: Ids, layer: int, batch_size: int = 32
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    """All rows of `iter_residuals` in input order: `h_BTD`, zero beyond a completion's end, and the mask `mask_BT`.

    T is the longest completion. Everything is held in memory; stream with `iter_residuals` when that is too much.
    """
    batches = iter_residuals(model, prompt_ids, completion_ids, layer, batch_size)
    longest = max(len(row) for row in completion_ids)
    device = unwrap(model).device
    h_BTD = torch.zeros(len(completion_ids), longest, d_model(model), device=device)
    mask_BT = torch.zeros(len(completion_ids), longest, dtype=torch.bool, device=device)
    for batch in batches:
        width = batch.mask_BT.shape[1]
        h_BTD[batch.rows, :width] = batch.h_BTD
        mask_BT[batch.rows, :width] = batch.mask_BT
    return h_BTD, mask_BT


def norm_outliers(
    h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"], factor: float = 10.0
) -> Bool[Tensor, "b t"]:
    """`mask_BT` without tokens whose norm exceeds `factor` times the median norm of their own row's masked tokens.

    By row, so that what is left out does not depend on what else is in the batch.

    A few tokens (BOS, sometimes the first delimiter) carry norms far above the rest (Sun et al. 2024, "Massive
    activations in large language models"), and a mean they enter is theirs alone. `factor` is in units of the median.
    """
    if not mask_BT.numel():
        return mask_BT.clone()
    norm_BT = h_BTD.float().norm(dim=-1)
    counted_BT = mask_BT & ~norm_BT.isnan()
    # The lower median by sorting: torch's own has no deterministic form on CUDA.
    sorted_BT = norm_BT.masked_fill(~counted_BT, torch.inf).sort(dim=1).values
    middle_B1 = (counted_BT.sum(dim=1, keepdim=True) - 1).clamp(min=0) // 2
    return mask_BT & (norm_BT <= factor * sorted_BT.gather(1, middle_B1))


def _stream(
    model: nn.Module, prompt_ids: Ids, completion_ids: Ids, layers: Sequence[int], batch_size: int, stop: bool
) -> Iterator[BlocksBatch]:
    inner, lengths = unwrap(model), [len(completion) for completion in completion_ids]
    alone, groups = _by_prompt(prompt_ids, share=stop and can_share(inner, max(layers)))
    for rows in _batches(alone, [len(prompt_ids[row]) + lengths[row] for row in alone], batch_size):
        ids_BS, seen_BS = pad_right([[*prompt_ids[row], *completion_ids[row]] for row in rows], inner.device)
        whole = {"input_ids": ids_BS, "attention_mask": seen_BS.long(), "use_cache": False}
        starts = [len(prompt_ids[row]) for row in rows]
        yield _read_batch(inner, whole, rows, starts, [lengths[row] for row in rows], layers, stop)
    for group in _batches(groups, [len(prompt_ids[rows[0]]) for rows in groups], batch_size):
        shared = SharedPrompts(inner, [prompt_ids[rows[0]] for rows in group])
        with eval_mode(inner), capture_blocks(inner, layers):
            inner(**shared.forward_arguments)
        place = {row: i for i, rows in enumerate(group) for row in rows}
        for rows in _batches(list(place), [lengths[row] for row in place], batch_size):
            ids_BT, mask_BT = pad_right([list(completion_ids[row]) for row in rows], inner.device)
            rest, starts = shared.continued([place[row] for row in rows], ids_BT, mask_BT), [0] * len(rows)
            yield _read_batch(inner, rest, rows, starts, [lengths[row] for row in rows], layers, stop)


def _by_prompt(prompt_ids: Ids, share: bool) -> tuple[list[int], list[list[int]]]:
    """Rows to read in one piece, and groups of rows whose prompt is read once: not an empty one, nor one row's own."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompt_ids):
        groups.setdefault(tuple(prompt), []).append(row)
    shared = [rows for prompt, rows in groups.items() if share and prompt and len(rows) > 1]
    within = {row for rows in shared for row in rows}
    return [row for row in range(len(prompt_ids)) if row not in within], shared


def _batches(items: Sequence[Item], lengths: Sequence[int], size: int) -> Iterator[list[Item]]:
    """Items of like length together."""
    by_length = [items[i] for i in sorted(range(len(items)), key=lengths.__getitem__)]
    return (by_length[start : start + size] for start in range(0, len(by_length), size))


def _read_batch(
    inner: nn.Module,
    arguments: Mapping[str, Any],
    rows: list[int],
    starts: list[int],
    lengths: list[int],
    layers: Sequence[int],
    stop: bool,
) -> BlocksBatch:
    """The states of a forward with `arguments`, in which a row's completion is at `starts` and has so many tokens."""
    ids_BS: Tensor = arguments["input_ids"]
    with eval_mode(inner), capture_blocks(inner, layers, stop) as states:
        inner(**arguments)
    start_B1 = torch.tensor(starts, device=ids_BS.device)[:, None]
    length_B1 = torch.tensor(lengths, device=ids_BS.device)[:, None]
    step_T = torch.arange(max(lengths), device=ids_BS.device)
    mask_BT = step_T < length_B1
    place_BT = (start_B1 + step_T).clamp(max=ids_BS.shape[1] - 1)
    h_BTD: dict[int, Tensor] = {}
    for layer in sorted(set(layers)):
        shape = tuple(states[layer].shape) if layer in states else None
        if shape is None or shape[:-1] != ids_BS.shape:
            raise InputError(f"model: block {layer} of {type(inner).__name__} puts out {shape}, not one state a token")
        h_BTD[layer] = _cut_completions(states.pop(layer), place_BT, mask_BT)
        _check_finite(h_BTD[layer], rows, layer)
    return BlocksBatch(rows, h_BTD, mask_BT)


def _cut_completions(
    h_BSD: Float[Tensor, "b s d"], place_BT: Int[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"]
) -> Float[Tensor, "b t d"]:
    """Moves each row's completion to the front: state t is that of position `prompt length + t`."""
    # A block of a model spread over several devices may live on another one than the inputs.
    place_BT, mask_BT = place_BT.to(h_BSD.device), mask_BT.to(h_BSD.device)
    h_BTD = h_BSD.gather(1, place_BT[..., None].expand(-1, -1, h_BSD.shape[-1])).float()
    return h_BTD.masked_fill(~mask_BT[..., None], 0.0)


def pad_right(rows: list[list[int]], device: torch.device) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    # Which id pads does not matter: it is masked, and lies behind every token that is read.
    ids_BS = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0)
    length_B1 = torch.tensor([len(row) for row in rows])[:, None]
    return ids_BS.to(device), (torch.arange(ids_BS.shape[1]) < length_B1).to(device)


@dataclass(frozen=True)
class Limits:
    """Which rows a model can read."""

    context: int | None
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Limits:
        return cls(context_length(model), vocabulary_size(model))

    def too_long(self, ids: Sequence[int]) -> str | None:
        """What is wrong with the length of a prompt and its completion, as the end of a sentence."""
        if self.context is None or len(ids) <= self.context:
            return None
        return f"has {len(ids)} tokens with its prompt; the model reads at most {self.context}"

    def stray(self, ids: Sequence[int]) -> str | None:
        """Which token the model does not know, as the end of a sentence."""
        stray = next((i for i in (min(ids), max(ids)) if not 0 <= i < self.vocabulary), None)
        return None if stray is None else f"holds token {stray}; the model knows 0 to {self.vocabulary - 1}"


def check_rows(model: nn.Module, prompt_ids: Ids, completion_ids: Ids, batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} is too small; it must be at least 1")
    if not len(completion_ids):
        raise InputError("completion_ids: the batch is empty; give at least one row")
    if len(prompt_ids) != len(completion_ids):
        raise InputError(f"completion_ids: {len(completion_ids)} rows for {len(prompt_ids)} prompts; give one each")
    check_causal(model)
    limits = Limits.of(model)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not len(completion):
            raise InputError(f"completion_ids: row {row} has no tokens; leave such rows out")
        ids = [*prompt, *completion]
        wrong = limits.too_long(ids) or limits.stray(ids)
        if wrong is not None:
            raise InputError(f"completion_ids: row {row} {wrong}")


def _check_finite(h_BTD: Float[Tensor, "b t d"], rows: list[int], layer: int) -> None:
    bad_BT = ~h_BTD.isfinite().all(dim=-1)
    if bad_BT.any():
        # The token is not named: attention carries a NaN to earlier places as well, as masked weights of 0 times NaN.
        place, token = bad_BT.nonzero()[0].tolist()
        kind = "NaN" if h_BTD[place, token].isnan().any() else "infinite"
        where = f"row {rows[place]}; check the model's weights and dtype"
        raise InputError(f"residual: the state after block {layer} is {kind} at {where}")
