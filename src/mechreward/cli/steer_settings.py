"""What `mechreward steer generate` and `mechreward steer sweep` are told, and the variant that both work with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mechreward.cli.asking import sae_source
from mechreward.cli.sae_settings import AskSettings, JudgeSettings, answered, asked
from mechreward.errors import InputError, named
from mechreward.files import read_json
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import tokenise_prompts
from mechreward.sae import load_sae
from mechreward.settings import Count, Whole
from mechreward.steering import Variant
from mechreward.steering.features import feature_ids
from mechreward.tasks import Question
from mechreward.tiny import model_path


class SteerSettings(AskSettings):
    """A model, its SAE, and edits."""

    sae: str | None = None
    """A folder or file on disk, or a SAE Lens release; the bundled one for the model `tiny`."""
    sae_id: str | None = None
    """Which SAE of a release."""
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


def load_variant(settings: SteerSettings, edits: Path | None = None) -> Variant:
    """The calibrated variant, with the edits of a file if one is named.

    Raises:
        InputError: if no SAE is named for a model that brings none, a feature is not one of it, or the file is not one
            of edits.
    """
    source = sae_source(settings.model, settings.sae, f"to steer {settings.model}")
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    sae = load_sae(source, settings.sae_id, device=settings.device)
    variant = Variant(loaded, sae, where=settings.where)
    if edits is not None:
        with named(path="edits"):
            return Variant.from_json(loaded, sae, read_json(edits))
    # Before questions are answered to calibrate on.
    feature_ids(settings.features, sae.d_sae)
    # Other questions than those that are answered: a strength must not depend on what it is tried on.
    known = asked(settings, _source(settings), settings.limit + settings.calibration)[settings.limit :]
    if not known:
        raise InputError(f"calibration: {_source(settings)} has no question beyond the {settings.limit} to answer")
    variant.calibrate(answered(settings, loaded, known, 1, lambda _: None))
    return variant


def check_edits_alone(settings: GenerateSettings) -> None:
    """Raises:
    InputError: if `edits` is given together with what the file says itself.
    """
    kept = {name: GenerateSettings.model_fields[name].default for name in ("strength", "mode", "where", "calibration")}
    given = [name for name, default in kept.items() if getattr(settings, name) != default]
    if settings.edits is not None and given:
        raise InputError(
            f"{given[0]}: {getattr(settings, given[0])} is given with --edits, which hold their own; drop it"
        )


def questions_of(settings: SteerSettings) -> list[Question]:
    """The questions that are answered."""
    return asked(settings, _source(settings), settings.limit)


def prompt_ids(loaded: LoadedModel, settings: SteerSettings, questions: list[Question]) -> list[list[int]]:
    """The questions' prompts as the model reads them."""
    return tokenise_prompts(loaded, questions, max_new_tokens=settings.max_new_tokens, chat=settings.chat)


def _source(settings: SteerSettings) -> str:
    if settings.questions is None:
        raise InputError("questions: is needed; give a file, tiny:easy, reasoning-gym:NAME or a dataset id")
    return settings.questions
