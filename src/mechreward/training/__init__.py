"""Training: GRPO with dense per-token rewards through TRL, its logs, and one resumable run of it.

May be imported by integrations, report, pipeline and cli; imports models, features, reward, tasks.
"""

from mechreward.training.dense import DenseConfig
from mechreward.training.grpo import MechRewardGRPOTrainer
from mechreward.training.logging import JsonlMetrics, RolloutRecorder, Rollouts
from mechreward.training.run import TrainConfig, last_checkpoint, train_arm

__all__ = [
    "DenseConfig",
    "JsonlMetrics",
    "MechRewardGRPOTrainer",
    "RolloutRecorder",
    "Rollouts",
    "TrainConfig",
    "last_checkpoint",
    "train_arm",
]
