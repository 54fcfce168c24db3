"""The stages that every run shares which trains a policy: answers of the untrained model, an arm of GRPO, the end.

Each leaves whole files in the run directory and is skipped when they are there. `pipeline` puts them in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechreward.comparison import accuracy
from mechreward.config import Arm, RunConfig
from mechreward.files import append_row, read_jsonl, write_json
from mechreward.inputs import Inputs, load_policy
from mechreward.models import LoadedModel
from mechreward.report import write_report
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.rollout import Response, load_responses, sample_responses, save_responses, verify_responses
from mechreward.rundir import stage_seed
from mechreward.tasks import Question
from mechreward.training import DenseConfig, TrainConfig, last_checkpoint, train_arm
from mechreward.training.last_good import GOOD


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
    """What a run came to."""

    folder: Path
    report: Path
    verdict: str
    """One or two sentences."""
    passed: bool
    """Whether Gate 1 passed."""
    results: dict[str, Any]
    """What `results.json` holds."""


def sample_baseline(inputs: Inputs[RunConfig], folder: Path, progress: StageProgress) -> list[Response]:
    """Responses of the untrained model to UNKNOWN questions."""
    return sampled(inputs, folder, "baseline", inputs.split.unknown, inputs.config.eval_samples, progress)


def sampled(
    inputs: Inputs[RunConfig], folder: Path, stage: str, questions: Sequence[Question], n: int, progress: StageProgress
) -> list[Response]:
    """`n` verified responses of the untrained model to each question, kept as `responses/STAGE.parquet`."""
    path = folder / "responses" / f"{stage}.parquet"
    if path.exists():
        return load_responses(path)
    with progress.stage(f"sample {stage}: {len(questions)} questions x {n}", len(questions) * n) as advance:
        responses = verified(inputs, inputs.loaded, questions, n, stage_seed(inputs.config.seed, stage), advance)
    save_responses(path, responses)
    return responses


def verified(
    inputs: Inputs[RunConfig],
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


def answer_unknown(inputs: Inputs[RunConfig], policy: LoadedModel) -> list[Response]:
    """A policy's verified responses to UNKNOWN questions, sampled with the seeds of the baseline."""
    seed = stage_seed(inputs.config.seed, "baseline")
    return verified(inputs, policy, inputs.split.unknown, inputs.config.eval_samples, seed, lambda _: None)


def run_arm(inputs: Inputs[RunConfig], folder: Path, arm: Arm, reward: FeatureReward, progress: StageProgress) -> None:
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
            grpo_options(config),
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


def grpo_options(config: RunConfig) -> TrainConfig:
    """What of a run's settings training takes."""
    same = set(TrainConfig.__dataclass_fields__) & set(RunConfig.model_fields)
    return TrainConfig(**{field: getattr(config, field) for field in same})


def kept_policies(folder: Path) -> dict[str, Path]:
    """By arm, where a run kept the policy it ended with: the last good one of an arm that its guards stopped, else the
    last checkpoint, else, of one that was fine-tuned, the model itself."""
    stopped = {row["arm"] for row in read_jsonl(folder / "metrics.jsonl") if row["kind"] == "guard" and row["stop"]}
    found = {}
    for path in sorted((folder / "checkpoints").glob("*/")):
        own = path if any((path / name).exists() for name in ("config.json", "adapter_config.json")) else None
        last = path / GOOD if path.name in stopped else last_checkpoint(path) or own
        if last is not None:
            found[path.name] = last
    return found


def finish(folder: Path, results: dict[str, Any], started: float, gate: str | None = None) -> Outcome:
    """Writes `results.json` and the report.

    Args:
        gate: Gate 1's verdict, or what is known of a pack that was not judged; None if there is no pack. Of no matter
            to the outcome alone.
    """
    if set(results["arms"]) - {"outcome"} and gate != "pass":
        results["verdict"] = f"Trained without a passed gate ({gate}). {results['verdict']}"
    policies = {arm: str(path.relative_to(folder)) for arm, path in kept_policies(folder).items()}
    results = results | {"policies": policies, "runtime_s": round(time.perf_counter() - started, 1)}
    write_json(folder / "results.json", results)
    return Outcome(folder, write_report(folder), results["verdict"], gate == "pass", results)
