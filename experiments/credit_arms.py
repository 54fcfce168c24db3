"""Which credit learns faster on the tiny reasoner: outcome alone, dense in each mode, and packs that mean nothing.

Every arm starts from the same model, with the same questions in the same order for a seed; arms differ in what is added
to the outcome advantage:

- outcome        nothing
- CREDIT         the discovered pack, which passed Gate 1, in each credit mode of `mechreward.reward.credit`
- random         features that fire as often, drawn at random; per token
- failed gate    the features of largest effect after the labels were shuffled, which Gate 1 fails; per token

`prepare` samples KNOWN questions, discovers, gates, and writes the packs; each run writes one JSON file and is skipped
if that is there; the table is made from all files. Accuracy is measured on UNKNOWN questions, with the same seeds.

    python experiments/credit_arms.py --setting easy --out runs/credit-easy
    python experiments/credit_arms.py --setting long --seeds 0 --steps 1 --smoke --out runs/smoke
"""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from scipy.stats import t as student

from mechreward.features import (
    FeaturePack,
    PackFeature,
    build_pack,
    discover,
    load_pack,
    random_packs,
    sae_ref,
    save_pack,
)
from mechreward.files import read_json, write_json
from mechreward.gates import gate1
from mechreward.models import LoadedModel, load_model
from mechreward.reward import Credit, FeatureReward, OutcomeReward
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.sae import SAE, load_sae
from mechreward.tasks import QuestionSplit, load_questions, split_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.training import DenseConfig, TrainConfig, train_arm
from mechreward.verifiers import gsm8k_exact_match

ARMS = ("outcome", *get_args(Credit), "random", "failed gate")


@dataclass(frozen=True)
class Study:
    """Arms x seeds on the bundled reasoner."""

    out: Path
    """Folder of packs, runs and the table."""
    setting: Literal["easy", "long"] = "easy"
    """Problems of 3-5 steps (half the answers right), or of 8-12 (an eighth)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of training: question order and sampling."""
    arms: tuple[str, ...] = ARMS
    """Which arms to run."""
    steps: int = 20
    """Optimiser steps."""
    eval_every: int = 4
    """Steps between evaluations."""
    questions_per_step: int = 16
    """Questions a step."""
    generations: int = 8
    """Completions a question."""
    learning_rate: float = 3e-4
    """Of AdamW, all weights."""
    lam: float = 0.3
    """RMS of the dense advantage as a share of the outcome advantage's (raw lambda for stage3)."""
    known: int = 112
    """Questions to discover, gate and train on."""
    unknown: int = 64
    """Questions to test on, four samples each."""
    workers: int = 2
    """Runs at a time, one thread each."""
    device: str = "cpu"
    """Where runs go."""
    smoke: bool = False
    """A few questions and no gate threshold: shows that the script runs."""

    @property
    def max_new_tokens(self) -> int:
        return 80 if self.setting == "easy" else 160


