"""Conditions that are watched while text is drawn: abort, or call a handler, on the token where one holds.

The condition is read in the forward over a token, before the next is drawn: what has been written ends with the token
on which it held. A token is looked at where it would be edited, and never twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.steering.conditions import Condition


@dataclass(frozen=True)
class Moment:
    """Where a watched condition held."""

    condition: Condition
    prompt: str
    prompt_ids: tuple[int, ...]
    response_so_far: str
    completion_ids: tuple[int, ...]
    """Ends with the token on which it held; empty if that is a token of the prompt."""


Handler = Callable[[Moment], object]


class GenerationAborted(Exception):
    """Ends a generation whose abort condition held; `moment` has the text so far."""

    def __init__(self, moment: Moment) -> None:
        written = f"after {len(moment.completion_ids)} tokens" if moment.completion_ids else "while reading the prompt"
        super().__init__(f"generation aborted {written}: {moment.condition} holds")
        self.moment = moment


@dataclass(frozen=True, eq=False)
class Watch:
    """A condition and what is called where it holds; None aborts."""

    condition: Condition
    handler: Handler | None = None


@dataclass(eq=False)
class Watching:
    """Follows one batch of rows, from its prefill on, and calls the watches' handlers."""

    watches: Sequence[Watch]
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    rows: list[list[int]] = field(default_factory=list, init=False)
    widths: list[int] = field(default_factory=list, init=False)

    def __call__(self, ids_BS: Tensor, open_BS: Tensor, held: Sequence[Tensor]) -> None:
        ids = ids_BS.tolist()
        if not self.rows:
            self.rows, self.widths = ids, [len(row) for row in ids]
        else:
            for row, new in zip(self.rows, ids, strict=True):
                row += new
        for watch, held_N in zip(self.watches, held, strict=True):
            held_BS = torch.zeros_like(open_BS)
            held_BS[open_BS] = held_N.to(open_BS.device)
            for row, place in held_BS.nonzero().tolist():
                if not self._ended(row):
                    self._tell(watch, row, len(self.rows[row]) - ids_BS.shape[1] + place + 1)

    def _ended(self, row: int) -> bool:
        return any(token in self.eos_ids for token in self.rows[row][self.widths[row] :])

    def _tell(self, watch: Watch, row: int, end: int) -> None:
        pad, width = self.tokenizer.pad_token_id, self.widths[row]
        prompt = self.rows[row][:width]
        while prompt and prompt[0] == pad:
            prompt = prompt[1:]
        completion = self.rows[row][width:end]
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt, completion)]
        moment = Moment(watch.condition, texts[0], tuple(prompt), texts[1], tuple(completion))
        if watch.handler is None:
            raise GenerationAborted(moment)
        watch.handler(moment)
