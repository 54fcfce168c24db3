"""Several rewards as one trajectory reward, for a plain `trl.GRPOTrainer`.

`sum` adds weighted components. `bounded` keeps outcomes in charge: with gap g = weight * (true - false) of the outcome
reward and d the weighted sum of the other components,

    R = outcome + 0.98 * (g / 2) * d / (g / 2 + |d|)

so what is added stays strictly within half the gap: small d pass almost unchanged (slope .98 at 0), and no wrong
answer can ever outrank a right one (the aim of HERO's strata, without their batch statistics). `stratified` is HERO
itself: d is min-max bounded among the completions of the same prompt with the same outcome, see `reward.strata`.

A component that is None for a sample makes the whole None for that sample: nothing is counted as 0 that was not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mechreward.errors import InputError
from mechreward.reward.batch import Text, check_lengths, is_async
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward
from mechreward.reward.strata import check_bounds, stratified

Reward = Callable[..., list[float | None]]
MODES = ("sum", "bounded", "stratified")
_SHARE = 0.98


@runtime_checkable
class Bindable(Protocol):
    """A reward that a model reads for."""

    def bind(self, model: Any, tokenizer: Any, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> Any:
        """See `FeatureReward.bind`."""


class CompositeReward:
    """A weighted combination of rewards, called like any one of them.

    Args:
        rewards: callables `(prompts, completions, **columns) -> list[float | None]`.
        weights: one a reward; 1 each if None.
        mode: `sum`, `bounded` or `stratified` (see the module); the last two need exactly one OutcomeReward among
            `rewards`, of a weight that makes right worth more than wrong.
        name: how trainers log it.
        alpha: `stratified`: half the width of the wrong answers' rewards, as a share of what right is worth more.
        beta: `stratified`: the same for the right answers' rewards. In sum they are less than 1.
        num_generations: `stratified`: completions a prompt, in consecutive rows. None takes each run of equal prompts
            as one group, which joins two groups if the same prompt comes twice in a row.

    Raises:
        InputError: no rewards, lengths that differ, a weight that is not finite, unknown mode, bounds that overlap, or
            a mode without its one outcome reward.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        mode: str = "sum",
        name: str = "composite_reward",
        *,
        alpha: float = 0.05,
        beta: float = 0.05,
        num_generations: int | None = None,
    ) -> None:
        if not rewards:
            raise InputError("rewards: the list is empty; at least one reward is needed")
        if weights is not None and len(weights) != len(rewards):
            raise InputError(f"weights: {len(weights)} for {len(rewards)} rewards; one weight a reward is needed")
        if mode not in MODES:
            raise InputError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
        check_bounds(alpha, beta, num_generations)
        self.rewards = list(rewards)
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        if not all(map(math.isfinite, self.weights)):
            raise InputError(f"weights: {self.weights} are not allowed; each must be a finite number")
        self.weighted = weights is not None
        self.mode = mode
        self.name = self.__name__ = name
        self._bounds, self._num_generations = (alpha, beta), num_generations
        self._outcome, self._levels = (-1, (0.0, 0.0)) if mode == "sum" else self._find_outcome()

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """One reward a completion. Component means go to TRL's `log_metric` where there is one.

        Raises:
            InputError: if a component is asynchronous, or returns another number of rewards than there are completions.
        """
        check_lengths(prompts, completions)
        self._bind_own_models()
        parts = [self._component(reward, prompts, completions, columns) for reward in self.rewards]
        if self.mode == "sum":
            return _weighted_sums(parts, self.weights)
        weight = self.weights[self._outcome]
        outcomes = [None if value is None else weight * value for value in parts.pop(self._outcome)]
        dense = _weighted_sums(parts, [w for i, w in enumerate(self.weights) if i != self._outcome], len(outcomes))
        if self.mode == "stratified":
            return stratified(outcomes, dense, prompts, self._levels, self._bounds, self._num_generations)
        gap = self._levels[1] - self._levels[0]
        return [None if o is None or d is None else o + bounded(d, gap) for o, d in zip(outcomes, dense, strict=True)]

    def bind(
        self, model: Any, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> CompositeReward:
        """Gives every component that has a `bind` one and the same model; see `FeatureReward.bind`."""
        for reward in self.rewards:
            if isinstance(reward, Bindable):
                reward.bind(model, tokenizer, chat_template_kwargs=chat_template_kwargs)
        return self

    def _bind_own_models(self) -> None:
        """Features of one model that none is bound to yet share one copy of it."""
        waiting = [r for r in self.rewards if isinstance(r, FeatureReward) and not r.bound and r.pack.model_name]
        models: dict[str, Any] = {}
        for reward in waiting:
            name = reward.pack.model_name
            if name not in models:
                models[name] = reward.own_model("reward")
            reward.bind(*models[name])

    def _component(
        self, reward: Reward, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]
    ) -> list[float | None]:
        name = reward_name(reward)
        if is_async(reward):
            raise InputError(f"{name}: is asynchronous; give it to the trainer beside {self.name}, which calls in turn")
        values = reward(prompts=prompts, completions=completions, **columns)
        if len(values) != len(completions):
            raise InputError(f"{name}: returned {len(values)} rewards for {len(completions)} completions")
        values = [None if value is None or math.isnan(value) else float(value) for value in values]
        seen = [value for value in values if value is not None]
        if "log_metric" in columns and seen:
            columns["log_metric"](f"{self.name}/{name}/mean", sum(seen) / len(seen))
        return values

    def _find_outcome(self) -> tuple[int, tuple[float, float]]:
        """Place of the outcome reward, and what wrong and right are worth with its weight."""
        found = [(i, reward) for i, reward in enumerate(self.rewards) if isinstance(reward, OutcomeReward)]
        if len(found) != 1:
            raise InputError(f"rewards: mode {self.mode!r} needs exactly one OutcomeReward, there are {len(found)}")
        place, reward = found[0]
        low, high = (self.weights[place] * value for value in (reward.false_reward, reward.true_reward))
        if not high > low:
            raise InputError(
                f"weights: right is worth {high - low} more than wrong; mode {self.mode!r} needs more than 0"
            )
        return place, (low, high)


def _weighted_sums(parts: Sequence[Sequence[float | None]], weights: Sequence[float], n: int = 0) -> list[float | None]:
    """The weighted sum a row over the components, None where one is; `n` zeros if there is no component."""
    rows = list(zip(*parts, strict=True)) if parts else [()] * n
    return [_weighted_sum(row, weights) for row in rows]


def _weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    seen = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(seen, 0.0) if len(seen) == len(values) else None


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
