"""What `mechreward steer generate` and `mechreward steer sweep` work with: a variant, and the questions put to it."""

from __future__ import annotations

from pathlib import Path

from mechreward.cli.asking import answered, asked, load_given_sae
from mechreward.cli.steer_settings import GenerateSettings, SteerSettings
from mechreward.errors import InputError, named
from mechreward.files import read_json
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import tokenise_prompts
from mechreward.steering import Variant
from mechreward.steering.features import feature_ids
from mechreward.tasks import Question
from mechreward.tiny import model_path


def load_variant(settings: SteerSettings, edits: Path | None = None) -> Variant:
    """The calibrated variant, with the edits of a file if one is named.

    Raises:
        InputError: if no SAE is named for a model that brings none, a feature is not one of it, or the file is not one
            of edits.
    """
    sae = load_given_sae(settings, settings.model, settings.device, f"to steer {settings.model}")
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
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
