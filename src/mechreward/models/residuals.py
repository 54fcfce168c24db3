"""The residual stream of completions, read by one teacher-forced forward that stops after the block it needs.

Alignment: `h_t` is the state *after* the model has read completion token t, so it sits at position `len(prompt) + t` of
the forward over prompt ids + completion ids. During generation the last sampled token is never fed back and has no
state; here it has one. Token ids go in as they were sampled; nothing is tokenised again.

Padding is on the right: under causal attention no real token sees what comes after it, and every row starts at position
0 even in models that do not derive positions from the attention mask (GPT-2's would be shifted by pads on the left).
So a row's states do not depend on the rows it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.models.blocks import check_layer, context_length, d_model, find_blocks, unwrap, vocabulary_size
from mechreward.models.modes import eval_mode

Ids = Sequence[Sequence[int]]


class _ForwardStopped(Exception):
    """Ends a forward that has given what was wanted; never leaves `capture_block`."""


@dataclass
class Capture:
    """What a hooked block put out in the latest forward; None before the first."""

    h_BTD: Tensor | None = None


@dataclass(frozen=True)
class ResidualBatch:
    """States of some rows: `rows` are their places in the input lists; zeros pad completions on the right."""

    rows: list[int]
    h_BTD: Float[Tensor, "b t d"]
    mask_BT: Bool[Tensor, "b t"]


@contextmanager
def capture_block(model: nn.Module, layer: int, stop: bool = True) -> Iterator[Capture]:
    """Catches the output of block `layer` of a forward run inside the `with`.

    With `stop` the forward ends right after the block, and with it the body of the `with`: put nothing behind it there.

    Example:
        >>> with capture_block(model, 2) as capture:  # doctest: +SKIP
        ...     model(ids_BT)
        >>> capture.h_BTD.shape  # doctest: +SKIP
    """
    check_layer(model, layer)
    capture, signal = Capture(), _ForwardStopped()

    def keep(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        capture.h_BTD = output[0] if isinstance(output, tuple) else output
        if stop:
            raise signal

    handle = find_blocks(model)[layer].register_forward_hook(keep)
    try:
        yield capture
    except _ForwardStopped as stopped:
        if stopped is not signal:  # of a capture further out
            raise
    finally:
        handle.remove()


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
            the context or a layer out of range; on the way for a state that is NaN or infinite.
    """
    _check_rows(model, prompt_ids, completion_ids, batch_size)
    check_layer(model, layer)
    return _stream(model, prompt_ids, completion_ids, layer, batch_size)


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
    median_B = norm_BT.masked_fill(~mask_BT, torch.nan).nanmedian(dim=1).values
    return mask_BT & (norm_BT <= factor * median_B[:, None])


def _stream(
    model: nn.Module, prompt_ids: Ids, completion_ids: Ids, layer: int, batch_size: int
) -> Iterator[ResidualBatch]:
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(completion_ids[row]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        prompts, completions = [prompt_ids[row] for row in rows], [completion_ids[row] for row in rows]
        h_BTD, mask_BT = _read_batch(model, prompts, completions, layer)
        _check_finite(h_BTD, rows, layer)
        yield ResidualBatch(rows, h_BTD, mask_BT)


def _read_batch(
    model: nn.Module, prompts: Ids, completions: Ids, layer: int
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    inner = unwrap(model)
    ids_BS, seen_BS = _pad_right([[*p, *c] for p, c in zip(prompts, completions, strict=True)], inner.device)
    with eval_mode(inner), capture_block(inner, layer) as capture:
        inner(input_ids=ids_BS, attention_mask=seen_BS.long(), use_cache=False)
    h_BSD = capture.h_BTD
    if h_BSD is None or h_BSD.shape[:-1] != ids_BS.shape:
        shape = None if h_BSD is None else tuple(h_BSD.shape)
        raise InputError(f"model: block {layer} of {type(inner).__name__} puts out {shape}, not one state a token")
    return _cut_completions(h_BSD, [len(p) for p in prompts], [len(c) for c in completions])


def _cut_completions(
    h_BSD: Float[Tensor, "b s d"], prompt_lengths: list[int], completion_lengths: list[int]
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    """Moves each row's completion to the front: state t is that of position `prompt length + t`."""
    device = h_BSD.device
    start_B1 = torch.tensor(prompt_lengths, device=device)[:, None]
    length_B1 = torch.tensor(completion_lengths, device=device)[:, None]
    step_T = torch.arange(max(completion_lengths), device=device)
    mask_BT = step_T < length_B1
    place_BT = (start_B1 + step_T).clamp(max=h_BSD.shape[1] - 1)
    h_BTD = h_BSD.gather(1, place_BT[..., None].expand(-1, -1, h_BSD.shape[-1])).float()
    return h_BTD.masked_fill(~mask_BT[..., None], 0.0), mask_BT


def _pad_right(rows: list[list[int]], device: torch.device) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    # Which id pads does not matter: it is masked, and lies behind every token that is read.
    ids_BS = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0)
    length_B1 = torch.tensor([len(row) for row in rows])[:, None]
    return ids_BS.to(device), (torch.arange(ids_BS.shape[1]) < length_B1).to(device)


def _check_rows(model: nn.Module, prompt_ids: Ids, completion_ids: Ids, batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} is too small; it must be at least 1")
    if not len(completion_ids):
        raise InputError("completion_ids: the batch is empty; give at least one row")
    if len(prompt_ids) != len(completion_ids):
        raise InputError(f"completion_ids: {len(completion_ids)} rows for {len(prompt_ids)} prompts; give one each")
    context, vocabulary = context_length(model), vocabulary_size(model)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not len(completion):
            raise InputError(f"completion_ids: row {row} has no tokens; leave such rows out")
        ids = [*prompt, *completion]
        if context is not None and len(ids) > context:
            size = f"{len(ids)} tokens with its prompt"
            raise InputError(f"completion_ids: row {row} has {size}; the model reads at most {context}")
        stray = next((i for i in (min(ids), max(ids)) if not 0 <= i < vocabulary), None)
        if stray is not None:
            raise InputError(f"completion_ids: row {row} holds token {stray}; the model knows 0 to {vocabulary - 1}")


def _check_finite(h_BTD: Float[Tensor, "b t d"], rows: list[int], layer: int) -> None:
    bad_BT = ~h_BTD.isfinite().all(dim=-1)
    if bad_BT.any():
        # The token is not named: attention carries a NaN to earlier places as well, as masked weights of 0 times NaN.
        place, token = bad_BT.nonzero()[0].tolist()
        kind = "NaN" if h_BTD[place, token].isnan().any() else "infinite"
        where = f"row {rows[place]}; check the model's weights and dtype"
        raise InputError(f"residual: the state after block {layer} is {kind} at {where}")
