"""Rewards: SAE features per token, verified outcomes, their sum, and how token rewards become advantages.

Nothing here knows of a trainer; `training` and `gates` import it, it imports `models`, `sae`, `features`, `verifiers`.
"""

from mechreward.features import step_ends
from mechreward.reward.aggregation import (
    Aggregation,
    LastKAggregation,
    MaxAggregation,
    MeanAggregation,
    PerTokenAggregation,
    StepEndAggregation,
    WeightedMeanAggregation,
    build_aggregation,
    pool,
)
from mechreward.reward.composite import CompositeReward, Reward
from mechreward.reward.credit import Advantages, Credit, dense_advantages, stage3_advantages, token_credit
from mechreward.reward.feature_reward import FeatureReward
from mechreward.reward.normalization import (
    MinMaxNormalization,
    NoopNormalization,
    Normalization,
    RankNormalization,
    SigmoidSquash,
    ZScoreNormalization,
    build_normalization,
)
from mechreward.reward.outcome import OutcomeReward
from mechreward.reward.schedule import (
    ConstantSchedule,
    CosineSchedule,
    LinearAnnealSchedule,
    StepSchedule,
    WeightSchedule,
)

__all__ = [
    "Advantages",
    "Aggregation",
    "CompositeReward",
    "ConstantSchedule",
    "CosineSchedule",
    "Credit",
    "FeatureReward",
    "LastKAggregation",
    "LinearAnnealSchedule",
    "MaxAggregation",
    "MeanAggregation",
    "MinMaxNormalization",
    "NoopNormalization",
    "Normalization",
    "OutcomeReward",
    "PerTokenAggregation",
    "RankNormalization",
    "Reward",
    "SigmoidSquash",
    "StepEndAggregation",
    "StepSchedule",
    "WeightSchedule",
    "WeightedMeanAggregation",
    "ZScoreNormalization",
    "build_aggregation",
    "build_normalization",
    "dense_advantages",
    "pool",
    "stage3_advantages",
    "step_ends",
    "token_credit",
]
