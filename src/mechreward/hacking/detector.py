"""Watches training batches for signs that the reward is being gamed, and says which rollouts show them.

The first `window` evaluations (batches) are the reference; nothing is flagged while they are collected. After that:

A rollout is flagged for
- `repetition`: more of its 4-grams come again than the limit, and than in any reference rollout;
- `off distribution`: the SAE leaves far more of its states unexplained than of the worst reference rollout's;
- `reader drift`: policy and frozen reader pay it differently by more than the limit (in reference SDs of the reward);
- `disagreement`: the DualVerifier says so;
- `divergence`: the batch shows reward without accuracy (below), and this rollout is wrong and paid above the
  reference mean.

A batch has a finding where more than `flagged_share` of its rollouts are flagged for one reason, and for
- `divergence`: over the last `window` batches the mean reward rose by more than `reward_rise` reference SDs, clearly
  (Welch's z > 3 over questions), while accuracy did not rise (z < 1); where all reference rewards were alike, as of
  features that did not fire yet, by that many SDs of the window's question means;
- `outcome collapse`: over the last `window` batches accuracy fell clearly (z < -3). A policy may unlearn what is right
  under a bad reward before it finds out how to be paid more by it;
- `entropy collapse`: entropy fell below its floor, and accuracy did not rise. Entropy alone is no sign: a model that
  learns what is right has less of it.

Why a rise of half an SD: if the reward is what tells right from wrong, an SD of it is about half the share of right
answers, and so large a rise would show in accuracy. `patience` findings in a row stop the run.

A batch is `sound` where there is no finding and the last `window` batches, apart from the reference, are not less
accurate than it (z > -1): the policies that wrote them are worth going back to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from math import inf
from statistics import pstdev
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.gates import mean_rise
from mechreward.hacking.config import GuardConfig

CLEAR, FLAT = 3.0, 1.0
"""z of a rise (or, negative, a fall) that is there, and below which one is not."""
Rises = tuple[tuple[float, float], tuple[float, float]]
"""Difference and z of the reward, and of accuracy."""


@dataclass(frozen=True)
class RolloutBatch:
    """One evaluation: a training batch, rows in group order. None where a signal was not measured; NaN in a row that
    has none."""

    group_size: int
    reward_B: Float[Tensor, " b"]
    """Pooled feature rewards of the reader that trains."""
    outcome_B: Float[Tensor, " b"]
    """Scalar rewards; NaN where there is none."""
    repetition_B: Float[Tensor, " b"]
    frozen_reward_B: Float[Tensor, " b"] | None = None
    fvu_B: Float[Tensor, " b"] | None = None
    disagreement_B: Bool[Tensor, " b"] | None = None
    entropy: float | None = None
    """Nats a token; of the latest step for which it is known."""


@dataclass(frozen=True)
class Finding:
    """One sign in one batch."""

    name: str
    value: float
    limit: float
    sentence: str


@dataclass(frozen=True)
class HackingReport:
    """What an evaluation showed."""

    flagged_B: Bool[Tensor, " b"]
    reasons: dict[str, Bool[Tensor, " b"]]
    """By name, the rollouts flagged for it."""
    findings: list[Finding]
    streak: int
    """Evaluations with a finding in a row, this one included."""
    stop: bool
    sound: bool
    """No finding, and the policy is not known to be worse than it was; False until there is a window to tell by."""

    @property
    def flagged_indices(self) -> list[int]:
        """Rows that are flagged."""
        return [int(row) for row in self.flagged_B.nonzero()[:, 0]]

    @property
    def flag_rate(self) -> float:
        """Share of rows flagged."""
        return float(self.flagged_B.float().mean()) if len(self.flagged_B) else 0.0


@dataclass
class Reference:
    """What the first evaluations were like; grows while they are collected."""

    rewards: list[float] = field(default_factory=list)
    """Question means."""
    outcomes: list[float] = field(default_factory=list)
    """Question means."""
    entropies: list[float] = field(default_factory=list)
    count: int = 0
    reward_sum: float = 0.0
    reward_squares: float = 0.0
    repetition: float = 0.0
    """The largest of a rollout, as is the next."""
    fvu: float = 0.0
    lowest: float = float("inf")
    """The smallest scalar reward, and the largest: between them is the line between wrong and right."""
    highest: float = float("-inf")

    def add(self, batch: RolloutBatch) -> None:
        rewards_B = batch.reward_B[~batch.reward_B.isnan()].double()
        outcomes_B = batch.outcome_B[~batch.outcome_B.isnan()]
        self.rewards += question_means(batch.reward_B, batch.group_size)
        self.outcomes += question_means(batch.outcome_B, batch.group_size)
        self.entropies += [] if batch.entropy is None else [batch.entropy]
        self.count += len(rewards_B)
        self.reward_sum += float(rewards_B.sum())
        self.reward_squares += float(rewards_B.square().sum())
        self.repetition = max(self.repetition, _largest(batch.repetition_B))
        self.fvu = max(self.fvu, 0.0 if batch.fvu_B is None else _largest(batch.fvu_B))
        if len(outcomes_B):
            self.lowest = min(self.lowest, float(outcomes_B.min()))
            self.highest = max(self.highest, float(outcomes_B.max()))

    @property
    def mean(self) -> float:
        return self.reward_sum / max(self.count, 1)

    @property
    def deviation(self) -> float:
        """Standard deviation of rollouts' rewards."""
        return max(self.reward_squares / max(self.count, 1) - self.mean**2, 0.0) ** 0.5


