"""What `mechreward gate` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mechreward.cli.shared_settings import JudgeSettings, SAESettings
from mechreward.settings import Count


class GateSettings(JudgeSettings, SAESettings):
    """Judges a pack on verified answers to questions that it was not found on: exit code 0 if it passes, else 1."""

    stage: Literal[1] = 1
    """Which gate. `--stage 2 --help` has the options of a study of training runs, `--stage 3 --help` those of its
    aftermath."""
    pack: str
    """A pack.json, or a bundled pack by name (`mechreward pack list`)."""
    features: Path | None = None
    """The features.parquet that the pack was made from: then random packs of equal firing frequency are judged too."""
    responses: Path | None = None
    """Verified responses to judge on instead of sampling."""
    limit: Count = 300
    """Use the first so many questions."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for each question."""
    rephrased: bool = False
    """Fail a pack whose signal does not survive another wording; it has to be one that `mechreward eval --fuzz --pack`
    wrote."""
    draws: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples of questions, and label shuffles."""
    read_batch_size: Count = 32
    """Responses read at a time."""
    out: Path = Path("runs/gate")
    """Folder for gate1.json, for pack.json with the verdict in it, and for gate1-responses.parquet, the answers if
    sampled."""
