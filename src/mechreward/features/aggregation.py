"""From one number a token to one number a completion: the aggregations and their names.

All but `max` are weighted means over a row's unmasked tokens, sum_t w_t x_t / sum_t w_t, and differ in w alone, with
i = 0 ... n - 1 the rank of a token among the n unmasked ones of its row:

- `mean`, `per_token`: w = 1 (a dense reward is paid token by token; where one number is wanted it is the mean)
- `last`, `last_k`: w = 1 on the last 1 or k tokens (on all n if there are fewer), else 0
- `weighted_mean`: w = .1 + .9 i / (n - 1), a straight line from .1 to 1; 1 if n = 1
- `step_end`: w = 1 on each step's last token (`steps.last_of_steps`), else 0; the row's last ends the last step

`spec` is the one string that decides a pooling: packs keep it and hash it, `build_aggregation` reads it back. A row
without an unmasked token has no value: NaN, which the rewards turn into None, never into 0.

Deviation from the older library: its weights ran over the padded width, so that a short row among long ones was
weighted as if it ended early; these run over the row's own tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.steps import last_of_steps

DEFAULT_K = 16
DEFAULT_MARK = "\n"
NAMES = ("mean", "max", "last", "last_k", "weighted_mean", "step_end", "per_token")
FIRST_WEIGHT = 0.1
_LAST_N = re.compile(r"last_(\d+)|mean_last_(\d+)_tokens?")
_STEP_END = "step_end:"


@dataclass(frozen=True)
class Aggregation(ABC):
    """A weighted mean over the tokens of each row that count; the subclasses say which weights."""

    needs_steps: ClassVar[bool] = False
    """Whether `step_end_BT` is wanted; the others pay no attention to it."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The name that `build_aggregation` reads back, parameters included."""

    def counted(
        self, mask_BT: Bool[Tensor, "b t"], step_end_BT: Bool[Tensor, "b t"] | None = None
    ) -> Bool[Tensor, "b t"]:
        """The tokens that count: the unmasked ones, for `step_end` those of them that end a step.

        Raises:
            InputError: if `step_end_BT` is needed and not there.
        """
        if not self.needs_steps:
            return mask_BT
        if step_end_BT is None:
            raise InputError("step_end: this aggregation needs a mask of the tokens that end a step; see step_ends")
        return last_of_steps(mask_BT, step_end_BT)

    @abstractmethod
    def weights(self, counted_BT: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """w_BT, float32: 0 where nothing counts, and at least 1 in sum over a row in which something does."""

    def __call__(
        self,
        activations: Float[Tensor, "b t *f"],
        attention_mask: Shaped[Tensor, "b t"] | None = None,
        step_end_BT: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, " b *f"]:
        """Pools [B, T] to [B], or [B, T, F] to [B, F], in float32; NaN for a row without an unmasked token.

        Args:
            attention_mask: tokens that count; all of them if None.
            step_end_BT: tokens that end a step, for `step_end` alone; see `step_ends`.
        """
        if attention_mask is None:
            attention_mask = torch.ones(activations.shape[:2], dtype=torch.bool, device=activations.device)
        counted_BT = self.counted(attention_mask.bool(), step_end_BT)
        return self._pool(activations.float(), counted_BT)

    def _pool(self, values: Tensor, counted_BT: Tensor) -> Tensor:
        weight_BT = _like(self.weights(counted_BT), values)
        # What has no weight is cleared, not multiplied by it: 0 times NaN would be NaN.
        return (values.masked_fill(weight_BT == 0, 0.0) * weight_BT).sum(dim=1) / weight_BT.sum(dim=1)


@dataclass(frozen=True)
class MeanAggregation(Aggregation):
    """Mean over all unmasked tokens."""

    @property
    def spec(self) -> str:
        return "mean"

    def weights(self, counted_BT: Tensor) -> Tensor:
        return counted_BT.float()


@dataclass(frozen=True)
class PerTokenAggregation(MeanAggregation):
    """Token by token in `MechRewardGRPOTrainer`; the mean wherever one number a completion is wanted."""

    @property
    def spec(self) -> str:
        return "per_token"


@dataclass(frozen=True)
class StepEndAggregation(MeanAggregation):
    """Mean over the tokens that end a step: those whose text contains `mark`, or the last unmasked ones before."""

    mark: str = DEFAULT_MARK
    needs_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.mark:
            raise InputError("step_end: is empty; give the text that ends a step")

    @property
    def spec(self) -> str:
        return _STEP_END + self.mark


@dataclass(frozen=True)
class LastKAggregation(Aggregation):
    """Mean over the last `k` unmasked tokens, or over all where there are fewer; `k` = 1 is `last`."""

    k: int = DEFAULT_K

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k: {self.k} is not allowed; the last k tokens must be at least 1")

    @property
    def spec(self) -> str:
        return "last" if self.k == 1 else f"last_{self.k}"

    def weights(self, counted_BT: Tensor) -> Tensor:
        still_to_come_BT = counted_BT.flip(1).cumsum(dim=1).flip(1)  # the token itself among them
        return (counted_BT & (still_to_come_BT <= self.k)).float()


@dataclass(frozen=True)
class WeightedMeanAggregation(Aggregation):
    """Mean in which later tokens count more: weights on a straight line from .1 to 1."""

    @property
    def spec(self) -> str:
        return "weighted_mean"

    def weights(self, counted_BT: Tensor) -> Tensor:
        n_B1 = counted_BT.sum(dim=1, keepdim=True)
        from_end_BT = (n_B1 - counted_BT.cumsum(dim=1)) / (n_B1 - 1).clamp(min=1)
        return (1.0 - (1.0 - FIRST_WEIGHT) * from_end_BT).masked_fill(~counted_BT, 0.0)


@dataclass(frozen=True)
class MaxAggregation(Aggregation):
    """Largest value over unmasked tokens: the one that is no weighted mean. Its weights say which are compared."""

    @property
    def spec(self) -> str:
        return "max"

    def weights(self, counted_BT: Tensor) -> Tensor:
        return counted_BT.float()

    def _pool(self, values: Tensor, counted_BT: Tensor) -> Tensor:
        if values.shape[1] == 0:
            return values.new_full((len(values), *values.shape[2:]), torch.nan)
        highest = values.masked_fill(~_like(counted_BT, values), -torch.inf).amax(dim=1)
        return highest.masked_fill(_like(~counted_BT.any(dim=1), highest), torch.nan)


def build_aggregation(name: str | Aggregation, k: int | None = None, step_end: str | None = None) -> Aggregation:
    """The aggregation of this name or `spec`.

    Args:
        name: mean, max, last, last_k, weighted_mean, step_end, per_token; also `last_16` and `mean_last_16_tokens`, and
            `step_end:` with the text that ends a step. An aggregation is given back as it is.
        k: for `last_k` alone; 16 if None.
        step_end: for `step_end` alone, the text that ends a step; a line break if None.

    Raises:
        InputError: for another name, `k` < 1, an empty text, or a parameter that the name does not take.
    """
    if isinstance(name, Aggregation):
        return name
    if k is not None and name != "last_k" or step_end is not None and name != "step_end":
        given = f"k = {k}" if k is not None else f"step_end = {step_end!r}"
        raise InputError(f"aggregation: {name!r} takes no {given}; last_k takes k, step_end takes step_end")
    last_n = _LAST_N.fullmatch(name)
    if last_n:
        return LastKAggregation(int(last_n[1] or last_n[2]))
    if name.startswith(_STEP_END):
        return StepEndAggregation(name.removeprefix(_STEP_END))
    if name not in NAMES:
        raise InputError(f"aggregation: {name!r} is not one of {', '.join(NAMES)}")
    if name == "last_k":
        return LastKAggregation(DEFAULT_K if k is None else k)
    if name == "step_end":
        return StepEndAggregation(DEFAULT_MARK if step_end is None else step_end)
    return _PLAIN[name]


_PLAIN: dict[str, Aggregation] = {
    "mean": MeanAggregation(),
    "max": MaxAggregation(),
    "last": LastKAggregation(1),
    "weighted_mean": WeightedMeanAggregation(),
    "per_token": PerTokenAggregation(),
}


def pooling_spec(aggregation: Aggregation) -> str:
    """What a pack keeps of an aggregation: its spec, and `mean` for `per_token`, whose trajectory value is the mean."""
    return "mean" if isinstance(aggregation, PerTokenAggregation) else aggregation.spec


def _like(values: Tensor, other: Tensor) -> Tensor:
    """Adds trailing axes of one until there are as many as in `other`."""
    return values.view(*values.shape, *[1] * (other.ndim - values.ndim))