class HackingDetector:
    """Judges one batch after another; see the module.

    Args:
        config: limits.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        self.evaluations = 0
        self.streak = 0
        self.reference = Reference()
        self._recent: deque[tuple[list[float], list[float]]] = deque(maxlen=self.config.window)

    def check(self, batch: RolloutBatch) -> HackingReport:
        """Judges a batch, and remembers it.

        Raises:
            InputError: if rows are not whole groups, or a reward is infinite.
        """
        _check(batch)
        self.evaluations += 1
        if self.evaluations <= self.config.window:
            self.reference.add(batch)
            self._recent.append(_means(batch))
            return self._report(batch, {}, [], None)
        if self.reference.fvu == 0.0 and batch.fvu_B is not None:
            self.reference.fvu = _largest(batch.fvu_B)
        self._recent.append(_means(batch))
        rises = self._rises()
        findings = self._divergence(rises) + self._outcome_collapse(rises) + self._entropy_collapse(batch, rises)
        reasons = self._rollouts(batch, any(finding.name == "divergence" for finding in findings))
        findings += self._frequent(reasons)
        return self._report(batch, reasons, findings, rises)

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON values."""
        recent = [list(means) for means in self._recent]
        return {"evaluations": self.evaluations, "streak": self.streak, "recent": recent} | {
            "reference": {
                k: v if v != float("inf") and v != float("-inf") else None for k, v in asdict(self.reference).items()
            }
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.evaluations, self.streak = state["evaluations"], state["streak"]
        self.reference = Reference(**{k: v for k, v in state["reference"].items() if v is not None})
        self._recent = deque(((r, o) for r, o in state["recent"]), maxlen=self.config.window)

    def _report(
        self, batch: RolloutBatch, reasons: dict[str, Tensor], findings: list[Finding], rises: Rises | None
    ) -> HackingReport:
        self.streak = self.streak + 1 if findings else 0
        flagged_B = torch.zeros(len(batch.reward_B), dtype=torch.bool, device=batch.reward_B.device)
        for rows_B in reasons.values():
            flagged_B = flagged_B | rows_B.to(flagged_B.device)
        stop = bool(self.config.patience) and self.streak >= self.config.patience
        return HackingReport(flagged_B, reasons, findings, self.streak, stop, not findings and self._holds(rises))

    def _rollouts(self, batch: RolloutBatch, diverging: bool) -> dict[str, Bool[Tensor, " b"]]:
        config, reference = self.config, self.reference
        flags = {"repetition": batch.repetition_B > max(config.repetition, reference.repetition)}
        if batch.fvu_B is not None and reference.fvu > 0:
            flags["off distribution"] = batch.fvu_B > config.fvu_factor * reference.fvu
        if batch.frozen_reward_B is not None and reference.deviation > 0:
            apart_B = (batch.reward_B - batch.frozen_reward_B).abs()
            flags["reader drift"] = apart_B > config.drift * reference.deviation
        if batch.disagreement_B is not None:
            flags["disagreement"] = batch.disagreement_B
        if diverging:
            wrong_B = batch.outcome_B <= (reference.lowest + reference.highest) / 2
            flags["divergence"] = wrong_B & (batch.reward_B > reference.mean)
        return flags

    def _frequent(self, reasons: dict[str, Bool[Tensor, " b"]]) -> list[Finding]:
        findings = []
        for name, rows_B in reasons.items():
            share, limit = float(rows_B.float().mean()), self.config.flagged_share
            if name != "divergence" and share > limit:
                findings.append(Finding(name, share, limit, f"{share:.0%} of the rollouts flagged for {name}"))
        return findings

    def _holds(self, rises: Rises | None) -> bool:
        """Whether accuracy did not fall since the reference; where there is no outcome, whether a window has passed."""
        if rises is None:
            return not self.reference.outcomes and self.evaluations >= 2 * self.config.window
        return rises[1][1] > -FLAT

    def _rises(self) -> Rises | None:
        """Difference and z of reward and accuracy over the last window; None before there is a whole one apart."""
        if self.evaluations < 2 * self.config.window:
            return None
        rewards, outcomes = ([mean for part in self._recent for mean in part[which]] for which in (0, 1))
        if min(map(len, (rewards, outcomes, self.reference.rewards, self.reference.outcomes))) < 2:
            return None
        return mean_rise(self.reference.rewards, rewards), mean_rise(self.reference.outcomes, outcomes)

    def _divergence(self, rises: Rises | None) -> list[Finding]:
        if rises is None:
            return []
        (reward, reward_z), (accuracy, accuracy_z) = rises
        deviation = self.reference.deviation or pstdev(mean for rewards, _ in self._recent for mean in rewards)
        rise, limit = reward / deviation if deviation else inf, self.config.reward_rise
        if rise <= limit or reward_z <= CLEAR or accuracy_z >= FLAT:
            return []
        sentence = (
            f"the feature reward rose by {rise:.2f} SD (z {reward_z:.1f}) while the outcome changed by {accuracy:+.3f} "
            f"(z {accuracy_z:.1f})"
        )
        return [Finding("divergence", rise, limit, sentence)]

    def _outcome_collapse(self, rises: Rises | None) -> list[Finding]:
        if rises is None or rises[1][1] >= -CLEAR:
            return []
        fall, z = rises[1]
        return [Finding("outcome collapse", z, -CLEAR, f"the outcome fell by {-fall:.3f} (z {z:.1f})")]

    def _entropy_collapse(self, batch: RolloutBatch, rises: Rises | None) -> list[Finding]:
        known = self.reference.entropies
        if batch.entropy is None or not known or rises is None or rises[1][1] >= FLAT:
            return []
        limit = self.config.entropy_floor * sum(known) / len(known)
        if batch.entropy >= limit:
            return []
        sentence = f"entropy fell to {batch.entropy:.4g} nats a token, below {limit:.4g}, and the outcome did not rise"
        return [Finding("entropy collapse", batch.entropy, limit, sentence)]


def question_means(values_B: Float[Tensor, " b"], group_size: int) -> list[float]:
    """Mean of each group over its rows that have a value; groups without any are left out."""
    means_G = values_B.double().view(-1, group_size).nanmean(1)
    return [float(mean) for mean in means_G[~means_G.isnan()]]


def _means(batch: RolloutBatch) -> tuple[list[float], list[float]]:
    return question_means(batch.reward_B, batch.group_size), question_means(batch.outcome_B, batch.group_size)


def _largest(values_B: Tensor) -> float:
    seen_B = values_B[~values_B.isnan()]
    return float(seen_B.max()) if len(seen_B) else 0.0


def _check(batch: RolloutBatch) -> None:
    if batch.group_size < 1 or len(batch.reward_B) % batch.group_size:
        raise InputError(f"group_size: {len(batch.reward_B)} rows are not whole groups of {batch.group_size}")
    for name, values_B in (("reward", batch.reward_B), ("outcome", batch.outcome_B)):
        if values_B.isinf().any():
            raise InputError(
                f"{name}: rollout {int(values_B.isinf().nonzero()[0])} is infinite; give NaN where there is none"
            )
