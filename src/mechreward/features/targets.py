"""What of a response is explained: logit or log-probability of a span of its tokens, and where its answer stands."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import LogitsBatch
from mechreward.rollout import Response


@dataclass(frozen=True)
class Target:
    """A number m read off a response's logits, for completion tokens `start` up to but not including `end`.

    Raises:
        InputError: if the span is empty, begins before the completion, or `token` is given for more than one place.
    """

    start: int
    end: int
    kind: Literal["logprob", "logit"] = "logprob"
    """Sum of log-probabilities, in nats, or sum of logits."""
    token: int | None = None
    """Token id that is explained in place of the one that stands there, such as the correct answer to a wrong one."""
    baseline: int | None = None
    """Token id whose value at each place is subtracted."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise InputError(f"target: tokens {self.start} to {self.end} are no span; give 0 <= start < end")
        if self.token is not None and self.end - self.start > 1:
            raise InputError(f"target: token is for one place, the span {self.start} to {self.end} has more")
        if self.kind not in ("logprob", "logit"):
            raise InputError(f"target: kind {self.kind!r} is not known; use logprob or logit")


def measure(batch: LogitsBatch, targets: Sequence[Target]) -> Float[Tensor, " b"]:
    """Each row's m, with gradient where the logits have one; targets in the batch's order."""
    return torch.stack([_measure_row(batch, row, target) for row, target in enumerate(targets)])


def check_targets(responses: Sequence[Response], targets: Sequence[Target], vocabulary: int) -> None:
    """Raises:
    InputError: if there are none, not one a response, or one reaches beyond its completion or the vocabulary.
    """
    if not responses or len(responses) != len(targets):
        raise InputError(f"targets: {len(targets)} for {len(responses)} responses; give one each, and at least one")
    for row, (response, target) in enumerate(zip(responses, targets, strict=True)):
        length = len(response.completion_ids)
        if target.end > length:
            raise InputError(
                f"target: tokens {target.start} to {target.end} are out of range in response {row}, which has {length}"
            )
        for token in (target.token, target.baseline):
            if token is not None and not 0 <= token < vocabulary:
                raise InputError(f"target: token {token} is out of range; the model knows 0 to {vocabulary - 1}")


def answer_target(tokenizer: PreTrainedTokenizerBase, response: Response) -> Target | None:
    """The logit of the answer that the verifier took from the response; None where its text is not found.

    Not its log-probability: of an answer that the model is sure of that has next to no gradient.

    The last place that spells `response.extracted` counts; tokens that hold any of its characters are in the span.
    """
    ids, answer = list(response.completion_ids), response.extracted
    if not answer:
        return None

    def length(n: int) -> int:
        return len(str(tokenizer.decode(ids[:n])))

    at = str(tokenizer.decode(ids)).rfind(answer)
    if at < 0:
        return None
    counts = range(len(ids) + 1)
    return Target(bisect_right(counts, at, key=length) - 1, bisect_left(counts, at + len(answer), key=length), "logit")


def _measure_row(batch: LogitsBatch, row: int, target: Target) -> Tensor:
    values_TV = batch.logits_BTV[row, target.start : target.end]
    if target.kind == "logprob":
        values_TV = values_TV.log_softmax(-1)
    ids_T = batch.ids_BT[row, target.start : target.end]
    if target.token is not None:
        ids_T = torch.full_like(ids_T, target.token)
    m = values_TV.gather(-1, ids_T[:, None]).sum()
    return m if target.baseline is None else m - values_TV[:, target.baseline].sum()
