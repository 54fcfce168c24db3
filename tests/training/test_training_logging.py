"""metrics.jsonl and rollouts.parquet: what is written, what a resumed run drops, what a kill leaves."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from mechreward.errors import InputError
from mechreward.files import read_jsonl
from mechreward.training import JsonlMetrics, RolloutRecorder, Rollouts
from mechreward.training.logging import EveryStep, preserved_rng


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def at(step: int) -> TrainerState:
    return TrainerState(global_step=step)


def rollouts(step: int, reward: float) -> Rollouts:
    chat = [{"role": "assistant", "content": "4"}]
    return Rollouts(
        step,
        ["q", "r"],
        ["2+2=", "p"],
        ["4", chat],
        [["4", "."], ["4"]],
        [[reward, 0.5], [0.0]],
        [1.0, None],
        [reward, math.nan],
    )


def test_one_row_a_training_step(tmp_path, args) -> None:
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl", "dense", 3)
    control = TrainerControl()
    metrics.on_train_begin(args, at(0), control)
    metrics.on_log(args, at(1), control, logs={"loss": 0.25, "reward": None, "kl": math.nan, "note": "text"})
    metrics.on_log(args, at(1), control, logs={"eval_reward": 1.0})
    metrics.on_log(args, at(1), control, logs={"train_runtime": 1.0, "train_loss": 0.2})
    row = {"arm": "dense", "seed": 3, "step": 1, "kind": "train", "loss": 0.25, "reward": None, "kl": None}
    assert read_jsonl(metrics.path) == [row]


def test_resuming_drops_its_own_later_rows_and_a_torn_line(tmp_path, args) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"arm": arm, "seed": seed, "step": step} for arm, seed in (("a", 0), ("a", 1), ("b", 0)) for step in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"arm": "a", "se')
    JsonlMetrics(path, "a", 1).on_train_begin(args, at(1), TrainerControl())
    assert read_jsonl(path) == [row for row in rows if (row["arm"], row["seed"]) != ("a", 1) or row["step"] == 1]
    assert path.read_text().endswith("\n")


def test_a_broken_line_in_the_middle_is_an_error(tmp_path) -> None:
    (tmp_path / "m.jsonl").write_text('{"a": 1\n{"a": 2}\n')
    with pytest.raises(InputError, match="holds a line that is not JSON"):
        read_jsonl(tmp_path / "m.jsonl")
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_rollouts_are_written_before_a_checkpoint_and_resumed(tmp_path, args) -> None:
    path = tmp_path / "rollouts.parquet"
    other = RolloutRecorder(path, "outcome", 0)
    other(rollouts(9, 7.0))
    other.on_train_end(args, at(9), TrainerControl())
    recorder = RolloutRecorder(path, "dense", 0)
    recorder.on_train_begin(args, at(0), TrainerControl())
    for step in (1, 2, 3):
        recorder(rollouts(step, float(step)))
        recorder.on_step_end(args, at(step), TrainerControl(should_save=step == 2))
    assert len(pd.read_parquet(path)) == 6  # the third step is not on disk: killed here
    again = RolloutRecorder(path, "dense", 0)
    again.on_train_begin(args, at(1), TrainerControl())
    again(rollouts(2, 20.0))
    again.on_train_end(args, at(2), TrainerControl())
    frame = pd.read_parquet(path)
    assert frame[["arm", "step"]].values.tolist() == [["outcome", 9]] * 2 + [["dense", 1]] * 2 + [["dense", 2]] * 2
    row = frame.iloc[4]
    assert list(row["tokens"]) == ["4", "."] and list(row["token_rewards"]) == [20.0, 0.5]
    assert (row["outcome"], row["feature_reward"], row["question_id"], row["prompt"]) == (1.0, 20.0, "q", "2+2=")
    assert frame["completion"].tolist()[5] == "4" and frame["outcome"].isna().tolist()[5]


def test_every_step_leaves_the_random_states_alone(args) -> None:
    calls = []

    def draw(step: int) -> None:
        calls.append((step, random.random(), np.random.rand(), torch.rand(1).item()))

    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    callback = EveryStep(2, draw)
    for step in range(1, 6):
        callback.on_step_end(args, at(step), TrainerControl())
    assert [call[0] for call in calls] == [2, 4] and states() == before
    with preserved_rng():
        torch.rand(3)
    assert states() == before
