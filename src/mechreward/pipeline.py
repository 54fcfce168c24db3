"""The main job, front door to back: questions and a model in; a gated dense reward, a trained policy and a report out.

`improve` runs these stages in order, each leaving whole files in the run directory and skipped when they are there:

1. baseline   sample and verify responses to the UNKNOWN questions
2. known      sample and verify responses to the KNOWN questions
3. sae        load the SAE, or train one on the model's own responses to KNOWN questions
4. discover   contrast right with wrong within each question of one half of KNOWN -> pack
5. gate       Gate 1 on the other half of KNOWN, scored by the very reward object that would train
6. train      GRPO, one run an arm: same seed, same questions in the same order; and, as `method` says, repair of wrong
              chains by steering and fine-tuning on them, beside as many right answers as they were sampled
7. evaluate   UNKNOWN again, paired with the baseline question by question
8. report     one HTML page

UNKNOWN questions are only ever sampled for evaluation. A run whose gate did not pass stops after stage 5 unless it was
told to go on ungated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechreward.comparison import accuracy, compare_arms
from mechreward.config import Arm, ImproveConfig
from mechreward.errors import InputError
from mechreward.features import (
    ContrastTable,
    FeaturePack,
    NoFeatures,
    build_pack,
    discover,
    load_contrast,
    load_pack,
    pack_prompt,
    save_contrast,
    save_pack,
)
from mechreward.files import append_row, read_json, read_jsonl, write_json
from mechreward.gates import gate1
from mechreward.inputs import FIT, Inputs, check_given_sae, load_policy, open_folder, prepare
from mechreward.models import LoadedModel
from mechreward.repairs import check_repair, run_repairs
from mechreward.report import write_report
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.rollout import Response, load_responses, sample_responses, save_responses, verify_responses
from mechreward.rundir import stage_seed
from mechreward.sae import SAE, Watch, load_sae, own_meta, own_shape, save_sae, train_own_sae
from mechreward.tasks import Question, save_questions, split_questions
from mechreward.training import DenseConfig, TrainConfig, train_arm
from mechreward.views import write_views


@runtime_checkable
class StageProgress(Protocol):
    """Where a run tells what it is doing; the command line draws it, `silent` does not."""

    def stage(self, title: str, total: int | None = None) -> Any:
        """A context manager around one stage, yielding a function that counts `n` more units as done."""


class _Silent:
    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:  # noqa: ARG002
        yield lambda _: None


silent = _Silent()


@dataclass(frozen=True)
class Outcome:
    """What `improve` came to."""

    folder: Path
    report: Path
    verdict: str
    """One or two sentences."""
    passed: bool
    """Whether Gate 1 passed."""
    results: dict[str, Any]
    """What `results.json` holds."""


def improve(config: ImproveConfig, progress: StageProgress = silent) -> Outcome:
    """Runs the main job, or goes on with it (`config.resume`), and returns what came of it.

    Raises:
        InputError: bad input, found before anything is written; or responses that allow no contrast (all right, all
            wrong), after which the run directory holds whole files and a report that says so.
    """
    started = time.perf_counter()
    inputs = prepare(config)
    check_repair(inputs)
    folder = open_folder(inputs)
    save_questions(folder / "questions.parquet", inputs.split)
    sample(inputs, folder, "baseline", progress)
    responses = sample(inputs, folder, "known", progress)
    try:
        sae = get_sae(inputs, folder, responses, progress)
        halves = split_questions(inputs.split.known, 0.5, stage_seed(config.seed, "gate"))
        pack, table = discover_pack(inputs, folder, sae, answers_to(responses, halves.known), progress)
        gate = judge_pack(
            inputs, folder, FeatureReward(pack, sae), table, answers_to(responses, halves.unknown), progress
        )
    except NoFeatures as error:
        return finish(
            folder, {"verdict": f"There is no pack to gate: {error}. Nothing was trained.", "arms": {}}, started
        )
    except InputError as error:
        finish(folder, {"verdict": f"Stopped before Gate 1: {error}.", "arms": {}}, started)
        raise
    if gate["verdict"] != "pass" and not config.ungated:
        verdict = f"Gate 1 did not pass ({gate['verdict']}): {gate['reason']}. Nothing was trained."
        return finish(folder, {"verdict": verdict, "arms": {}}, started, gate)
    for arm in config.grpo_arms:
        run_arm(inputs, folder, arm, FeatureReward(load_pack(folder / "pack.json"), sae), progress)
    try:
        repairs = run_repairs(inputs, folder, sae, responses, partial(answer_unknown, inputs), progress.stage)
    except InputError as error:
        results = compare_arms(config.grpo_arms, folder)
        words = f"{results['verdict']} Repair stopped: {error}.".strip()
        outcome = finish(folder, results | {"verdict": words}, started, gate)
        if isinstance(error, NoFeatures):
            return outcome
        raise
    write_views(inputs, folder, sae)
    return finish(folder, compare_arms([*config.grpo_arms, *config.repair_arms], folder) | repairs, started, gate)


def sample(inputs: Inputs, folder: Path, stage: str, progress: StageProgress) -> list[Response]:
    """Responses of the untrained model to UNKNOWN ("baseline") or KNOWN ("known") questions."""
    path = folder / "responses" / f"{stage}.parquet"
    if path.exists():
        return load_responses(path)
    questions = inputs.split.known if stage == "known" else inputs.split.unknown
    n = inputs.config.samples if stage == "known" else inputs.config.eval_samples
    with progress.stage(f"sample {stage}: {len(questions)} questions x {n}", len(questions) * n) as advance:
        responses = verified(inputs, inputs.loaded, questions, n, stage_seed(inputs.config.seed, stage), advance)
    save_responses(path, responses)
    return responses


def verified(
    inputs: Inputs,
    loaded: LoadedModel,
    questions: Sequence[Question],
    n: int,
    seed: int,
    advance: Callable[[int], None],
) -> list[Response]:
    """`n` verified responses of `loaded` to each question; `advance` is told how many more there are."""
    config = inputs.config
    responses = sample_responses(
        loaded,
        questions,
        n=n,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        seed=seed,
        chat=config.chat,
        on_batch=lambda batch: advance(len(batch)),
    )
    return verify_responses(responses, questions, inputs.verifier)


def answer_unknown(inputs: Inputs, policy: LoadedModel) -> list[Response]:
    """A policy's verified responses to UNKNOWN questions, sampled with the seeds of the baseline."""
    seed = stage_seed(inputs.config.seed, "baseline")
    return verified(inputs, policy, inputs.split.unknown, inputs.config.eval_samples, seed, lambda _: None)


