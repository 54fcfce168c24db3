"""Rewards: SAE features per token, verified outcomes, their sum, and how token rewards become advantages.

Nothing here knows of a trainer; `training` and `gates` import it, it imports `models`, `sae`, `features`, `verifiers`.
"""

from mechreward.reward.aggregation import Aggregation, pool
from mechreward.reward.composite import CompositeReward, Reward
from mechreward.reward.credit import Advantages, Credit, dense_advantages, token_credit
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.outcome import OutcomeReward

__all__ = [
    "Advantages",
    "Aggregation",
    "CompositeReward",
    "Credit",
    "FeatureReward",
    "OutcomeReward",
    "Reward",
    "dense_advantages",
    "pool",
    "token_credit",
]
