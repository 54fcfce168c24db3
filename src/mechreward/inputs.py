"""What a run of the main job starts from: everything loaded and checked before its folder is made, and that folder."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mechreward import tiny
from mechreward.config import ImproveConfig
from mechreward.errors import InputError
from mechreward.files import atomic_path, make_folder, sha256_bytes, write_json
from mechreward.models import LoadedModel, check_layer, d_model, load_model
from mechreward.sae import SAE, load_sae
from mechreward.tasks import Columns, QuestionSplit, load_questions, split_questions
from mechreward.verifiers import Verdict, Verifier, get_verifier


@dataclass(frozen=True)
class Inputs:
    """Everything a run needs, loaded and checked before its folder is made."""

    config: ImproveConfig
    split: QuestionSplit
    verifier: Verifier
    loaded: LoadedModel
    layer: int
    sae: SAE | None
    """None if one is to be trained."""


def prepare(config: ImproveConfig) -> Inputs:
    """Loads and checks questions, model and SAE. Writes nothing.

    Raises:
        InputError: one sentence on the first thing that is wrong.
    """
    verifier = get_verifier(config.verifier)
    if config.strictness == "lenient":
        verifier = lenient(verifier)
    columns = Columns(id=config.id_column, question=config.question_column, answer=config.answer_column)
    questions = load_questions(
        config.questions,
        columns=columns,
        limit=config.limit,
        seed=config.seed,
        prompt_format=config.prompt_format,
        options=dict(config.generator_options),
    )
    split = split_questions(questions, config.known, config.seed)
    if config.layer is None and config.sae is None and config.model != "tiny":
        raise InputError("layer: is needed to train an SAE; give a decoder block (0-based), or an SAE with --sae")
    loaded = load_policy(config)
    sae = _load_sae(config)
    layer = sae.meta.layer if sae is not None else config.layer
    assert layer is not None
    check_layer(loaded.model, layer)
    if sae is not None and sae.d_model != d_model(loaded.model):
        width = d_model(loaded.model)
        raise InputError(
            f"sae: {config.sae} reads residuals of width {sae.d_model}, but {config.model} has width {width}"
        )
    return Inputs(config, split, verifier, loaded, layer, sae)


def lenient(verifier: Verifier) -> Verifier:
    """The same verifier, taking an answer as right when its lenient extraction is."""

    def judge(*arguments: Any, **options: Any) -> Verdict:
        verdict = verifier(*arguments, **options)
        return replace(verdict, correct=verdict.lenient)

    return judge


def load_policy(config: ImproveConfig) -> LoadedModel:
    name = str(tiny.MODEL) if config.model == "tiny" else config.model
    return load_model(name, adapter=config.adapter, dtype=config.dtype, device=config.device)


def _load_sae(config: ImproveConfig) -> SAE | None:
    bundled = config.model == "tiny" and config.sae is None and config.layer is None
    source = str(tiny.SAE_FOLDER) if bundled else config.sae
    if source is None:
        return None
    sae = load_sae(source, config.sae_id, device=config.device)
    if config.layer is not None and config.layer != sae.meta.layer:
        raise InputError(
            f"layer: {config.layer} is not the layer of the SAE {source}, which reads block {sae.meta.layer}"
        )
    return sae


def open_run(inputs: Inputs) -> Path:
    """Makes the run directory, or with `resume` finds the one a killed run left.

    Raises:
        InputError: if it holds a run and `resume` is off, another configuration, or cannot be written to.
    """
    config = inputs.config
    folder, stored_at = config.out, config.out / "config.yaml"
    if stored_at.exists():
        if not config.resume:
            raise InputError(f"out: {folder} holds a run already; give --resume to go on with it, or another folder")
        stored, now = yaml.safe_load(stored_at.read_text()), _stored(config)
        changed = [field for field in now if stored.get(field) != now[field]]
        if changed:
            raise InputError(
                f"{changed[0]}: {now[changed[0]]!r} is not what the run in {folder} was started with "
                f"({stored.get(changed[0])!r}); a resumed run keeps its configuration"
            )
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"out: {folder} is not empty and holds no run; name a new folder")
    make_folder(folder)
    write_json(folder / "manifest.json", _manifest(inputs))
    with atomic_path(stored_at) as temporary:
        temporary.write_text(yaml.safe_dump(_stored(config), sort_keys=False))
    return folder


def _stored(config: ImproveConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"out", "resume"})


def _manifest(inputs: Inputs) -> dict[str, Any]:
    config = inputs.config
    asked = [f"{q.id}\0{q.prompt}\0{q.answer}\0".encode() for side in inputs.split for q in side]
    packages = ("mechreward", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "device": config.device,
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "hashes": {"questions": sha256_bytes(*asked)}
        | ({} if inputs.sae is None else {"sae": inputs.sae.weights_hash}),
    }


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for each stage, so that skipping one on resume changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{stage}".encode()).digest()[:4], "big")
