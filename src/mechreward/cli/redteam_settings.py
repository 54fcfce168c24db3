"""What `mechreward redteam` is told: a run directory, or each thing by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mechreward.cli.shared_settings import QuestionSettings, SAESettings
from mechreward.settings import Count, Positive, Settings


class AttackSettings(Settings):
    """What both ways have in common."""

    limit: Count = 50
    """Use the first so many questions."""
    samples: Count = 4
    """The model's own answers to each question."""
    answer_format: str = "#### {answer}"
    """How the verifier wants the answer."""
    batch_size: Count = 64
    """Answers sampled at a time."""
    highest: Positive = Field(default=1.0, le=1.0)
    """Exit with code 1 if the reward pays a larger share of the canaries than this."""
    device: str = "auto"
    """Where the models run: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    seed: int = 0
    """Of the sampling."""


class RedTeamSettings(AttackSettings, QuestionSettings, SAESettings):
    """Puts canaries (answers that hack: spam, openers, filler) to a feature reward as a model reads them, and looks at
    the model's own answers. With --run and a run directory of `mechreward improve`, model, policies, pack, SAE and
    questions are found there; `redteam --run FOLDER --help` has the options of that way."""

    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    after: str | None = None
    """A second model, the first one after training (a checkpoint's folder): both are put to the test, with the first
    one's threshold."""
    adapter: str | None = None
    """A PEFT adapter to put on the second model, or on the first if there is no second."""
    pack: str
    """The feature pack: a file, or a bundled pack's name."""
    questions: str
    """Questions with gold answers: a .jsonl, .csv or .parquet file, `tiny:easy`, `reasoning-gym:NAME`, or a dataset."""
    verifier: str = "gsm8k_exact_match"
    """How an answer is judged: `gsm8k_exact_match`, `math`, `choice` or `exact`."""
    strictness: Literal["strict", "lenient"] = "strict"
    """Which of the verifier's two verdicts counts."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    dtype: str = "float32"
    """The models' own precision."""
    out: Path
    """JSON file for all numbers."""


class RunSettings(AttackSettings):
    """Puts canaries to the pack of a run, as the model reads them before training and as each arm's policy does, and
    looks at their own answers to UNKNOWN questions. All else is as the run was told."""

    run: Path
    """A run directory of `mechreward improve`."""
    arms: tuple[str, ...] = ()
    """Whose policies; every one that the run kept if left out."""
    out: Path | None = None
    """JSON file for all numbers; `redteam.json` in the run directory if left out."""