def answers_to(responses: Sequence[Response], questions: Sequence[Question]) -> list[Response]:
    ids = {question.id for question in questions}
    return [response for response in responses if response.question_id in ids]


def get_sae(inputs: Inputs, folder: Path, responses: Sequence[Response], progress: StageProgress) -> SAE:
    """The SAE given, or one trained on the KNOWN responses' residuals and kept in the run directory."""
    config = inputs.config
    if inputs.sae is not None:
        if not (folder / FIT).exists():
            write_json(folder / FIT, check_given_sae(inputs.sae, inputs.loaded, responses).to_dict())
        return inputs.sae
    if (folder / "sae" / "cfg.json").exists():
        return load_sae(folder / "sae", device=config.device)
    meta = own_meta(inputs.loaded, inputs.layer, release=str(folder / "sae"), model_name=config.model)
    rows = [(response.prompt_ids, response.completion_ids) for response in responses]
    seed = stage_seed(config.seed, "sae")
    with progress.stage(f"train SAE on block {inputs.layer}", config.sae_tokens) as advance:
        seen = 0

        def on_step(tokens: int, _: float) -> None:
            nonlocal seen
            advance(tokens - seen)
            seen = tokens

        trained = train_own_sae(
            inputs.loaded,
            rows,
            own_shape(inputs.loaded, expansion=config.sae_expansion, k=config.sae_k),
            meta=meta,
            n_tokens=config.sae_tokens,
            seed=seed,
            device=config.device,
            watch=Watch(on_step=on_step),
        )
    save_sae(trained.sae, folder / "sae")
    write_json(folder / FIT, {"fvu": trained.fvu, "l0": trained.l0, "dead_share": trained.dead_share})
    return trained.sae


