"""One stretch of decoding: a batch of rows goes through transformers' `generate` until half of them have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from mechreward.errors import InputError
from mechreward.models import roomy_cache

SPLIT_FROM = 16  # batches smaller than this run to their end
PREFILL_GAIN = 4  # reading a token again as part of a prompt costs about a fourth of decoding one (tiny Llama on a CPU)


@dataclass
class Row:
    """A response while it grows."""

    question: int
    sample: int
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How rows are drawn and when they end."""

    eos_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float
    top_p: float

    def room(self, row: Row) -> int:
        """How many tokens the row may still get."""
        return self.max_new_tokens - len(row.ids)

    def ended(self, row: Row) -> bool:
        return self.room(row) == 0 or (bool(row.ids) and row.ids[-1] in self.eos_ids)

    def generation_config(self, new_tokens: int) -> GenerationConfig:
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=new_tokens,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.pad_id,
            disable_compile=True,
            **(drawn if self.temperature else {"do_sample": False}),
        )


def extend(model: PreTrainedModel, rows: Sequence[Row], plan: Plan, streamer: BaseStreamer | None = None) -> None:
    """Draws tokens for the rows until half of them (of a small batch: all) have ended; changes `rows`."""
    prefixes = [[*row.prompt, *row.ids] for row in rows]
    width = max(map(len, prefixes))
    # Pads are on the left, so that the tokens to come are side by side; `generate` derives positions from the mask.
    ids_BS = torch.tensor([[plan.pad_id] * (width - len(p)) + p for p in prefixes], device=model.device)
    seen_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=model.device)
    new_tokens = max(map(plan.room, rows))
    logprobs = _LogProbs()
    generate: Callable[..., Tensor] = cast(Any, model).generate
    with _plain_defaults(model):
        sequences_BS = generate(
            input_ids=ids_BS,
            attention_mask=seen_BS,
            generation_config=plan.generation_config(new_tokens),
            past_key_values=roomy_cache(model, width + new_tokens),
            logits_processor=LogitsProcessorList([logprobs]),
            stopping_criteria=StoppingCriteriaList([_EnoughEnded(rows, plan, width, model.device)]),
            streamer=streamer,
        )
    values_BT = logprobs.finish(sequences_BS)
    for row, ids, values in zip(rows, sequences_BS[:, width:].tolist(), values_BT.tolist(), strict=True):
        kept = _kept(ids, plan, plan.room(row))
        row.ids += ids[:kept]
        row.logprobs += values[:kept]


def _kept(ids: Sequence[int], plan: Plan, room: int) -> int:
    """How many of the drawn tokens belong to the row: up to its first EOS, and no more than it has room for."""
    first_eos = next((place + 1 for place, token in enumerate(ids) if token in plan.eos_ids), len(ids))
    return min(first_eos, room)


class _LogProbs(LogitsProcessor):
    """Keeps the log-probability of every token drawn; it is called before temperature and top-p change the logits."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.latest_BV: Tensor | None = None

    def __call__(self, input_ids: Int[Tensor, "b s"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        self._settle(input_ids)
        first, self.latest_BV = self.latest_BV is None, scores.float().log_softmax(dim=-1)
        if first and self.latest_BV.isnan().any():  # once a batch: it waits for the device
            raise InputError("model: its logits are NaN after the prompt; check its weights and dtype")
        return scores

    def _settle(self, input_ids: Int[Tensor, "b s"]) -> None:
        # The last id is what was drawn from the latest logits.
        if self.latest_BV is not None:
            self.steps.append(self.latest_BV.gather(1, input_ids[:, -1:]))

    def finish(self, sequences: Int[Tensor, "b s"]) -> Float[Tensor, "b t"]:
        """Those of all steps; rows that had ended hold those of pads, which nobody reads."""
        self._settle(sequences)
        return torch.cat(self.steps, dim=1)


class _EnoughEnded(StoppingCriteria):
    """Ends each row at its EOS or when its room is used up, and the batch once few rows are open and much is left.

    Going on with the open rows apart costs reading them again; it pays while more than that may still be decoded for
    rows that have ended.
    """

    def __init__(self, rows: Sequence[Row], plan: Plan, width: int, device: torch.device) -> None:
        self.room_B = torch.tensor([plan.room(row) for row in rows], device=device)
        self.longest = max(map(plan.room, rows))
        self.eos_ids = torch.tensor(plan.eos_ids, device=device)
        self.open_B = torch.ones(len(rows), dtype=torch.bool, device=device)
        self.width = width
        self.few = len(rows) // 2 if len(rows) >= SPLIT_FROM else 0

    def __call__(self, input_ids: Int[Tensor, "b s"], _scores: object, **_: object) -> Bool[Tensor, " b"]:
        drawn = input_ids.shape[1] - self.width
        self.open_B &= ~torch.isin(input_ids[:, -1], self.eos_ids) & (drawn < self.room_B)
        pays = PREFILL_GAIN * (self.longest - drawn) >= input_ids.shape[1]
        return torch.ones_like(self.open_B) if pays and self.open_B.sum() <= self.few else ~self.open_B


@contextmanager
def _plain_defaults(model: PreTrainedModel) -> Iterator[None]:
    # `generate` fills whatever a configuration leaves open from the model's own one.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
