"""Several rewards as one trajectory reward, for a plain `trl.GRPOTrainer`.

`sum` adds weighted components. `bounded` keeps outcomes in charge: with gap g = weight * (true - false) of the outcome
reward and d the weighted sum of the other components,

    R = outcome + 0.98 * (g / 2) * d / (g / 2 + |d|)

so what is added stays strictly within half the gap: small d pass almost unchanged (slope .98 at 0), and no wrong
answer can ever outrank a right one (the aim of HERO's strata, without their batch statistics).

A component that is None for a sample makes the whole None for that sample: nothing is counted as 0 that was not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from mechreward.errors import InputError
from mechreward.reward.batch import Text, check_lengths
from mechreward.reward.outcome import OutcomeReward

Reward = Callable[..., list[float | None]]
_SHARE = 0.98


class CompositeReward:
    """A weighted combination of rewards, called like any one of them.

    Args:
        rewards: callables `(prompts, completions, **columns) -> list[float | None]`.
        weights: one a reward; 1 each if None.
        mode: `sum`, or `bounded` (see the module), which needs exactly one OutcomeReward among `rewards`.
        name: how trainers log it.

    Raises:
        InputError: no rewards, lengths that differ, unknown mode, or `bounded` without its one outcome reward.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        mode: str = "sum",
        name: str = "composite_reward",
    ) -> None:
        if not rewards:
            raise InputError("rewards: the list is empty; at least one reward is needed")
        if weights is not None and len(weights) != len(rewards):
            raise InputError(f"weights: {len(weights)} for {len(rewards)} rewards; one weight a reward is needed")
        if mode not in ("sum", "bounded"):
            raise InputError(f"mode: {mode!r} is not one of sum, bounded")
        self.rewards = list(rewards)
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        self.weighted = weights is not None
        self.mode = mode
        self.name = self.__name__ = name
        self._outcome, self._gap = self._find_outcome() if mode == "bounded" else (-1, 0.0)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """One reward a completion. Component means go to TRL's `log_metric` where there is one.

        Raises:
            InputError: if a component returns another number of rewards than there are completions.
        """
        check_lengths(prompts, completions)
        parts = [self._component(reward, prompts, completions, columns) for reward in self.rewards]
        return [self._combine(values) for values in zip(*parts, strict=True)]

    def _component(
        self, reward: Reward, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]
    ) -> list[float | None]:
        values = reward(prompts=prompts, completions=completions, **columns)
        name = reward_name(reward)
        if len(values) != len(completions):
            raise InputError(f"{name}: returned {len(values)} rewards for {len(completions)} completions")
        values = [None if value is None or math.isnan(value) else float(value) for value in values]
        seen = [value for value in values if value is not None]
        if "log_metric" in columns and seen:
            columns["log_metric"](f"{self.name}/{name}/mean", sum(seen) / len(seen))
        return values

    def _combine(self, values: Sequence[float | None]) -> float | None:
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        if len(weighted) < len(values):
            return None
        if self.mode == "sum":
            return sum(weighted)
        outcome = weighted.pop(self._outcome)
        return outcome + bounded(sum(weighted), self._gap)

    def _find_outcome(self) -> tuple[int, float]:
        found = [i for i, reward in enumerate(self.rewards) if isinstance(reward, OutcomeReward)]
        if len(found) != 1:
            raise InputError(f"rewards: mode 'bounded' needs exactly one OutcomeReward, there are {len(found)}")
        reward = self.rewards[found[0]]
        assert isinstance(reward, OutcomeReward)
        gap = self.weights[found[0]] * (reward.true_reward - reward.false_reward)
        if gap <= 0:
            raise InputError(f"weights: right is worth {gap} more than wrong; mode 'bounded' needs more than 0")
        return found[0], gap


def bounded(dense: float, gap: float) -> float:
    """Squashes any number, infinities too, into the open interval (-gap / 2, gap / 2), monotonically."""
    half = gap / 2
    if math.isinf(dense):
        return math.copysign(_SHARE * half, dense)
    return _SHARE * half * (dense / (half + abs(dense)))


def reward_name(reward: Any) -> str:
    """The name TRL would log: `__name__`, or the class's for a callable object without one."""
    try:
        return str(reward.__name__)
    except AttributeError:
        return type(reward).__name__
