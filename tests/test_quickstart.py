"""The quickstart that this library promises, word for word but for the names of model, SAE, pack and data.

On a machine without a GPU TRL itself asks for `use_cpu`; that and a bound on length are put in front of the arguments.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

import mechreward
from mechreward.features import FeaturePack, PackFeature, sae_ref, save_pack
from mechreward.sae import load_sae, save_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER

QUICKSTART = """
import mechreward as mr
from trl import GRPOConfig, GRPOTrainer
# 1. Load the validated SAE
sae = mr.load_sae(
release="SAE",
sae_id="layer_2",
)
# 2. Build a feature reward from the validated pack
reward = mr.FeatureReward.from_pack(
"PACK",
sae=sae,
aggregation="per_token", # per-token dense
)
# 3. Combine with an outcome reward (math verifier)
composite = mr.CompositeReward(
rewards=[
reward,
mr.OutcomeReward(verifier=mr.verifiers.gsm8k_exact_match),
],
weights=[0.1, 1.0],
)
# 4. Plug into TRL GRPOTrainer (unchanged API)
trainer = GRPOTrainer(
model="MODEL",
args=GRPOConfig(output_dir="./out", num_generations=4, learning_rate=3e-6),
train_dataset=gsm8k_train,
reward_funcs=composite,
)
trainer.train()
"""
HERE = "use_cpu=True, bf16=False, report_to='none', max_completion_length=48"
DENSE = """
from mechreward.integrations.trl_grpo import MechRewardGRPOTrainer
trainer = MechRewardGRPOTrainer(
    model="MODEL",
    reward_funcs=[feature_reward, outcome_reward],
    train_dataset=gsm8k_train,
    args=GRPOConfig(output_dir="./out", num_generations=4, max_steps=1),
)
trainer.train()
"""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    sae = load_sae(SAE_FOLDER)
    save_sae(sae, tmp_path / "sae" / "layer_2")
    features = [PackFeature(id=i, weight=w, scale=2.0) for i, w in ((3, 1.0), (400, 1.0), (900, -1.0))]
    pack = FeaturePack(name="p", model_name=str(MODEL), sae=sae_ref(sae), features=features)
    save_pack(pack, tmp_path / "pack.json")
    return {"SAE": str(tmp_path / "sae"), "PACK": str(tmp_path / "pack.json"), "MODEL": str(MODEL)}


def written_with(code: str, names: dict[str, str]) -> str:
    for word, name in names.items():
        code = code.replace(f'"{word}"', json.dumps(name))
    return code.replace("GRPOConfig(output_dir", f"GRPOConfig({HERE}, output_dir")


def gsm8k_like(chat: bool = False) -> Dataset:
    questions = load_questions("tiny:easy", limit=2)
    prompts = [[{"role": "user", "content": q.prompt}] if chat else q.prompt for q in questions]
    return Dataset.from_dict({"prompt": prompts, "answer": [q.answer for q in questions]})


def test_the_quickstart_as_written(names: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    space: dict[str, object] = {"gsm8k_train": gsm8k_like()}
    with caplog.at_level(logging.WARNING, logger="mechreward"):
        exec(compile(written_with(QUICKSTART, names), "quickstart", "exec"), space)
    trainer = space["trainer"]
    logs = trainer.state.log_history  # type: ignore[attr-defined]
    assert trainer.state.global_step >= 1  # type: ignore[attr-defined]
    summary = next(row for row in logs if "train_runtime" in row)
    assert summary["train_loss"] == summary["train_loss"]
    # One warning, which names the trainer that pays per token; components are logged under their names.
    warned = [record.message for record in caplog.records if "MechRewardGRPOTrainer" in record.message]
    assert len(warned) == 1 and "aggregation 'per_token' in a plain trainer" in warned[0]
    reward = space["composite"]
    assert isinstance(reward, mechreward.CompositeReward)
    buffers = trainer._metrics["train"]  # type: ignore[attr-defined]
    seen = {key for row in logs for key in row} | set(buffers)
    assert {"composite_reward/feature_reward/mean", "composite_reward/outcome_reward/mean"} <= seen


def test_the_dense_trainer_as_written(names: dict[str, str]) -> None:
    from trl import GRPOConfig

    sae = mechreward.load_sae(names["SAE"], "layer_2")
    space: dict[str, object] = {
        "gsm8k_train": gsm8k_like(),
        "GRPOConfig": GRPOConfig,
        "feature_reward": mechreward.FeatureReward.from_pack(names["PACK"], sae=sae),
        "outcome_reward": mechreward.OutcomeReward(verifier=mechreward.verifiers.gsm8k_exact_match),
    }
    exec(compile(written_with(DENSE, names), "dense", "exec"), space)
    trainer = space["trainer"]
    seen = {key for row in trainer.state.log_history for key in row} | set(trainer._metrics["train"])  # type: ignore[attr-defined]
    assert {"rewards/feature_reward/mean", "rewards/outcome_reward/mean", "dense/share"} <= seen
