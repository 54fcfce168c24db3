"""Does training on repaired chains help on UNKNOWN questions, and more than training on as many sampled right ones?

For each seed: tiny problems are split into KNOWN and UNKNOWN; the bundled reasoner answers KNOWN; wrong chains are
repaired by steering (cross-fitted, cut before the first wrong step of the worked solution). Arms, each from the
untrained model:

- `none`: not trained;
- `rejection_sft`: SFT on as many right responses, sampled and not repaired. The baseline to beat;
- `repair_sft`: SFT on the repaired chains;
- `repair_dpo`: DPO, repaired over wrong.

Each arm answers UNKNOWN questions, and variations of them (`tasks.fuzz`), with the same seed. Accuracy's intervals are
clustered by question; differences to `none` and to `rejection_sft` are paired by question within a seed, and the mean
over seeds has a t interval. One JSON file a seed and arm: a killed study goes on where it stopped.

    python experiments/repair_tiny.py --out runs/repair-tiny
    python experiments/repair_tiny.py --out runs/repair-smoke --smoke
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from mechreward.chains import Roller
from mechreward.files import read_json, write_json
from mechreward.gates import accuracy_interval, question_means, student_interval
from mechreward.models import load_model
from mechreward.rollout import load_responses, sample_responses, save_responses, verify_responses
from mechreward.sae import load_sae
from mechreward.steering import RepairConfig, kept_repairs, load_repairs, rejection_pairs, repair_known
from mechreward.steering.repair import save_repairs, summarise
from mechreward.tasks import KINDS, Question, QuestionSplit, fuzz, load_questions, split_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.training import FinetuneConfig, finetune
from mechreward.verifiers import gsm8k_exact_match

ARMS = ("none", "rejection_sft", "repair_sft", "repair_dpo")
SETS = ("unknown", "fuzzed")


@dataclass(frozen=True)
class Study:
    """Repair, then training, on the bundled reasoner."""

    out: Path
    """Folder; a study that was killed goes on in it."""
    setting: str = "easy"
    questions: int = 600
    """Half of them KNOWN."""
    samples: int = 8
    """Responses to a KNOWN question."""
    eval_samples: int = 4
    """Responses to an UNKNOWN question, and to a variation."""
    tries: int = 4
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 2
    batch_size: int = 16
    sft_learning_rate: float = 1e-4
    dpo_learning_rate: float = 3e-5
    smoke: bool = False
    """A few questions and one seed, to see that it runs."""


def main(study: Study) -> None:
    if study.smoke:
        study = replace(study, questions=60, samples=6, eval_samples=2, tries=2, seeds=(0,), epochs=1)
    settings = {key: value for key, value in asdict(study).items() if key != "out"}
    started = study.out / "study.json"
    if started.exists() and read_json(started) != _listed(settings):
        raise SystemExit(f"out: {study.out} holds a study with other settings; use a new folder")
    write_json(started, _listed(settings))
    for seed in study.seeds:
        split = _split(study, seed)
        prepare(study, seed, split)
        for arm in ARMS:
            run_arm(study, seed, arm, split)
    results = gather(study)
    write_json(study.out / "results.json", results)
    print(table(results))


def _listed(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _split(study: Study, seed: int) -> QuestionSplit:
    return split_questions(load_questions(f"tiny:{study.setting}", limit=study.questions, seed=seed), 0.5, seed)


def prepare(study: Study, seed: int, split: QuestionSplit) -> None:
    """Responses to KNOWN questions, and their repairs."""
    folder = study.out / f"seed-{seed}"
    if (folder / "repair.json").exists():
        return
    loaded = load_model(str(MODEL))
    drawn = sample_responses(loaded, split.known, n=study.samples, max_new_tokens=192, seed=seed)
    responses = verify_responses(drawn, split.known, gsm8k_exact_match)
    save_responses(folder / "known.parquet", responses)
    roller = Roller(loaded, split.known, gsm8k_exact_match, 192, seed=seed)
    config = RepairConfig(critical="solution", tries=study.tries, pooling="step_end:.")
    attempts = repair_known(roller, load_sae(str(SAE_FOLDER)), responses, config)
    save_repairs(folder / "repairs.parquet", kept_repairs(attempts))
    write_json(folder / "repair.json", summarise(attempts))


def run_arm(study: Study, seed: int, arm: str, split: QuestionSplit) -> None:
    """Trains one arm and writes its accuracy on UNKNOWN and on variations of UNKNOWN, question by question."""
    folder = study.out / f"seed-{seed}"
    path = folder / f"{arm}.json"
    if path.exists():
        return
    loaded = load_model(str(MODEL))
    repairs = [one.pair() for one in load_repairs(folder / "repairs.parquet")]
    if arm != "none":
        pairs = repairs
        if arm == "rejection_sft":
            pairs = rejection_pairs(load_responses(folder / "known.parquet"), len(repairs), seed)
        method = "dpo" if arm == "repair_dpo" else "sft"
        rate = study.dpo_learning_rate if method == "dpo" else study.sft_learning_rate
        config = FinetuneConfig(epochs=study.epochs, batch_size=study.batch_size, learning_rate=rate, seed=seed)
        loaded = finetune(loaded, pairs, method, split, config)
    fuzzed = [variation.question for variation in fuzz(split.unknown, tuple(KINDS), seed=seed)]
    found: dict[str, Any] = {"n_pairs": 0 if arm == "none" else len(repairs)}
    for name, questions in zip(SETS, (split.unknown, fuzzed), strict=True):
        drawn = sample_responses(loaded, questions, n=study.eval_samples, max_new_tokens=192, seed=seed)
        found[name] = _accuracy(verify_responses(drawn, questions, gsm8k_exact_match), questions)
    write_json(path, found)


def _accuracy(responses: Sequence[Any], questions: Sequence[Question]) -> dict[str, Any]:
    right, families = [bool(r.correct) for r in responses], [r.question_id.split("~")[0] for r in responses]
    interval = accuracy_interval(right, families)
    means = question_means(right, families)
    return {"accuracy": interval.value, "interval": [interval.low, interval.high], "n": len(right),
            "n_questions": len(questions), "by_question": means}  # fmt: skip


def gather(study: Study) -> dict[str, Any]:
    """Every seed's numbers, and over seeds the mean difference with its t interval."""
    runs = {s: {arm: read_json(study.out / f"seed-{s}" / f"{arm}.json") for arm in ARMS} for s in study.seeds}
    repair = {s: read_json(study.out / f"seed-{s}" / "repair.json") for s in study.seeds}
    differences: dict[str, Any] = {}
    for name in SETS:
        for base in ("none", "rejection_sft"):
            for arm in ARMS[1:]:
                if arm != base:
                    values = [runs[s][arm][name]["accuracy"] - runs[s][base][name]["accuracy"] for s in study.seeds]
                    differences[f"{name}: {arm} - {base}"] = over_seeds(values)
    return {"repair": repair, "runs": runs, "differences": differences}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and Student's 95 % interval where there are two seeds or more."""
    found = student_interval(values)
    ends = [found.low, found.high] if len(values) > 1 else None
    return {"mean": found.value, "interval": ends, "n_seeds": len(values)}


def table(results: dict[str, Any]) -> str:
    lines = ["| difference in accuracy | mean over seeds | 95 % | seeds |", "|---|---|---|---|"]
    for name, row in results["differences"].items():
        interval = "" if row["interval"] is None else "[{:+.3f}, {:+.3f}]".format(*row["interval"])
        lines.append(f"| {name} | {row['mean']:+.3f} | {interval} | {row['n_seeds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Study))
