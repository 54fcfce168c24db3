"""TRL: a `trl.GRPOTrainer` with dense per-token rewards; it lives in `mechreward.training.grpo`."""

from mechreward.training.dense import DenseConfig
from mechreward.training.grpo import MechRewardGRPOTrainer

__all__ = ["DenseConfig", "MechRewardGRPOTrainer"]
