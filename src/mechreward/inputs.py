"""What a run of the main job starts from: everything loaded and checked before its folder is made, and that folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from peft import PeftModel

from mechreward import tiny
from mechreward.config import ImproveConfig, RunConfig, TrainRunConfig
from mechreward.errors import InputError, named
from mechreward.features import FeaturePack, load_pack
from mechreward.files import sha256_bytes
from mechreward.models import LoadedModel, check_layer, d_model, find_device, fingerprint, load_model
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, check_answers, eos_ids, tokenise_prompts
from mechreward.rundir import MODEL_HASH, make_manifest, open_run, stage_seed
from mechreward.sae import SAE, SAECheck, check_on_model, load_sae, own_shape
from mechreward.sae.architectures import check_shape
from mechreward.settings import defaults
from mechreward.tasks import (
    QUESTION_SETTINGS,
    Columns,
    Question,
    QuestionSplit,
    join_sides,
    load_questions,
    split_questions,
)
from mechreward.tasks.hub import is_dataset
from mechreward.verifiers import Verdict, Verifier, get_verifier

PACKAGES = ("mechreward", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Whose versions the manifest names."""
FIT = "sae.json"
"""How an SAE fits the model, beside what was found with it."""


ConfigT = TypeVar("ConfigT", bound=RunConfig)
ConfigT_co = TypeVar("ConfigT_co", bound=RunConfig, covariant=True)


@dataclass(frozen=True)
class Inputs(Generic[ConfigT_co]):
    """Everything a run needs, loaded and checked before its folder is made."""

    config: ConfigT_co
    split: QuestionSplit
    verifier: Verifier
    loaded: LoadedModel
    layer: int
    sae: SAE | None
    """None if one is to be trained."""


def prepare(config: ConfigT, sae: SAE | None = None) -> Inputs[ConfigT]:
    """Loads and checks questions, model and SAE. Writes nothing.

    Args:
        sae: the SAE, if it is loaded already; otherwise the one that the settings name, if they name one.

    Raises:
        InputError: one sentence on the first thing that is wrong.
    """
    verifier = verifier_of(config.verifier, config.strictness)
    split = load_sides(config, verifier)
    if sae is None and config.layer is None and config.sae is None and config.model != "tiny":
        raise InputError("layer: is needed to train an SAE; give a decoder block (0-based), or an SAE with --sae")
    loaded = load_policy(config)
    if config.lora_rank and not config.repair_arms and isinstance(loaded.model, PeftModel):
        raise InputError(
            f"lora_rank: {config.lora_rank}, but the model has an adapter; merge it, or train that one with 0"
        )
    eos_ids(loaded)
    tokenise_prompts(loaded, [*split.known, *split.unknown], max_new_tokens=config.max_new_tokens, chat=config.chat)
    sae = load_given_sae(config) if sae is None else sae
    layer = sae.meta.layer if sae is not None else config.layer
    assert layer is not None
    check_layer(loaded.model, layer)
    if sae is None and isinstance(config, ImproveConfig):
        with named(k="sae_k"):
            check_shape(own_shape(loaded, expansion=config.sae_expansion, k=config.sae_k))
    if sae is not None and sae.d_model != d_model(loaded.model):
        width = d_model(loaded.model)
        raise InputError(
            f"sae: {sae.meta.release} reads residuals of width {sae.d_model}, but {config.model} has width {width}"
        )
    return Inputs(config, split, verifier, loaded, layer, sae)


def load_sides(config: RunConfig, verifier: Verifier) -> QuestionSplit:
    """KNOWN and UNKNOWN questions: shares of one source, or two sources.

    Raises:
        InputError: as `load_questions`, `check_answers`, `split_questions` and `join_sides`.
    """
    with named(source="questions"):
        questions = _questions(config)
    check_answers(questions, verifier)
    if config.eval_questions is None:
        return split_questions(questions, config.known, config.seed)
    with named(unknown="eval_questions"):
        split = join_sides(questions, _eval_questions(config, config.eval_questions))
    check_answers(split.unknown, verifier)
    return split


def _eval_questions(config: RunConfig, source: str) -> list[Question]:
    if config.eval_split is not None and not is_dataset(source):
        raise InputError(f"eval_split: {config.eval_split!r} means nothing to {source}, which is no dataset")
    options = config.eval_generator_options
    if options is None:
        options = config.generator_options if source == config.questions else {}
    wanted = {
        "questions": source,
        "split": config.eval_split or config.split,
        "limit": config.eval_limit,
        "generator_options": options,
        # A generator asked twice has to give others.
        "seed": stage_seed(config.seed, "eval_questions"),
    }
    with named(source="eval_questions", generator_options="eval_generator_options"):
        return _questions(config.model_copy(update=wanted))


