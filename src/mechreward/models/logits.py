"""What a model expected at each token of a completion: the logits each token was drawn from, by one forward.

Alignment: `logits_BTV[b, t]` is the distribution that completion token t was drawn from, so it stands *before* the
token, at position `len(prompt) + t - 1` of the forward over prompt ids + completion ids. Padding is on the right, as in
`residuals.py`, and for the same reasons.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.models.blocks import unwrap
from mechreward.models.modes import eval_mode
from mechreward.models.residuals import Ids, check_rows, pad_right


@dataclass(frozen=True)
class LogitsBatch:
    """Some rows: `rows` are their places in the input lists; beyond a completion's end the values mean nothing."""

    rows: list[int]
    logits_BTV: Float[Tensor, "b t v"]
    ids_BT: Int[Tensor, "b t"]
    mask_BT: Bool[Tensor, "b t"]

    @property
    def logprobs_BT(self) -> Float[Tensor, "b t"]:
        """Log-probability of each completion token, in nats; 0 beyond the end."""
        chosen_BT1 = self.logits_BTV.log_softmax(-1).gather(-1, self.ids_BT[..., None])
        return chosen_BT1.squeeze(-1).masked_fill(~self.mask_BT, 0.0)


def iter_logits(model: nn.Module, prompt_ids: Ids, completion_ids: Ids, batch_size: int = 8) -> Iterator[LogitsBatch]:
    """Streams the logits of completion tokens, float32; rows of like length share a batch, and each names its rows.

    Args:
        model: a transformers or PEFT model, in any mode (read in evaluation mode, left as it was).
        prompt_ids, completion_ids: token ids, a prompt and a completion a row; no prompt may be empty.
        batch_size: rows a forward. One batch holds batch_size x longest row (without the shortest prompt) x vocabulary
            numbers.

    Raises:
        InputError: for lists that do not match, empty rows, ids outside the vocabulary or rows longer than the context.
    """
    check_prompted_rows(model, prompt_ids, completion_ids, batch_size)
    return _stream(model, prompt_ids, completion_ids, batch_size)


def check_prompted_rows(model: nn.Module, prompt_ids: Ids, completion_ids: Ids, batch_size: int) -> None:
    """Raises `InputError` as `iter_logits`."""
    check_rows(model, prompt_ids, completion_ids, batch_size)
    bare = next((row for row, prompt in enumerate(prompt_ids) if not len(prompt)), None)
    if bare is not None:
        raise InputError(f"prompt_ids: row {bare} is empty; something has to stand before the first token")


def completion_logits(model: nn.Module, prompt_ids: Ids, completion_ids: Ids) -> LogitsBatch:
    """One batch of `iter_logits`, in the mode the model is in and with gradients: for training on it.

    Nothing is checked here; `check_prompted_rows` does it once for all rows.
    """
    inner = unwrap(model)
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    ids_BS, seen_BS = pad_right(rows, inner.device)
    asked: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": seen_BS.long(), "use_cache": False}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:  # the head is spared what all prompts share
        asked["logits_to_keep"] = ids_BS.shape[1] - min(map(len, prompt_ids)) + 1
    logits_BSV = inner(**asked).logits
    left_out = ids_BS.shape[1] - logits_BSV.shape[1]
    start_B1 = torch.tensor([len(prompt) for prompt in prompt_ids], device=logits_BSV.device)[:, None]
    length_B1 = torch.tensor([len(completion) for completion in completion_ids], device=logits_BSV.device)[:, None]
    step_T = torch.arange(int(length_B1.max()), device=logits_BSV.device)
    place_BT = (start_B1 + step_T).clamp(max=ids_BS.shape[1] - 1)
    logits_BTV = logits_BSV.gather(1, (place_BT - 1 - left_out)[..., None].expand(-1, -1, logits_BSV.shape[-1])).float()
    chosen_BT = ids_BS.to(logits_BSV.device).gather(1, place_BT)
    return LogitsBatch(list(range(len(rows))), logits_BTV, chosen_BT, step_T < length_B1)


def _stream(model: nn.Module, prompt_ids: Ids, completion_ids: Ids, batch_size: int) -> Iterator[LogitsBatch]:
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]) + len(completion_ids[row]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        with eval_mode(unwrap(model)):
            batch = completion_logits(model, [prompt_ids[row] for row in rows], [completion_ids[row] for row in rows])
        yield LogitsBatch(rows, batch.logits_BTV, batch.ids_BT, batch.mask_BT)
