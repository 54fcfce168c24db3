"""What the trainer logs of its dense part: numbers by hand, and that all of them reach every place that is read."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from mechreward.files import read_jsonl
from mechreward.reward import Advantages, FeatureReward
from mechreward.training import DenseConfig, JsonlMetrics
from mechreward.training.metrics import component_metrics, dense_metrics, gap_metrics, numbered

EVERY_STEP = {
    "rewards/feature_reward/mean",
    "rewards/feature_reward/std",
    "rewards/scored/mean",
    "dense/advantage_rms",
    "dense/outcome_advantage_rms",
    "dense/share",
    "dense/zero_variance_groups",
    "dense/reader_seconds",
    "kl",
    "entropy",
    "completions/mean_length",
    "frac_reward_zero_std",
}
GAPS = {"dense/reader_gap", "dense/reader_gap_rms"}


class Reported(TrainerCallback):
    """Stands where wandb, trackio and tensorboard stand: what it is given is what they are."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def on_log(self, _args, state, _control, logs=None, **_) -> None:
        self.rows.append({"step": state.global_step, **logs})


def scored(completion_ids, **_) -> list[float]:
    return [len(ids) + ids[0] / 64 for ids in completion_ids]


def test_every_number_reaches_report_to_and_the_run_directory(
    tmp_path, model, sae, char_tokenizer, make, capsys
) -> None:
    reported = Reported()
    trainer = make(
        tmp_path,
        model,
        [FeatureReward({3: 1.0, 7: -0.5, 11: 2.0}, sae), scored],
        char_tokenizer,
        peft_config=LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
        config={"log_completions": True, "beta": 0.1, "learning_rate": 0.05},
        dense=DenseConfig(weight=0.4, gap_every=2),
        callbacks=[reported, JsonlMetrics(tmp_path / "metrics.jsonl", "dense", 0)],
    )
    trainer.train()
    steps = [row for row in reported.rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row.keys() >= EVERY_STEP
        assert row["dense/advantage_rms"] == pytest.approx(0.4 * row["dense/outcome_advantage_rms"], rel=1e-4)
        assert 0 < row["dense/share"] < 1 and row["dense/zero_variance_groups"] == 0
    assert steps[0].keys() >= GAPS and not GAPS & steps[1].keys()  # measured before steps 0, 2, 4, ...
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[1]["kl"] > 1e-6
    written = read_jsonl(tmp_path / "metrics.jsonl")
    for row, line in zip(steps, written, strict=True):
        assert {name: line[name] for name in EVERY_STEP} == {name: row[name] for name in EVERY_STEP}
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "completions").glob("*.parquet"))]
    assert [len(table) for table in tables] == [8, 8] and "scored" in tables[0].columns
    assert "scored" in capsys.readouterr().out


def test_component_by_hand(sae) -> None:
    reward_BT = torch.tensor([[1.0, 3.0], [5.0, 99.0], [7.0, 7.0]])
    mask_BT = torch.tensor([[True, True], [True, False], [False, False]])
    reward = FeatureReward({3: 1.0}, sae, name="mine")
    assert component_metrics(reward, "mine", reward_BT, mask_BT, None) == {
        "rewards/mine/mean": 3.5,
        "rewards/mine/std": 1.5,
    }
    assert component_metrics(reward, "mine", reward_BT, torch.zeros_like(mask_BT), None) == {}
    ends_BT = torch.tensor([[True, False], [False, True], [False, False]])
    at_ends = FeatureReward({3: 1.0}, sae, aggregation="step_end", name="mine")
    # A row's last token ends its last step: means of (1, 3) and of (5).
    assert component_metrics(at_ends, "mine", reward_BT, mask_BT, ends_BT)["rewards/mine/mean"] == 3.5


def test_rewards_of_one_name_are_numbered(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    assert numbered(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]
    rewards = [FeatureReward({3: 1.0}, sae), FeatureReward({3: -1.0}, sae), scored]
    trainer = make(tmp_path, model, rewards, char_tokenizer, dense=DenseConfig(gap_every=0))
    score(trainer)
    metrics = trainer._metrics["train"]
    [one], [other] = metrics["rewards/feature_reward/mean"], metrics["rewards/feature_reward_2/mean"]
    assert one == pytest.approx(-other) != 0


def test_dense_by_hand() -> None:
    dense_BT, total_BT = torch.tensor([[1.0, -1.0], [0.5, 0.0]]), torch.tensor([[2.0, 0.0], [-0.5, 1.0]])
    numbers = dense_metrics(Advantages(total_BT, dense_BT, outcome_rms=0.7, dense_rms=0.2, degenerate_share=0.5))
    assert numbers == {
        "dense/advantage_rms": 0.2,
        "dense/outcome_advantage_rms": 0.7,
        "dense/zero_variance_groups": 0.5,
        "dense/share": pytest.approx((2.0 - 0.25) / (4 + 0.25 + 1)),
    }
    nothing = torch.zeros(2, 2)
    assert dense_metrics(Advantages(nothing, nothing, 1.0, 0.0, 1.0))["dense/share"] == 0.0


def test_gap_by_hand() -> None:
    policy_BT, frozen_BT = torch.tensor([[3.0, 9.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    mask_BT = torch.tensor([[True, False], [True, False]])
    numbers = gap_metrics(policy_BT, frozen_BT, mask_BT)
    assert numbers == {"dense/reader_gap": 0.5, "dense/reader_gap_rms": pytest.approx((5 / 2) ** 0.5)}
    assert gap_metrics(policy_BT, frozen_BT, torch.zeros_like(mask_BT)) == {}
