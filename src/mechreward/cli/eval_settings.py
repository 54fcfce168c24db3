"""What `mechreward eval` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mechreward.cli.shared_settings import JudgeSettings, SAESettings
from mechreward.settings import Count


class EvalSettings(JudgeSettings, SAESettings):
    """Accuracy on questions, with its interval. With --fuzz also on variations of them, how far answers to one family
    agree, and with --pack whether the pack's signal survives: exit code 1 if the pack is brittle."""

    fuzz: bool = False
    """Ask variations of the questions too."""
    kinds: tuple[Literal["names", "numbers", "order", "irrelevant", "paraphrase"], ...] = ()
    """What to vary; if left out, all that the questions' text allows: questions from elsewhere than `tiny:` take
    `irrelevant` alone."""
    variations: Count = 1
    """Variations of each kind."""
    examiner: str | None = None
    """A second model that puts each question in other words, once: an OpenAI-compatible address such as
    http://localhost:8000/v1 (its key in OPENAI_API_KEY, if it wants one), or a model folder or id."""
    examiner_model: str | None = None
    """The model to ask at the address."""
    pack: str | None = None
    """A pack.json, or a bundled pack by name, whose signal is put to the test."""
    limit: Count = 100
    """Use the first so many questions."""
    samples: Count = 4
    """Answers to each question."""
    out: Path = Path("runs/eval")
    """Folder for eval.json and responses.parquet; claims.jsonl with --examiner, and with --pack pack.json, which says
    whether the pack survives."""
