# ruff: noqa: ARG002 (transformers names the arguments of a callback; not all are used)
"""What a training run leaves behind: a line of metrics a step, and a sample of rollouts with their token rewards.

Both files may be shared by several runs (arms, seeds). A run that resumes from the checkpoint of step s first drops its
own rows beyond s, so that a killed and resumed run leaves the rows of one that was never killed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mechreward.files import atomic_path, read_jsonl
from mechreward.reward.batch import Text
from mechreward.verifiers import as_text

ROLLOUT_COLUMNS = [
    "arm", "seed", "step", "question_id", "prompt", "completion", "tokens", "token_rewards", "outcome",
    "feature_reward",
]  # fmt: skip


@dataclass(frozen=True)
class Rollouts:
    """A sample of one training generation; every list has one entry a completion."""

    step: int
    """The optimiser step these completions train (1 is the first)."""
    question_ids: list[str]
    prompts: list[Text]
    completions: list[Text]
    tokens: list[list[str]]
    token_rewards: list[list[float]]
    """In raw units, before any centring or scaling; 0 for tokens without one."""
    outcomes: list[float | None]
    """Weighted sum of the scalar rewards; None if there are none."""
    feature_rewards: list[float]
    """Mean of the token rewards over the tokens that have one; NaN if none has."""


class JsonlMetrics(TrainerCallback):
    """Appends one JSON line a logged training step: arm, seed, step, kind "train", and the trainer's numbers.

    Of several processes the main one writes.

    Args:
        path: metrics.jsonl; other runs may write to it before and after.
        arm: name of this run's arm.
        seed: its seed.
    """

    def __init__(self, path: str | Path, arm: str, seed: int) -> None:
        self.path = Path(path)
        self.arm = arm
        self.seed = seed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drops rows of this arm and seed beyond the step training starts from, and a line cut short by a kill."""
        if not state.is_world_process_zero:
            return
        rows = read_jsonl(self.path)
        kept = [row for row in rows if not self._is_later(row, state.global_step)]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Writes a step's numbers; the summary at the end of training and evaluation logs are not steps."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        numbers = {key: _finite(value) for key, value in logs.items() if isinstance(value, int | float | None)}
        row = {"arm": self.arm, "seed": self.seed, "step": state.global_step, "kind": "train", **numbers}
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _is_later(self, row: dict[str, Any], step: int) -> bool:
        return bool(row["arm"] == self.arm and row["seed"] == self.seed and row["step"] > step)


class RolloutRecorder(TrainerCallback):
    """Keeps sampled rollouts as rows of a parquet file; give it to the trainer as callback and as `on_rollouts`.

    Rows are written before each checkpoint and at the end, the whole file at once. Of several processes the main one,
    which alone is given rollouts, writes.
    """

    def __init__(self, path: str | Path, arm: str, seed: int) -> None:
        self.path = Path(path)
        self.arm = arm
        self.seed = seed
        self.frame = pd.DataFrame(columns=ROLLOUT_COLUMNS)
        self._new: list[dict[str, Any]] = []

    def __call__(self, rollouts: Rollouts) -> None:
        """Takes one generation's sample."""
        columns = (
            rollouts.question_ids, map(as_text, rollouts.prompts), map(as_text, rollouts.completions), rollouts.tokens,
            rollouts.token_rewards, rollouts.outcomes, rollouts.feature_rewards,
        )  # fmt: skip
        for values in zip(*columns, strict=True):
            row = (self.arm, self.seed, rollouts.step, *values)
            self._new.append(dict(zip(ROLLOUT_COLUMNS, row, strict=True)))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reads what other runs, or this one before it was killed, have left."""
        self._new = []
        if self.path.exists():
            frame = pd.read_parquet(self.path)
            later = (frame["arm"] == self.arm) & (frame["seed"] == self.seed) & (frame["step"] > state.global_step)
            self.frame = frame[~later]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes before the checkpoint is saved, so that no checkpoint is ahead of its rollouts."""
        if control.should_save and state.is_world_process_zero:
            self.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes what is left."""
        if state.is_world_process_zero:
            self.flush()

    def flush(self) -> None:
        """Writes all rows to the file, atomically."""
        if self._new:
            new = pd.DataFrame(self._new, columns=ROLLOUT_COLUMNS)
            self.frame = pd.concat([self.frame, new], ignore_index=True) if len(self.frame) else new
            self._new = []
        with atomic_path(self.path) as temporary:
            self.frame.astype({"outcome": float, "feature_reward": float}).to_parquet(temporary, index=False)


class EveryStep(TrainerCallback):
    """Calls `function(step)` after every `every`-th step, before its checkpoint; all random states are put back."""

    def __init__(self, every: int, function: Callable[[int], None]) -> None:
        self.every = every
        self.function = function

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Runs before the checkpoint of the step is saved: a run killed in between does both again."""
        if state.global_step % self.every == 0:
            with preserved_rng():
                self.function(state.global_step)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Puts back the random states of Python, NumPy and torch (every device)."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
