"""What verbs are given to read: questions, answers to them, from a file or sampled anew, and an SAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechreward.cli.terminal import RichProgress, print_path
from mechreward.errors import InputError, named
from mechreward.tasks import QUESTION_SETTINGS, Columns, Question, load_questions

if TYPE_CHECKING:
    from mechreward.cli.discover_settings import DiscoverSettings
    from mechreward.cli.gate_settings import GateSettings
    from mechreward.cli.sae_settings import LayersSettings
    from mechreward.cli.shared_settings import AskSettings, QuestionSettings, SAESettings
    from mechreward.models import LoadedModel
    from mechreward.reward import FeatureReward
    from mechreward.rollout import Response
    from mechreward.sae import SAE


def answers(
    settings: LayersSettings | DiscoverSettings | GateSettings,
    loaded: LoadedModel,
    least: int,
    what: str,
    keep: Path | None = None,
    check: Callable[[list[Sequence[int]]], None] = lambda _: None,
) -> list[Response]:
    """The responses of the file, or new ones; verified.

    Args:
        keep: a file for answers that are sampled, to be read again with `--responses`.
        check: is shown the prompts' token ids before anything is sampled.

    Raises:
        InputError: if there are fewer questions to ask than the `least` that `what` needs, or the file holds no
            responses.
    """
    from mechreward.inputs import verifier_of
    from mechreward.rollout import check_answers, load_responses, save_responses, tokenise_prompts, verify_responses

    if settings.responses is not None:
        given = load_responses(settings.responses)
        check([response.prompt_ids for response in given])
        return given
    assert settings.questions is not None
    verifier = verifier_of(settings.verifier, settings.strictness)
    questions = asked(settings, settings.questions, settings.limit)
    check_answers(questions, verifier)
    if len(questions) < least:
        raise InputError(f"questions: {len(questions)} are too few; {what} needs {least} with mixed answers")
    check([*tokenise_prompts(loaded, questions, max_new_tokens=settings.max_new_tokens, chat=settings.chat)])
    total = len(questions) * settings.samples
    with RichProgress().stage(f"sample {len(questions)} questions x {settings.samples}", total) as advance:
        responses = answered(settings, loaded, questions, settings.samples, advance)
    responses = verify_responses(responses, questions, verifier)
    if keep is not None:
        save_responses(keep, responses)
        print_path("wrote", keep)
    return responses


def asked(settings: QuestionSettings, source: str, limit: int) -> list[Question]:
    """The questions that the settings name.

    Raises:
        InputError: as `load_questions`.
    """
    with named(source="questions", **QUESTION_SETTINGS):
        return load_questions(
            source,
            columns=Columns(id=settings.id_column, question=settings.question_column, answer=settings.answer_column),
            split=settings.split,
            limit=limit,
            seed=settings.seed,
            prompt_format=settings.prompt_format,
            options=dict(settings.generator_options),
        )


def answered(
    settings: AskSettings, loaded: LoadedModel, questions: list[Question], n: int, advance: Callable[[int], Any]
) -> list[Response]:
    """`n` responses to each question, not verified.

    Raises:
        InputError: as `sample_responses`.
    """
    from mechreward.rollout import sample_responses

    return sample_responses(
        loaded,
        questions,
        n=n,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
        chat=settings.chat,
        on_batch=lambda batch: advance(len(batch)),
    )


def load_given_sae(settings: SAESettings, model: str, device: str, why: str) -> SAE:
    """The SAE that the settings name, or the bundled one for the model `tiny`.

    Raises:
        InputError: as `load_sae`, and if none is named for another model: "is needed" and `why`.
    """
    from mechreward.sae import load_sae
    from mechreward.tiny import SAE_FOLDER

    if settings.sae is None and model != "tiny":
        raise InputError(f"sae: is needed {why}; name a folder or file, or a SAE Lens release, with --sae")
    source = str(SAE_FOLDER) if settings.sae is None else settings.sae
    return load_sae(source, settings.sae_id, device=device, layer=settings.layer, k=settings.k)


def load_given_reward(settings: SAESettings, pack: str, model: str, device: str) -> FeatureReward:
    """A pack as a reward, with the SAE that the settings name (`load_reward`)."""
    from mechreward.inputs import load_reward

    return load_reward(pack, model, settings.sae, settings.sae_id, device=device, layer=settings.layer, k=settings.k)
