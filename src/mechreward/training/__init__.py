"""Training: GRPO with dense per-token rewards through TRL, its logs, and one resumable run of it; SFT, DPO and cDPO on
pairs of responses.

May be imported by integrations, report, pipeline and cli; imports models, features, reward, steering, tasks.
"""

from mechreward.training.dense import DenseConfig
from mechreward.training.finetune import FinetuneConfig, Method, finetune
from mechreward.training.grpo import MechRewardGRPOTrainer
from mechreward.training.logging import JsonlMetrics, RolloutRecorder, Rollouts
from mechreward.training.run import TrainConfig, last_checkpoint, train_arm

__all__ = [
    "DenseConfig",
    "FinetuneConfig",
    "JsonlMetrics",
    "MechRewardGRPOTrainer",
    "Method",
    "RolloutRecorder",
    "Rollouts",
    "TrainConfig",
    "finetune",
    "last_checkpoint",
    "train_arm",
]
