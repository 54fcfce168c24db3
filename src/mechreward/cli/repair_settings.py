"""What `mechreward steer repair` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mechreward.cli.shared_settings import JudgeSettings, SAESettings
from mechreward.settings import Count, Positive, Share


class RepairSettings(JudgeSettings, SAESettings):
    """Repairs wrong answers to KNOWN questions by steering from their critical tokens on, beside drawing again from the
    same tokens and random steering. Exit code 0 if any verified repair is kept, 1 if none is."""

    limit: Count = 200
    """Use the first so many questions."""
    known: Share = 0.5
    """Share of the questions that is KNOWN, split as `improve` does. The others are not answered."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for each KNOWN question."""
    critical: Literal["rollouts", "contrast", "solution"] = "rollouts"
    """How the critical token is found: rollouts from every step (dear), cDPO's contrastive estimation, or a worked
    solution."""
    rollouts: Count = 16
    """Rollouts a place, for `--critical rollouts`."""
    contrast_learning_rate: Positive = 3e-4
    """For `critical: contrast`: learning rate of cDPO's two adapters; the bundled model needs 5e-3."""
    contrast_epochs: Count = 1
    """For `critical: contrast`: their passes over the responses."""
    tries: Count = 4
    """Tries a chain, in every arm."""
    n_features: Count = 10
    """Most features to pin."""
    strength: Positive = 1.0
    """Where features of right chains are pinned, in their 99th percentiles; those of wrong chains are pinned to 0."""
    when: Literal["always", "wrong"] = "always"
    """Steer each token, or only those on which a feature of wrong chains fires."""
    span: Literal["step", "rest"] = "step"
    """Steer the step that is written anew, or all that follows."""
    pooling: str = "mean"
    """What of a response features are found on: `mean`, `max`, `last`, `step_end:.`, ..."""
    chains: Count = 300
    """At most so many wrong chains, one a question."""
    out: Path = Path("runs/repair")
    """Folder for repairs.parquet, repair.json, questions.parquet and responses/known.parquet."""
