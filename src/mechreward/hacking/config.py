"""Options of the guards, as plain numbers that a run keeps with its settings."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mechreward.errors import InputError
from mechreward.hacking.actions import Action, check_action


@dataclass(frozen=True)
class Regularizers:
    """Weights of what is added to the token rewards before credit, in units of the feature reward; 0 adds nothing.

    Raises:
        InputError: for a negative or infinite weight.
    """

    kl: float = 0.0
    """Times `kl_penalty`, taken off: nats a token that the policy gives its token more than the reference does."""
    entropy: float = 0.0
    """Times `entropy_bonus`, added: nats of surprise of the policy at its own token."""
    diversity: float = 0.0
    """Times `feature_diversity_bonus`, added to every token: how evenly the pack's features share the activation."""
    variance: float = 0.0
    """Times `reward_variance_penalty`, taken off every token: variance of the token rewards within the completion."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise InputError(f"regularizers.{field.name}: {value} must be a finite number of at least 0")

    @property
    def any(self) -> bool:
        """Whether anything is added at all."""
        return any(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class GuardConfig:
    """How training is watched, and what is done about what is seen. An evaluation is one training batch.

    Raises:
        InputError: naming the first field that is not allowed.
    """

    on: bool = True
    """Off: nothing is measured, nothing acts."""
    action: Action = "zero"
    """What happens to flagged rollouts in their own step, see `hacking.actions`."""
    downweight_factor: float = 0.2
    """Of action `downweight`."""
    window: int = 3
    """Evaluations on either side of a comparison: the first so many are what later ones are compared with."""
    patience: int = 3
    """Evaluations with a finding in a row that stop the run; 0 never stops it."""
    reward_rise: float = 0.5
    """Divergence: a mean reward that rose by more than this, in standard deviations of the first rollouts' rewards,
    while accuracy has not."""
    flagged_share: float = 0.25
    """A finding: more than this share of a batch's rollouts flagged for one reason."""
    repetition: float = 0.5
    """A rollout is flagged if more than this share of its 4-grams came before, and more than in any first rollout."""
    entropy_floor: float = 0.2
    """Entropy collapse: below this share of the first entropy, while accuracy has not risen."""
    fvu_factor: float = 3.0
    """A rollout is off distribution if the SAE leaves more than this many times as much of its states unexplained as of
    the worst first rollout's."""
    drift: float = 1.0
    """A rollout is flagged if policy and frozen reader differ on it by more than this, in standard deviations of the
    first rollouts' rewards."""
    fvu_tokens: int = 8
    """Tokens of a rollout, evenly spaced, whose reconstruction is measured."""
    keep_every: int = 10
    """Steps between the copies of the policy among which the last good one is; 0 keeps none."""

    def __post_init__(self) -> None:
        check_action(self.action, self.downweight_factor)
        for name in ("window", "fvu_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"guard.{name}: {getattr(self, name)} must be at least 1")
        for name in ("patience", "keep_every"):
            if getattr(self, name) < 0:
                raise InputError(f"guard.{name}: {getattr(self, name)} must be at least 0")
        for name in ("reward_rise", "fvu_factor", "drift"):
            if not getattr(self, name) > 0:
                raise InputError(f"guard.{name}: {getattr(self, name)} must be above 0")
        for name in ("flagged_share", "repetition", "entropy_floor"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"guard.{name}: {getattr(self, name)} must be between 0 and 1")