def discover_pack(
    inputs: Inputs, folder: Path, sae: SAE, responses: Sequence[Response], progress: StageProgress
) -> tuple[FeaturePack, ContrastTable]:
    """Within-question contrast of every feature on the discovery half of KNOWN."""
    config = inputs.config
    if (folder / "pack.json").exists():
        return load_pack(folder / "pack.json"), load_contrast(folder / "features.parquet")
    with progress.stage(f"discover: {sae.d_sae} features, {len(responses)} responses"):
        seed = stage_seed(config.seed, "discover")
        table = discover(inputs.loaded, sae, responses, pooling=config.pooling, seed=seed)
        save_contrast(table, folder / "features.parquet")
        pack = build_pack(
            table,
            sae,
            name=f"{Path(config.model).name}/{config.questions.replace(':', '-')}",
            model_name=config.model,
            n_features=config.n_features,
            signs=config.signs,
            prompt=pack_prompt(config.prompt_format, config.chat, inputs.loaded.tokenizer),
            provenance={
                "questions": config.questions,
                "n_questions": table.n_questions,
                "n_mixed": table.n_mixed,
                "seed": config.seed,
            },
        )
    save_pack(pack, folder / "pack.json")
    return pack, table


def judge_pack(
    inputs: Inputs,
    folder: Path,
    reward: FeatureReward,
    table: ContrastTable,
    responses: Sequence[Response],
    progress: StageProgress,
) -> dict[str, Any]:
    """Gate 1 on the other half of KNOWN; the verdict is written into the pack that will train."""
    path = folder / "gate1.json"
    if path.exists():
        gate: dict[str, Any] = read_json(path)
        return gate
    with progress.stage(f"gate 1: {len(responses)} held-out responses"):
        result = gate1(reward, responses, inputs.loaded, table=table, seed=stage_seed(inputs.config.seed, "gate"))
    save_pack(reward.pack.model_copy(update={"validation": result.validation()}), folder / "pack.json")
    write_json(path, result.to_dict())
    return result.to_dict()


def run_arm(inputs: Inputs, folder: Path, arm: Arm, reward: FeatureReward, progress: StageProgress) -> None:
    """Trains one arm on KNOWN and samples UNKNOWN with it, with the seeds of the baseline.

    Both arms read and log the features; in the `outcome` arm their weight is 0, which is TRL's own GRPO bit for bit.
    """
    config = inputs.config
    path = folder / "responses" / f"final-{arm}.parquet"
    if path.exists():
        return
    metrics = folder / "metrics.jsonl"
    with progress.stage(f"train {arm}: {config.steps} steps", config.steps) as advance:

        def evaluate(policy: LoadedModel, step: int) -> None:
            advance(config.eval_every)
            numbers = accuracy(answer_unknown(inputs, policy))
            append_row(metrics, {"arm": arm, "seed": config.seed, "step": step, "kind": "eval"} | numbers)

        if not any(row["arm"] == arm for row in read_jsonl(metrics)):
            baseline = load_responses(folder / "responses" / "baseline.parquet")
            append_row(metrics, {"arm": arm, "seed": config.seed, "step": 0, "kind": "eval"} | accuracy(baseline))
        policy = train_arm(
            load_policy(config),
            inputs.split.known,
            [reward, OutcomeReward(inputs.verifier)],
            train_config(config),
            folder / "checkpoints" / arm,
            arm=arm,
            dense=DenseConfig(
                weight=config.dense_weight if arm == "dense" else 0.0,
                credit=config.credit,
                gamma=config.gamma,
                step_end=config.step_end,
            ),
            metrics_path=metrics,
            rollouts_path=folder / "rollouts.parquet",
            evaluate=evaluate,
        )
    with progress.stage(f"evaluate {arm}: {len(inputs.split.unknown)} questions x {config.eval_samples}"):
        save_responses(path, answer_unknown(inputs, policy))


def train_config(config: ImproveConfig) -> TrainConfig:
    """What of a run's settings training takes."""
    same = set(TrainConfig.__dataclass_fields__) & set(ImproveConfig.model_fields)
    return TrainConfig(**{field: getattr(config, field) for field in same})


def finish(folder: Path, results: dict[str, Any], started: float, gate: dict[str, Any] | None = None) -> Outcome:
    """Writes `results.json` and the report."""
    passed = gate is not None and gate["verdict"] == "pass"
    if results["arms"] and not passed:
        results["verdict"] = f"Trained without a passed gate ({gate and gate['verdict']}). {results['verdict']}"
    write_json(folder / "results.json", results | {"runtime_s": round(time.perf_counter() - started, 1)})
    return Outcome(folder, write_report(folder), results["verdict"], passed, results)
