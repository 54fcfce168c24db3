"""How dense rewards take part in GRPO: the options, and what the user passed split into dense and scalar parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainerState

from mechreward.errors import InputError
from mechreward.hacking import GuardConfig, Regularizers
from mechreward.reward import CompositeReward, Credit, FeatureReward, NoopNormalization, WeightSchedule
from mechreward.reward.credit import check_credit
from mechreward.reward.schedule import check_weight

logger = logging.getLogger(__name__)

DEFAULT_WEIGHT = 0.1
_STATE_KEY = "MechRewardDense"


@dataclass(frozen=True)
class DenseConfig:
    """Options of the dense part of `MechRewardGRPOTrainer`.

    Raises:
        InputError: naming the first field that is not allowed.
    """

    weight: float | WeightSchedule | None = None
    """Lambda: RMS of the dense advantage as a share of the outcome advantage's, one number or a schedule over the run's
    steps (`mechreward.reward.schedule`). None: the dense weights over the other weights where the user gave weights
    (`args.reward_weights`, or those of a CompositeReward that holds a FeatureReward), else 0.1, also where no other
    reward has a weight. With 0 the rewards are read and logged but do not train. For credit `stage3` it is the seed's
    raw lambda."""
    credit: Credit = "per_token"
    """How token rewards become credits, see `mechreward.reward.credit`."""
    gamma: float = 1.0
    """Discount of `return_to_go` and `potential`."""
    reader: Literal["policy", "frozen"] = "policy"
    """Which model's residual stream is read: the live policy, or the model as it was before training (LoRA adapters
    off; else a copy of the decoder up to the layer read)."""
    tap: bool = True
    """Score while TRL runs its own scoring pass, where it runs one and reads the same; off, always run a forward."""
    gap_every: int = 10
    """Steps between measurements of how far policy and frozen reader are apart, which costs a forward; 0 never
    measures, and spares the copy of the decoder that full fine-tuning needs for it."""
    step_end: str = "\n"
    """For credit `step`: a token whose text contains this ends a step."""
    sample_rollouts: int = 2
    """Completions a training step that `on_rollouts` gets, taken evenly over the batch."""
    read_batch_size: int = 32
    """Completions a reader forward."""
    fast_rollouts: bool = True
    """Decode with a faster cache than transformers' default where the user has chosen nothing: on CUDA a static one and
    a compiled step, elsewhere one with room to grow; see `mechreward.training.generation`."""

    guard: GuardConfig = field(default_factory=GuardConfig)
    """How the run is watched for reward hacking; `GuardConfig(on=False)` turns it off."""
    regularizers: Regularizers = field(default_factory=Regularizers)
    """What is added to the token rewards before credit; nothing by default."""

    def __post_init__(self) -> None:
        check_credit(self.credit, self.gamma)
        if self.weight is not None and not isinstance(self.weight, WeightSchedule):
            check_weight("weight", self.weight)
        if self.reader not in ("policy", "frozen"):
            raise InputError(f"reader: {self.reader!r} is not one of policy, frozen")
        if self.credit == "step" and not self.step_end:
            raise InputError("step_end: is empty; credit 'step' needs the text that ends a step")
        if self.gap_every < 0:
            raise InputError(f"gap_every: {self.gap_every} must be at least 0")
        if self.sample_rollouts < 0 or self.read_batch_size < 1:
            sizes = f"{self.sample_rollouts}, {self.read_batch_size}"
            raise InputError(f"sample_rollouts, read_batch_size: {sizes} must be at least 0 and 1")

    def weight_at(self, step: int, total_steps: int, implied: float) -> float:
        """Lambda after `step` of `total_steps` optimiser steps; `implied` (`RewardParts.share`) if none was given.

        Raises:
            InputError: if a schedule gives no number of 0 or more.
        """
        if isinstance(self.weight, WeightSchedule):
            weight = self.weight(step, total_steps)
            check_weight("weight", weight)
            return weight
        return implied if self.weight is None else self.weight


@dataclass(frozen=True)
class RewardParts:
    """Reward functions, dense ones apart from the scalar ones that TRL sums."""

    dense: list[FeatureReward]
    dense_weights: list[float]
    scalar: list[Any]
    scalar_weights: list[float]
    functions: int
    """How many reward functions there were."""
    scalar_from: list[int]
    """Of each scalar reward, which of the reward functions it came in."""
    share: float
    """The lambda that the weights imply."""
    unweighed: bool
    """Whether weights of dense rewards were given that imply none: no other reward has a weight."""

    def classes_of_scalar(self, classes: Sequence[Any]) -> list[Any] | None:
        """TRL's `reward_processing_classes` of the scalar rewards, from those of all; None if there are none.

        Raises:
            InputError: if there is not one for each reward function.
        """
        if len(classes) != self.functions:
            count = f"{len(classes)} for {self.functions} reward functions"
            raise InputError(f"reward_processing_classes: {count}; give one each")
        return [classes[place] for place in self.scalar_from] or None

    def check_share(self, weight: float | WeightSchedule | None) -> None:
        """Says so where lambda is left to weights that imply none."""
        if self.unweighed and weight is None:
            logger.warning(
                "reward_weights: no other reward has a weight, so those of dense rewards only weigh these against each "
                "other, and lambda is %s; set DenseConfig.weight to choose it",
                self.share,
            )


def load_outcome_rms(state: TrainerState) -> float:
    """RMS of the last outcome advantages that had a spread, from the trainer state; 1 at the start."""
    kept: Any = state.stateful_callbacks
    saved = kept.get(_STATE_KEY)
    return 1.0 if saved is None else float(saved["attributes"]["outcome_rms"])


def save_outcome_rms(state: TrainerState, outcome_rms: float) -> None:
    """Keeps the one number carried from batch to batch where every checkpoint keeps it: in the trainer state."""
    kept: Any = state.stateful_callbacks
    kept[_STATE_KEY] = {"args": {}, "attributes": {"outcome_rms": outcome_rms}}


def split_rewards(reward_funcs: Any, weights: Sequence[float] | None) -> RewardParts:
    """Takes FeatureRewards out of a reward, a list of them, or `sum` composites at any depth, weights multiplied in.

    Raises:
        InputError: lengths differ, a `bounded` or `stratified` composite holds a FeatureReward (a bound on whole
            completions has no meaning for token credit; the dense share is bounded by `DenseConfig.weight` instead),
            or a FeatureReward has a normalization (a statistic over trajectories says nothing of a token).
    """
    rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    rewards = [] if reward_funcs is None else rewards  # TRL's environments may pay all there is
    if weights is not None and len(weights) != len(rewards):
        raise InputError(f"reward_weights: {len(weights)} for {len(rewards)} reward functions; give one each")
    outer = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
    flat = [
        (*part, place)
        for place, (reward, weight) in enumerate(zip(rewards, outer, strict=True))
        for part in _flatten(reward, weight)
    ]
    dense = [(reward, weight) for reward, weight, _ in flat if isinstance(reward, FeatureReward)]
    scalar = [part for part in flat if not isinstance(part[0], FeatureReward)]
    for reward, _ in dense:
        if not isinstance(reward.normalization, NoopNormalization):
            raise InputError(
                f"{reward.name}: its normalization acts on whole completions and has no meaning for token rewards; "
                "use normalization 'noop' in this trainer"
            )
    given = bool(dense) and (weights is not None or any(map(_weighs_features, rewards)))
    against = sum(abs(weight) for _, weight, _ in scalar)
    return RewardParts(
        dense=[reward for reward, _ in dense],
        dense_weights=[weight for _, weight in dense],
        scalar=[reward for reward, _, _ in scalar],
        scalar_weights=[weight for _, weight, _ in scalar],
        functions=len(rewards),
        scalar_from=[place for _, _, place in scalar],
        share=sum(abs(weight) for _, weight in dense) / against if given and against else DEFAULT_WEIGHT,
        unweighed=given and not against,
    )


def _flatten(reward: Any, weight: float) -> list[tuple[Any, float]]:
    if not isinstance(reward, CompositeReward) or not _holds_features(reward):
        return [(reward, weight)]
    if reward.mode != "sum":
        raise InputError(
            f"{reward.name}: mode {reward.mode!r} has no meaning for token rewards; use mode 'sum' in this trainer"
        )
    parts = zip(reward.rewards, reward.weights, strict=True)
    return [part for inner, inner_weight in parts for part in _flatten(inner, weight * inner_weight)]


def _holds_features(reward: CompositeReward) -> bool:
    return any(
        isinstance(part, FeatureReward) or (isinstance(part, CompositeReward) and _holds_features(part))
        for part in reward.rewards
    )


def _weighs_features(reward: Any) -> bool:
    """Whether a composite with weights of its own holds a FeatureReward, at any depth."""
    if not isinstance(reward, CompositeReward) or not _holds_features(reward):
        return False
    return reward.weighted or any(map(_weighs_features, reward.rewards))


def no_outcome(prompts: list[Any], **_: Any) -> list[float]:
    """The scalar reward TRL asks for when all rewards are dense: 0, an advantage of 0."""
    return [0.0] * len(prompts)
