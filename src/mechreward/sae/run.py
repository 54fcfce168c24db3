"""Trains an SAE from start to finish, in a directory that can be taken up again after a kill.

1. load model and sources, make rows; everything is checked before the directory is made
2. answers   the model's own responses to the questions, where asked for (`responses.parquet`)
3. train     one document in 20 is only measured on; `metrics.jsonl` along the way, `checkpoint.pt` every so often
4. save      `results.json`, then the SAE in SAE Lens' format; the checkpoint goes

A run that was killed leaves, when resumed, the very weights and metrics of one that never was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mechreward import tiny
from mechreward.errors import InputError, named
from mechreward.files import append_row, atomic_path, read_json, read_jsonl, sha256_bytes, write_json
from mechreward.models import LoadedModel, check_layer, context_length, find_device, fingerprint, load_model
from mechreward.recipe import SAERecipe
from mechreward.rollout import Response, load_responses, sample_responses, save_responses, tokenise_prompts
from mechreward.rundir import MODEL_HASH, make_manifest, open_run, stage_seed
from mechreward.sae.architectures import SAEShape, check_shape
from mechreward.sae.checkpoint import Checkpoint
from mechreward.sae.io import CONFIG, require_sae_lens, save_sae
from mechreward.sae.loading import load_sae
from mechreward.sae.own import own_meta, own_shape, train_own_sae
from mechreward.sae.rows import Document, Row, packed, question_documents, set_aside, text_documents, with_answers
from mechreward.sae.training import TrainedSAE, TrainingPoint, Watch
from mechreward.settings import defaults
from mechreward.tasks import QUESTION_SETTINGS, Columns, Question, load_questions, load_texts

ROW_TOKENS = 512
"""Longest row, where the model reads as much."""
PACKAGES = ("mechreward", "torch", "transformers", "sae-lens", "safetensors")
RESPONSES, METRICS, RESULTS, CHECKPOINT = "responses.parquet", "metrics.jsonl", "results.json", "checkpoint.pt"


@dataclass(frozen=True)
class Teller:
    """Who is told how far a run is; the command line draws it."""

    on_answers: Callable[[int, int], None] = lambda done, total: None  # noqa: ARG005
    """Responses sampled so far, and how many there will be."""
    on_step: Callable[[int, float], None] = lambda tokens, loss: None  # noqa: ARG005
    """Tokens trained on so far, and the loss."""
    on_point: Callable[[TrainingPoint], None] = lambda point: None  # noqa: ARG005
    """A measurement."""


@dataclass(frozen=True)
class Sources:
    """A model, and what it is to read."""

    loaded: LoadedModel
    shape: SAEShape
    texts: list[Document]
    questions: list[Question]
    asked: list[Document]
    """The questions' documents, in their order."""


def run_recipe(recipe: SAERecipe, teller: Teller | None = None) -> TrainedSAE:
    """Trains the SAE that a recipe describes, or goes on with it (`recipe.resume`); everything is left in `recipe.out`.

    Raises:
        InputError: one sentence on the first thing that is wrong, before anything is written.
    """
    teller = teller or Teller()
    sources = prepare(recipe)
    folder = _open(recipe, sources)
    if (folder / CONFIG).exists():
        return TrainedSAE(sae=load_sae(folder, device=recipe.device), **read_json(folder / RESULTS))
    training, held_out = _rows(recipe, sources, _answers(recipe, sources, folder, teller))
    checkpoint = Checkpoint(folder / CHECKPOINT, recipe.save_every)
    _drop_points(folder / METRICS, beyond=checkpoint.steps())

    def on_point(point: TrainingPoint) -> None:
        append_row(folder / METRICS, asdict(point))
        teller.on_point(point)

    trained = train_own_sae(
        sources.loaded,
        training,
        sources.shape,
        meta=own_meta(sources.loaded, recipe.layer, release=str(recipe.out), model_name=recipe.model),
        n_tokens=recipe.tokens,
        held_out=held_out,
        n_held_out=recipe.held_out_tokens,
        include_prompt=False,
        reuse=recipe.reuse,
        outlier_factor=recipe.outlier_factor,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        seed=stage_seed(recipe.seed, "sae"),
        device=recipe.device,
        watch=Watch(teller.on_step, on_point, recipe.eval_every),
        checkpoint=checkpoint,
    )
    write_json(folder / RESULTS, {name: value for name, value in vars(trained).items() if name != "sae"})
    save_sae(trained.sae, folder)
    checkpoint.path.unlink(missing_ok=True)
    return trained


