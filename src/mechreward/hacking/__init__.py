"""Guards beside every reward: a second opinion, canaries, a detector that watches training, and regularisers.

Pure parts: what they are told are tensors and texts. `training.guard` feeds them inside the trainer. May be imported by
steering, training and every room below; imports models, probes, reward, gates.
"""

from mechreward.hacking.actions import ACTIONS, Action, act_on_rollouts, neutral_rewards
from mechreward.hacking.canaries import PATTERNS, AdversarialPrompt, canaries_of
from mechreward.hacking.config import GuardConfig, Regularizers
from mechreward.hacking.detector import Finding, HackingDetector, HackingReport, RolloutBatch
from mechreward.hacking.dual import DualVerifier, Verdicts
from mechreward.hacking.reconstruction import row_fvu
from mechreward.hacking.redteam import RedTeam, red_team
from mechreward.hacking.regularization import (
    entropy_bonus,
    feature_diversity_bonus,
    kl_penalty,
    regularised,
    reward_variance_penalty,
)
from mechreward.hacking.suite import STANDARD_SUITE, AdversarialSuite, SuiteResult
from mechreward.hacking.text import repetition

__all__ = [
    "ACTIONS",
    "Action",
    "AdversarialPrompt",
    "AdversarialSuite",
    "DualVerifier",
    "Finding",
    "GuardConfig",
    "HackingDetector",
    "HackingReport",
    "PATTERNS",
    "RedTeam",
    "Regularizers",
    "RolloutBatch",
    "STANDARD_SUITE",
    "SuiteResult",
    "Verdicts",
    "act_on_rollouts",
    "canaries_of",
    "entropy_bonus",
    "feature_diversity_bonus",
    "kl_penalty",
    "neutral_rewards",
    "red_team",
    "regularised",
    "repetition",
    "reward_variance_penalty",
    "row_fvu",
]
