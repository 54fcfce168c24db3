"""Trajectory rewards put on a common scale: over the rewards of one call, the missing ones left out.

Every function here is non-decreasing in the reward, so that within one call it changes sizes and never the order (a
clip may tie what was apart). Gate 1 judges order alone, so a normalisation is no part of a reward's `spec_hash`.

All but `noop` and `sigmoid` look at the whole batch, that is, at other prompts too. That is the older library's habit;
it has no meaning for token rewards, whose advantages are centred in their group and scaled once in `reward.credit`.

A reward that is not there is NaN: it has no say in any statistic and stays NaN.

Deviations from the older library: `rank` gives ties their mean rank, and .5 to a lone reward (it gave ties the order of
their rows, and 0); arithmetic is in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from mechreward.errors import InputError


@dataclass(frozen=True)
class Normalization(ABC):
    """A function of the rewards of one call; the subclasses say which."""

    def __call__(self, rewards: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """[B] to [B], in the rewards' own dtype; NaN where NaN."""
        result_B = torch.full_like(rewards, torch.nan)
        seen_B = ~rewards.isnan()
        if seen_B.any():
            result_B[seen_B] = self.of_seen(rewards[seen_B].double()).to(rewards.dtype)
        return result_B

    @abstractmethod
    def of_seen(self, rewards: Tensor) -> Tensor:
        """The same for rewards that are all there, at least one of them, in float64."""


@dataclass(frozen=True)
class NoopNormalization(Normalization):
    """The reward itself."""

    def of_seen(self, rewards: Tensor) -> Tensor:
        return rewards


@dataclass(frozen=True)
class ZScoreNormalization(Normalization):
    """(r - mean) / max(s, eps), s the population standard deviation, held within -clip ... clip unless that is None."""

    eps: float = 1e-6
    clip: float | None = 5.0

    def __post_init__(self) -> None:
        _check_positive("eps", self.eps)
        if self.clip is not None:
            _check_positive("clip", self.clip)

    def of_seen(self, rewards: Tensor) -> Tensor:
        scaled = (rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=self.eps)
        return scaled if self.clip is None else scaled.clamp(-self.clip, self.clip)


@dataclass(frozen=True)
class RankNormalization(Normalization):
    """Rank among n rewards, from 0 for the smallest to 1 for the largest, ties averaged; .5 if n = 1."""

    def of_seen(self, rewards: Tensor) -> Tensor:
        if len(rewards) == 1:
            return torch.full_like(rewards, 0.5)
        ranks = torch.as_tensor(rankdata(rewards.cpu().numpy(), method="average"), device=rewards.device)
        return (ranks - 1) / (len(rewards) - 1)


@dataclass(frozen=True)
class SigmoidSquash(Normalization):
    """1 / (1 + exp(-r / temperature)): reward by reward, whatever else is in the batch."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)

    def of_seen(self, rewards: Tensor) -> Tensor:
        return torch.sigmoid(rewards / self.temperature)


@dataclass(frozen=True)
class MinMaxNormalization(Normalization):
    """(r - min) / (max - min + eps), from 0 to just below 1."""

    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive("eps", self.eps)

    def of_seen(self, rewards: Tensor) -> Tensor:
        return (rewards - rewards.min()) / (rewards.max() - rewards.min() + self.eps)


def build_normalization(name: str | Normalization, **options: Any) -> Normalization:
    """The normalisation of this name: zscore (eps, clip), rank, sigmoid (temperature), minmax (eps), noop.

    `none` and `identity` are `noop`. A normalisation is given back as it is.

    Raises:
        InputError: for another name, an option that the name does not take, or one that is not positive.
    """
    if isinstance(name, Normalization):
        return name
    if name not in _KINDS:
        raise InputError(f"normalization: {name!r} is not one of zscore, rank, sigmoid, minmax, noop")
    kind = _KINDS[name]
    unknown = options.keys() - kind.__dataclass_fields__.keys()
    if unknown:
        raise InputError(f"normalization: {name!r} takes no {min(unknown)}")
    return kind(**options)


_KINDS: dict[str, type[Normalization]] = {
    "zscore": ZScoreNormalization,
    "rank": RankNormalization,
    "sigmoid": SigmoidSquash,
    "minmax": MinMaxNormalization,
    "noop": NoopNormalization,
    "none": NoopNormalization,
    "identity": NoopNormalization,
}


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name}: {value} is not allowed; it must be more than 0")