def prepare(recipe: SAERecipe) -> Sources:
    """Loads and checks model and sources. Writes nothing.

    Raises:
        InputError: one sentence on the first thing that is wrong.
    """
    if not recipe.text and not recipe.task:
        raise InputError("text, task: neither was given; at least one source is needed to train on")
    if recipe.own_answers and not recipe.task:
        raise InputError(f"own_answers: {recipe.own_answers} answers to no question; give --task as well")
    if recipe.tokens < recipe.batch_size:
        raise InputError(f"tokens: {recipe.tokens} is less than one batch of {recipe.batch_size}")
    texts = [text for source in recipe.text for text in _load_texts(recipe, source)]
    questions = [question for number, _ in enumerate(recipe.task) for question in _load_task(recipe, number)]
    loaded = load_model(tiny.model_path(recipe.model), adapter=recipe.adapter, dtype=recipe.dtype, device=recipe.device)
    check_layer(loaded.model, recipe.layer)
    shape = _shape(recipe, loaded)
    longest = _row_tokens(recipe, loaded)
    documents = text_documents(loaded.tokenizer, texts, longest)
    asked = question_documents(loaded, questions, max_tokens=longest, chat=recipe.chat)
    set_aside([*documents, *asked])
    if recipe.own_answers:
        tokenise_prompts(loaded, questions, max_new_tokens=recipe.max_new_tokens, chat=recipe.chat)
    require_sae_lens()
    return Sources(loaded, shape, documents, questions, asked)


def _shape(recipe: SAERecipe, loaded: LoadedModel) -> SAEShape:
    shape = own_shape(
        loaded,
        expansion=recipe.expansion,
        k=recipe.k,
        architecture=recipe.architecture,
        widths=recipe.widths,
        l0_coefficient=recipe.l0_coefficient,
        bandwidth=recipe.bandwidth,
    )
    check_shape(shape)
    return shape


def _row_tokens(recipe: SAERecipe, loaded: LoadedModel) -> int:
    context = context_length(loaded.model)
    if recipe.row_tokens is None:
        return ROW_TOKENS if context is None else min(ROW_TOKENS, context)
    if context is not None and recipe.row_tokens > context:
        raise InputError(f"row_tokens: {recipe.row_tokens} is more than the model reads, which is {context}")
    return recipe.row_tokens


def _load_texts(recipe: SAERecipe, source: str) -> list[str]:
    options = dict(recipe.text_options)
    with named(source="text"):
        return load_texts(source, column=recipe.text_column, split=recipe.split, limit=recipe.limit, options=options)


def _load_task(recipe: SAERecipe, number: int) -> list[Question]:
    """The questions of one source; their ids are made unique among all sources by its number."""
    columns = Columns(question=recipe.question_column, answer=recipe.answer_column, solution=recipe.solution_column)
    with named(source="task", **QUESTION_SETTINGS):
        questions = load_questions(
            recipe.task[number],
            columns=columns,
            split=recipe.split,
            limit=recipe.limit,
            seed=recipe.seed,
            prompt_format=recipe.prompt_format,
            options=dict(recipe.generator_options),
        )
    return [Question(f"{number}:{q.id}", q.prompt, q.answer, q.solution) for q in questions]


def _open(recipe: SAERecipe, sources: Sources) -> Path:
    rows = json.dumps([[list(map(list, row)) for row in document] for document in [*sources.texts, *sources.asked]])
    hashes = {"rows": sha256_bytes(rows.encode()), MODEL_HASH: fingerprint(sources.loaded.model)}
    manifest = make_manifest(seed=recipe.seed, device=str(find_device(recipe.device)), packages=PACKAGES, hashes=hashes)
    told = recipe.model_dump(mode="json", exclude={"out", "resume"})
    return open_run(recipe.out, told, manifest, recipe.resume, defaults(type(recipe)))


def _answers(recipe: SAERecipe, sources: Sources, folder: Path, teller: Teller) -> list[Response]:
    """The model's own responses, from the run directory if they are there."""
    path = folder / RESPONSES
    if not recipe.own_answers:
        return []
    if path.exists():
        return load_responses(path)
    total, done = len(sources.questions) * recipe.own_answers, 0

    def on_batch(responses: list[Response]) -> None:
        nonlocal done
        done += len(responses)
        teller.on_answers(done, total)

    responses = sample_responses(
        sources.loaded,
        sources.questions,
        n=recipe.own_answers,
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature,
        batch_size=recipe.sample_batch,
        seed=stage_seed(recipe.seed, "answers"),
        chat=recipe.chat,
        on_batch=on_batch,
    )
    save_responses(path, responses)
    return responses


def _rows(recipe: SAERecipe, sources: Sources, responses: Sequence[Response]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to measure on."""
    documents = [*sources.texts, *with_answers(sources.asked, sources.questions, responses)]
    sides = set_aside(documents)
    if not recipe.packed:
        return sides
    longest = _row_tokens(recipe, sources.loaded)
    training, held_out = (packed(rows, sources.loaded.tokenizer, longest) for rows in sides)
    return training, held_out


def _drop_points(path: Path, *, beyond: int) -> None:
    """Drops what a killed run measured after its last checkpoint: it will be measured again."""
    rows: list[dict[str, Any]] = [row for row in read_jsonl(path) if row["step"] <= beyond]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