def main() -> None:
    study = tyro.cli(Study)
    if study.smoke:
        study = replace(study, known=40, unknown=4, questions_per_step=2, generations=4, eval_every=study.steps)
    if not (study.out / "packs.json").exists():
        prepare(study)
    runs = [(study, arm, seed) for seed in study.seeds for arm in study.arms]
    with ProcessPoolExecutor(study.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for arm, seed, seconds in pool.map(run, *zip(*runs, strict=True)):
            print(f"{arm} seed {seed}: {seconds:.0f} s", flush=True)
    results = [read_json(path_of(study, arm, seed)) for _, arm, seed in runs]
    write_json(study.out / "table.json", summary(study, results))
    print(markdown(study, results))


def questions(study: Study) -> QuestionSplit:
    asked = load_questions(f"tiny:{study.setting}", limit=study.known + study.unknown, seed=0)
    return split_questions(asked, study.known / (study.known + study.unknown), 0)


def sampled(study: Study, loaded: LoadedModel, asked: Any, n: int, seed: int) -> list[Response]:
    found = sample_responses(loaded, asked, n=n, max_new_tokens=study.max_new_tokens, seed=seed, batch_size=256)
    return verify_responses(found, asked, gsm8k_exact_match)


def prepare(study: Study) -> None:
    """Discovery on one half of KNOWN, Gate 1 of every pack on the other."""
    loaded, sae = load_model(str(MODEL), device=study.device), load_sae(SAE_FOLDER, device=study.device)
    known = questions(study).known
    responses = sampled(study, loaded, known, 8, seed=1)
    half = {question.id for question in known[: len(known) // 2]}
    finding = [response for response in responses if response.question_id in half]
    held_out = [response for response in responses if response.question_id not in half]
    table = discover(loaded, sae, finding)
    found = build_pack(table, sae, name="found", model_name="tiny", n_features=20)
    packs = {
        "found": found,
        "random": random_packs(found, table, 1)[0],
        "failed gate": noise_pack(loaded, sae, finding),
    }
    verdicts = {}
    for name, pack in packs.items():
        result = gate1(FeatureReward(pack, sae), held_out, loaded, table=table, seed=0)
        verdicts[name] = {"verdict": result.verdict, "reason": result.reason, "features": pack.feature_ids()}
        save_pack(pack.model_copy(update={"validation": result.validation()}), study.out / f"{name}.json")
        print(f"{name}: gate 1 {result.verdict}: {result.reason}", flush=True)
    write_json(study.out / "packs.json", verdicts)


def noise_pack(loaded: LoadedModel, sae: SAE, responses: list[Response]) -> FeaturePack:
    """What discovery finds where there is nothing to find: the largest effects under shuffled labels."""
    labels = [response.correct for response in responses]
    random.Random(0).shuffle(labels)
    table = discover(loaded, sae, [replace(r, correct=c) for r, c in zip(responses, labels, strict=True)])
    frame = table.frame[table.frame["scale"] > 0]
    top = frame.loc[frame["effect"].abs().nlargest(20).index]
    rows = zip(top["id"], top["effect"], top["scale"], strict=True)
    features = [PackFeature(id=int(i), weight=float(np.sign(e)) / 20, scale=float(s)) for i, e, s in rows]
    return FeaturePack(name="noise", model_name="tiny", sae=sae_ref(sae), features=features)


def path_of(study: Study, arm: str, seed: int) -> Path:
    return study.out / "runs" / f"{arm.replace(' ', '-')}-{seed}.json"


def run(study: Study, arm: str, seed: int) -> tuple[str, int, float]:
    """One arm with one seed: its accuracy on UNKNOWN over the steps."""
    path, started = path_of(study, arm, seed), time.perf_counter()
    if path.exists():
        return arm, seed, 0.0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    split = questions(study)
    loaded, sae = load_model(str(MODEL), device=study.device), load_sae(SAE_FOLDER, device=study.device)
    pack = load_pack(study.out / f"{arm if arm in ('random', 'failed gate') else 'found'}.json")
    curve: list[dict[str, float]] = []

    def evaluate(policy: LoadedModel, step: int) -> None:
        answers = sampled(study, policy, split.unknown, 4, seed=2)
        curve.append({"step": step, "accuracy": float(np.mean([bool(answer.correct) for answer in answers]))})

    evaluate(loaded, 0)
    train_arm(
        loaded,
        split.known,
        [FeatureReward(pack, sae), OutcomeReward(gsm8k_exact_match)],
        TrainConfig(
            steps=study.steps,
            questions_per_step=study.questions_per_step,
            generations=study.generations,
            max_new_tokens=study.max_new_tokens,
            learning_rate=study.learning_rate,
            save_every=10**6,
            eval_every=study.eval_every,
            seed=seed,
        ),
        study.out / "checkpoints" / path.stem,
        arm=arm,
        dense=DenseConfig(
            weight=0.0 if arm == "outcome" else study.lam,
            credit=arm if arm in get_args(Credit) else "per_token",  # type: ignore[arg-type]
            step_end=".",
            gap_every=0,
        ),
        metrics_path=study.out / "metrics" / f"{path.stem}.jsonl",
        evaluate=evaluate,
    )
    write_json(path, {"arm": arm, "seed": seed, "curve": curve, "seconds": time.perf_counter() - started})
    return arm, seed, time.perf_counter() - started


def interval(values: list[float]) -> tuple[float, float, float] | tuple[float]:
    """Mean and 95 % interval of Student's t over seeds; the mean alone of a single seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return (mean,)
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def words(numbers: tuple[float, ...]) -> str:
    mean, *ends = (f"{number:.3f}" for number in numbers)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def steps_to(curve: list[dict[str, float]], target: float) -> float:
    """The first evaluated step with at least that accuracy; infinity if there is none."""
    return next((point["step"] for point in curve if point["accuracy"] >= target), float("inf"))


def summary(study: Study, results: list[dict[str, Any]]) -> dict[str, Any]:
    """For each arm: final accuracy, its paired difference from outcome alone, steps to outcome's final accuracy."""
    by = {(result["arm"], result["seed"]): result["curve"] for result in results}
    table: dict[str, Any] = {}
    for arm in study.arms:
        final = [by[arm, seed][-1]["accuracy"] for seed in study.seeds]
        base = [by["outcome", seed][-1]["accuracy"] for seed in study.seeds]
        reach = [steps_to(by[arm, seed], target) for seed, target in zip(study.seeds, base, strict=True)]
        table[arm] = {
            "start": by[arm, study.seeds[0]][0]["accuracy"],
            "curve": [
                {
                    "step": by[arm, study.seeds[0]][i]["step"],
                    "accuracy": interval([by[arm, s][i]["accuracy"] for s in study.seeds]),
                }
                for i in range(len(by[arm, study.seeds[0]]))
            ],
            "final": interval(final),
            "minus_outcome": interval([a - b for a, b in zip(final, base, strict=True)]),
            "steps_to_outcome": [None if value == float("inf") else value for value in reach],
        }
    return table


def markdown(study: Study, results: list[dict[str, Any]]) -> str:
    """The table as it goes into the docs."""
    lines = [
        f"{study.setting}: {len(study.seeds)} seeds, {study.steps} steps of {study.questions_per_step} questions "
        f"x {study.generations}",
        "",
        "| arm | final accuracy | minus outcome | steps to outcome's final accuracy, by seed |",
        "|---|---|---|---|",
    ]
    for arm, row in summary(study, results).items():
        final, apart = (words(row[key]) for key in ("final", "minus_outcome"))
        reach = ", ".join("never" if value is None else f"{value:.0f}" for value in row["steps_to_outcome"])
        lines.append(f"| {arm} | {final} | {apart} | {reach} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
