"""The seed's import path leads to the one trainer there is."""

from __future__ import annotations

from trl import GRPOTrainer

from mechreward.integrations.trl_grpo import DenseConfig, MechRewardGRPOTrainer
from mechreward.training import dense, grpo


def test_the_seeds_path_is_the_same_class_and_a_real_subclass() -> None:
    assert MechRewardGRPOTrainer is grpo.MechRewardGRPOTrainer and DenseConfig is dense.DenseConfig
    assert issubclass(MechRewardGRPOTrainer, GRPOTrainer)
    overridden = set(vars(MechRewardGRPOTrainer)) & set(vars(GRPOTrainer)) - {"__module__", "__doc__", "__init__"}
    assert {name for name in overridden if callable(getattr(GRPOTrainer, name))} == {
        "_calculate_rewards",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "_get_per_token_logps_and_entropies",
    }
