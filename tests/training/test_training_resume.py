"""MechRewardGRPOTrainer by itself: killed and resumed from TRL's checkpoint, it ends with the very same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from mechreward.reward import CosineSchedule, FeatureReward, LinearAnnealSchedule
from mechreward.training import DenseConfig
from mechreward.training.dense import load_outcome_rms

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0}
LORA = LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
PROMPTS = [f"{i}+{i}=" for i in range(8)]  # one epoch in four steps
FALLING = LinearAnnealSchedule(0.8, 0.1)


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, _args, state, _control, **_) -> None:
        if state.global_step == 3:
            raise Killed


def early_outcome(completion_ids, trainer_state, **_) -> list[float]:
    """Tells completions apart in the first two steps only: later the RMS has to be carried over the checkpoint."""
    if trainer_state.global_step >= 2:
        return [1.0] * len(completion_ids)
    return [ids[0] % 2 + 0.1 * (ids[-1] % 5) for ids in completion_ids]


CASES = {
    "schedule and return to go": ({}, None, DenseConfig(weight=FALLING, credit="return_to_go", gamma=0.9)),
    "frozen copy": ({}, None, DenseConfig(weight=CosineSchedule(0.5, 0.2), reader="frozen", credit="potential")),
    "frozen, tapped reference, lora": ({"beta": 0.1}, LORA, DenseConfig(weight=FALLING, reader="frozen", gap_every=2)),
    "two iterations": ({"num_iterations": 2}, None, DenseConfig(weight=FALLING)),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_never_killed(case, tmp_path, model, sae, char_tokenizer, make) -> None:
    config, peft_config, dense = CASES[case]
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **config}

    def build(folder, callbacks=()):
        return make(
            tmp_path / folder,
            copy.deepcopy(model),
            [FeatureReward(WEIGHTS, sae), early_outcome],
            char_tokenizer,
            peft_config=copy.deepcopy(peft_config),
            config=options,
            prompts=PROMPTS,
            dense=dense,
            callbacks=list(callbacks),
        )

    straight = build("whole")
    straight.train()
    with pytest.raises(Killed):
        build("broken", [Kill()]).train()
    resumed = build("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert resumed.state.global_step == straight.state.global_step == 4
    for (name, whole), again in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(whole, again), name
    start = dict(model.named_parameters())
    learnt = [n for n, p in straight.model.named_parameters() if n not in start or not torch.equal(p, start[n])]
    assert learnt
    assert load_outcome_rms(resumed.state) == load_outcome_rms(straight.state) != 1.0
    kept = ("dense/advantage_rms", "dense/share", "dense/outcome_advantage_rms", "dense/reader_gap", "loss")
    rows = [
        [{k: row.get(k) for k in kept} for row in t.state.log_history if "loss" in row] for t in (straight, resumed)
    ]
    assert rows[0] == rows[1] and len({row["dense/advantage_rms"] for row in rows[0]}) > 1


def test_a_trainer_that_goes_back_forgets_what_came_after(tmp_path, model, sae, char_tokenizer, make) -> None:
    config = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), early_outcome], char_tokenizer, config=config)
    trainer.train()
    assert trainer.guard.detector.evaluations == 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.guard.detector.evaluations == 3, "one before the checkpoint and two after it"
