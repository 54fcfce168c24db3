"""What `mechreward sae check` and `mechreward sae layers` are told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mechreward.cli.shared_settings import AskSettings, JudgeSettings, SAESettings
from mechreward.settings import Count, Whole


class CheckSettings(AskSettings, SAESettings):
    """Reads a few residuals of a model with an SAE and says which mistake is likely if it does not fit. With --json the
    result is printed as JSON and nothing else."""

    sae: str
    """A folder or file on disk, or a SAE Lens release; may stand first, without the flag."""
    text: str | None = None
    """Text to read instead of questions and answers: a .txt, .jsonl, .csv or .parquet file, or a dataset id."""
    text_column: str = "text"
    """Column of a file or dataset that holds the text."""
    limit: Count = 16
    """Use the first so many questions or texts."""
    tokens: Count = 1024
    """Read about so many tokens."""


class LayersSettings(JudgeSettings):
    """Reports for each block how well a probe tells right from wrong answers to the same question."""

    responses: Path | None = None
    """Verified responses to read instead of sampling: a run's `responses/known.parquet`."""
    layers: tuple[Whole, ...] = ()
    """Blocks to read (0-based); by default all."""
    limit: Count = 100
    """Use the first so many questions."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for each question."""
    out: Path | None = None
    """Write all numbers to this JSON file."""