def _questions(config: RunConfig) -> list[Question]:
    columns = Columns(id=config.id_column, question=config.question_column, answer=config.answer_column)
    with named(**QUESTION_SETTINGS):
        return load_questions(
            config.questions,
            columns=columns,
            split=config.split,
            limit=config.limit,
            seed=config.seed,
            prompt_format=config.prompt_format,
            options=dict(config.generator_options),
        )


def verifier_of(name: str, strictness: Literal["strict", "lenient"]) -> Verifier:
    """The verifier of this name; `lenient` takes an answer as right when its lenient extraction is.

    Raises:
        InputError: as `get_verifier`.
    """
    verifier = get_verifier(name)
    if strictness == "strict":
        return verifier

    def judge(*arguments: Any, **options: Any) -> Verdict:
        verdict = verifier(*arguments, **options)
        return replace(verdict, correct=verdict.lenient)

    return judge


def load_policy(config: RunConfig) -> LoadedModel:
    return load_model(tiny.model_path(config.model), adapter=config.adapter, dtype=config.dtype, device=config.device)


def given_reward(config: TrainRunConfig, pack: str | Path) -> FeatureReward:
    """A pack that a run is given, with the SAE that its settings name, if they name one.

    Raises:
        InputError: as `load_reward`.
    """
    return load_reward(
        pack,
        config.model,
        config.sae,
        config.sae_id,
        device=config.device,
        layer=config.layer,
        k=config.sae_file_k,
    )


def load_run_reward(config: RunConfig, folder: Path) -> FeatureReward:
    """The pack of the run in `folder`, with the SAE that the run was given, or that it trained there."""
    pack = folder / "pack.json"
    if isinstance(config, TrainRunConfig):
        return given_reward(config, pack)
    return FeatureReward.from_pack(pack, load_given_sae(config) or load_sae(folder / "sae", device=config.device))


def load_given_sae(config: RunConfig) -> SAE | None:
    """The SAE that the settings name, the bundled one for the bundled model; None if one is to be trained."""
    bundled = config.model == "tiny" and config.sae is None and config.layer is None
    source = str(tiny.SAE_FOLDER) if bundled else config.sae
    if source is None:
        return None
    # A file that does not say which block it reads takes `layer`; one that does has to agree with it.
    return load_sae(source, config.sae_id, device=config.device, layer=config.layer, k=config.sae_file_k)


def load_reward(
    pack: str | Path,
    model: str,
    sae: str | None = None,
    sae_id: str | None = None,
    *,
    device: str = "auto",
    layer: int | None = None,
    k: int | None = None,
) -> FeatureReward:
    """A pack as a reward, with the SAE that is named; else, for the model `tiny`, the bundled one; else the pack's own.

    Args:
        pack: a file, or a bundled pack's name.
        layer: the block that the SAE reads, where its file does not say.
        k: active features a token, where a TopK SAE's file does not say.

    Raises:
        InputError: as `load_pack` and `load_sae`, or if the pack was made for another SAE.
    """
    made: str | Path | FeaturePack = pack
    if sae is None and model != "tiny":
        made = load_pack(pack)
        sae, sae_id = made.sae.release, made.sae.sae_id or None
    if sae is None or (sae == "tiny" and not Path(sae).exists()):
        sae, sae_id = str(tiny.SAE_FOLDER), None
    return FeatureReward.from_pack(made, load_sae(sae, sae_id, device=device, layer=layer, k=k))


def check_given_sae(sae: SAE, loaded: LoadedModel, responses: Sequence[Response]) -> SAECheck:
    """How the SAE fits the responses' residuals; warns of what is likely wrong."""
    check = check_on_model(sae, loaded, [(response.prompt_ids, response.completion_ids) for response in responses])
    for finding in check.findings:
        warnings.warn(f"sae: {finding}", stacklevel=2)
    return check


def open_folder(inputs: Inputs[RunConfig], **hashes: str) -> Path:
    """Makes the run directory, or with `resume` finds the one a killed run left.

    Args:
        hashes: of what else the run starts from, by its name.

    Raises:
        InputError: if it holds a run and `resume` is off, another configuration, or cannot be written to.
    """
    config = inputs.config
    asked = [f"{q.id}\0{q.prompt}\0{q.answer}\0".encode() for side in inputs.split for q in side]
    hashes |= {"questions": sha256_bytes(*asked), MODEL_HASH: fingerprint(inputs.loaded.model)}
    hashes |= {} if inputs.sae is None else {"sae": inputs.sae.weights_hash}
    manifest = make_manifest(seed=config.seed, device=str(find_device(config.device)), packages=PACKAGES, hashes=hashes)
    # How many runs of a study at a time changes nothing in them.
    settings = config.model_dump(mode="json", exclude={"out", "resume", "workers"})
    return open_run(config.out, settings, manifest, config.resume, defaults(type(config)))
