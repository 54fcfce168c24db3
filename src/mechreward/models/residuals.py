"""The residual stream of completions, read by one teacher-forced forward that stops after the last block it needs.

Alignment: `h_t` is the state *after* the model has read completion token t, so it sits at position `len(prompt) + t` of
the forward over prompt ids + completion ids. During generation the last sampled token is never fed back and has no
state; here it has one. Token ids go in as they were sampled; nothing is tokenised again.

Padding is on the right: under causal attention no real token sees what comes after it, and every row starts at position
0 even in models that do not derive positions from the attention mask (GPT-2's would be shifted by pads on the left).
So a row's states do not depend on the rows it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.models.blocks import check_layer, context_length, d_model, find_blocks, unwrap, vocabulary_size
from mechreward.models.modes import eval_mode

Ids = Sequence[Sequence[int]]


class _ForwardStopped(Exception):
    """Ends a forward that has given what was wanted; never leaves `capture_blocks`."""


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


@contextmanager
def capture_blocks(model: nn.Module, layers: Sequence[int], stop: bool = True) -> Iterator[dict[int, Tensor]]:
    """Catches the outputs of blocks `layers` of a forward run inside the `with`: one tensor a layer, of the latest one.

    With `stop` the forward ends right after the last of them, and with it the body of the `with`: put nothing behind
    it there.

    Example:
        >>> with capture_blocks(model, [2, 5]) as states:  # doctest: +SKIP
        ...     model(ids_BT)
        >>> states[5].shape  # doctest: +SKIP
    """
    _check_layers(model, layers)
    states: dict[int, Tensor] = {}
    signal, blocks = _ForwardStopped(), find_blocks(model)

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        states[layer] = output[0] if isinstance(output, tuple) else output
        if stop and layer == max(layers):
            raise signal

    with ExitStack() as hooks:
        for layer in set(layers):
            handle = blocks[layer].register_forward_hook(lambda _m, _i, output, layer=layer: keep(layer, output))
            hooks.callback(handle.remove)
        try:
            yield states
        except _ForwardStopped as stopped:
            if stopped is not signal:  # of a capture further out
                raise


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
    _check_layers(model, layers)
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
            the context or a layer out of range; on the way for a state that is NaN or infinite.
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
    median_B = norm_BT.masked_fill(~mask_BT, torch.nan).nanmedian(dim=1).values
    return mask_BT & (norm_BT <= factor * median_B[:, None])


def _stream(
    model: nn.Module, prompt_ids: Ids, completion_ids: Ids, layers: Sequence[int], batch_size: int, stop: bool
) -> Iterator[BlocksBatch]:
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(completion_ids[row]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        prompts, completions = [prompt_ids[row] for row in rows], [completion_ids[row] for row in rows]
        batch = _read_batch(model, rows, prompts, completions, layers, stop)
        for layer, h_BTD in batch.h_BTD.items():
            _check_finite(h_BTD, rows, layer)
        yield batch


def _read_batch(
    model: nn.Module, rows: list[int], prompts: Ids, completions: Ids, layers: Sequence[int], stop: bool
) -> BlocksBatch:
    inner = unwrap(model)
    ids_BS, seen_BS = pad_right([[*p, *c] for p, c in zip(prompts, completions, strict=True)], inner.device)
    with eval_mode(inner), capture_blocks(inner, layers, stop) as states:
        inner(input_ids=ids_BS, attention_mask=seen_BS.long(), use_cache=False)
    start_B1 = torch.tensor([len(prompt) for prompt in prompts], device=inner.device)[:, None]
    length_B1 = torch.tensor([len(completion) for completion in completions], device=inner.device)[:, None]
    step_T = torch.arange(int(length_B1.max()), device=inner.device)
    mask_BT = step_T < length_B1
    place_BT = (start_B1 + step_T).clamp(max=ids_BS.shape[1] - 1)
    h_BTD: dict[int, Tensor] = {}
    for layer in sorted(set(layers)):
        shape = tuple(states[layer].shape) if layer in states else None
        if shape is None or shape[:-1] != ids_BS.shape:
            raise InputError(f"model: block {layer} of {type(inner).__name__} puts out {shape}, not one state a token")
        h_BTD[layer] = _cut_completions(states.pop(layer), place_BT, mask_BT)
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


def check_rows(model: nn.Module, prompt_ids: Ids, completion_ids: Ids, batch_size: int) -> None:
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


def _check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    if not layers:
        raise InputError("layers: none is named; give at least one block")
    for layer in layers:
        check_layer(model, layer)


def _check_finite(h_BTD: Float[Tensor, "b t d"], rows: list[int], layer: int) -> None:
    bad_BT = ~h_BTD.isfinite().all(dim=-1)
    if bad_BT.any():
        # The token is not named: attention carries a NaN to earlier places as well, as masked weights of 0 times NaN.
        place, token = bad_BT.nonzero()[0].tolist()
        kind = "NaN" if h_BTD[place, token].isnan().any() else "infinite"
        where = f"row {rows[place]}; check the model's weights and dtype"
        raise InputError(f"residual: the state after block {layer} is {kind} at {where}")
