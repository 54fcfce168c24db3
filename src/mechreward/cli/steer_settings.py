"""What `mechreward steer generate` and `mechreward steer sweep` are told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mechreward.cli.shared_settings import AskSettings, JudgeSettings, SAESettings
from mechreward.settings import Count, Whole


class SteerSettings(AskSettings, SAESettings):
    """A model, its SAE, and edits."""

    features: tuple[Whole, ...] = ()
    """Features to edit, all with the same strength."""
    mode: Literal["nudge", "pin", "scale"] = "nudge"
    """`nudge` adds the strength to the activation, `pin` puts it there, `scale` multiplies by it."""
    where: Literal["all", "completion"] = "completion"
    """Edit the tokens of prompt and answer, or of the answer alone (from the prompt's last token on)."""
    limit: Count = 4
    """Answer the first so many questions."""
    calibration: Count = 32
    """Questions whose answers say how strong each feature fires: strengths are in units of its 99th percentile."""


class GenerateSettings(SteerSettings):
    """Answers questions with and without edits."""

    strength: float = 1.0
    """In units of each feature's 99th percentile; a factor for `scale`."""
    edits: Path | None = None
    """JSON of edits, as `Variant.json` gives it, in place of `--features`."""


class SweepSettings(SteerSettings, JudgeSettings):
    """Behaviour and fluency over strengths, and controls. Behaviour is the share of right answers, or of answers that
    hold a text."""

    strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Strengths to try."""
    controls: tuple[Literal["random", "wrong_sign", "bias"], ...] = ("random", "wrong_sign")
    """What to compare with: a random decoder row of the same norm, the wrong sign, the mean edit everywhere."""
    contains: str | None = None
    """Count answers that hold this text, in place of right ones."""
    limit: Count = 100
    """Answer the first so many questions."""
    out: Path | None = None
    """Write the curve to this JSON file."""
