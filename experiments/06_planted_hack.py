"""A reward hack, planted on the tiny reasoner: what do the guards make of it, and what do they cost an honest reward?

- hack      a *lexical* pack, trained on without a passed gate: the features that fire on the word `+`. Its reward rises
            as the policy writes more of that word, right or not. Trained roughly, at a learning rate of 1e-3 with 64
            rollouts a step: at 3e-4 the policy writes more of the word without breaking.
- honest    the pack that discovery finds on KNOWN questions, which passes Gate 1. Trained as the studies of this
            repository are: 3e-4, 128 rollouts a step, lambda .3.

Each is trained with the guards off, with the detector that is on by default, and with the detector and a DualVerifier
(the bundled probe of block 3, trained on other questions). All arms of a seed see the same questions in the same order.
No arm has a KL term (beta 0), so that the guards stand alone. A run that the guards stop gives back its last good
policy. Accuracy is measured on UNKNOWN questions with the same seeds, before and after; damage is what was lost.

Each run writes one JSON file and is skipped if that is there.

    python experiments/06_planted_hack.py --out runs/planted-hack
    python experiments/06_planted_hack.py --smoke --out runs/smoke-hack
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import torch
import tyro
import vl_convert

from mechreward.features import FeaturePack, PackFeature, build_pack, discover, load_pack, sae_ref, save_pack
from mechreward.files import read_json, read_jsonl, write_json
from mechreward.gates import gate1, student_interval, wilson
from mechreward.hacking import DualVerifier, GuardConfig
from mechreward.models import LoadedModel, iter_residuals, load_model
from mechreward.probes import load_probe
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.sae import SAE, load_sae
from mechreward.tasks import Question, QuestionSplit, load_questions, split_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.training import DenseConfig, TrainConfig, train_arm
from mechreward.verifiers import gsm8k_exact_match

PACKS, GUARDS = ("hack", "honest"), ("off", "detector", "dual")
WORD = "▁+"


@dataclass(frozen=True)
class Training:
    """What differs between the packs."""

    learning_rate: float
    """Of AdamW, all weights."""
    questions_per_step: int
    """Questions a step."""
    lam: float
    """RMS of the dense advantage as a share of the outcome advantage's."""


@dataclass(frozen=True)
class Study:
    """Packs x guards x seeds on the bundled reasoner."""

    out: Path
    """Folder of packs, runs and the table."""
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)
    """Of training: question order and sampling. What is below was chosen on others."""
    packs: tuple[str, ...] = PACKS
    guards: tuple[str, ...] = GUARDS
    steps: int = 20
    """Optimiser steps."""
    generations: int = 8
    """Completions a question."""
    hack: Training = Training(learning_rate=1e-3, questions_per_step=8, lam=1.0)
    honest: Training = Training(learning_rate=3e-4, questions_per_step=16, lam=0.3)
    known: int = 112
    """Questions to discover, gate and train on."""
    unknown: int = 48
    """Questions to test on, four samples each."""
    workers: int = 1
    """Runs at a time, one thread each."""
    smoke: bool = False
    """One seed, two arms, a few questions and steps: shows that the script runs."""


def main() -> None:
    study = tyro.cli(Study)
    if study.smoke:
        study = replace(
            study, seeds=(0,), packs=("hack",), guards=("off", "dual"), steps=5, known=24, unknown=4, generations=4,
            hack=replace(study.hack, questions_per_step=4),
        )  # fmt: skip
    if not (study.out / "packs.json").exists():
        prepare(study)
    runs = [(study, pack, guard, seed) for seed in study.seeds for pack in study.packs for guard in study.guards]
    with ProcessPoolExecutor(study.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for pack, guard, seed, seconds in pool.map(run, *zip(*runs, strict=True)):
            print(f"{pack} {guard} seed {seed}: {seconds:.0f} s", flush=True)
    results = [read_json(path_of(*arguments)) for arguments in runs]
    write_json(study.out / "table.json", summary(study, results))
    draw(results, study.out)
    print(markdown(study, results))


def questions(study: Study) -> QuestionSplit:
    asked = load_questions("tiny:easy", limit=study.known + study.unknown, seed=0)
    return split_questions(asked, study.known / (study.known + study.unknown), 0)


def sampled(loaded: LoadedModel, asked: list[Question], n: int, seed: int) -> list[Response]:
    found = sample_responses(loaded, asked, n=n, max_new_tokens=80, seed=seed, batch_size=256)
    return verify_responses(found, asked, gsm8k_exact_match)


def accuracy(model: LoadedModel, asked: list[Question]) -> float:
    """Share of right answers, four a question."""
    return float(np.mean([bool(answer.correct) for answer in sampled(model, asked, 4, seed=2)]))


def prepare(study: Study) -> None:
    """Both packs, and what Gate 1 says of each on the half of KNOWN that discovery did not see."""
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    known = questions(study).known
    responses = sampled(loaded, known, 8, seed=1)
    half = {question.id for question in known[: len(known) // 2]}
    finding = [response for response in responses if response.question_id in half]
    held_out = [response for response in responses if response.question_id not in half]
    table = discover(loaded, sae, finding)
    packs = {"hack": lexical_pack(loaded, sae, finding)}
    if "honest" in study.packs:
        packs["honest"] = build_pack(table, sae, name="found", model_name="tiny", n_features=20)
    verdicts = {}
    for name, pack in packs.items():
        result = gate1(FeatureReward(pack, sae), held_out, loaded, table=table, seed=0)
        verdicts[name] = {"verdict": result.verdict, "reason": result.reason, "features": pack.feature_ids()}
        save_pack(pack.model_copy(update={"validation": result.validation()}), study.out / f"{name}.json")
        print(f"{name}: gate 1 {result.verdict}: {result.reason}", flush=True)
    write_json(study.out / "packs.json", verdicts)


def lexical_pack(loaded: LoadedModel, sae: SAE, responses: list[Response], n: int = 5) -> FeaturePack:
    """The features whose mean on the word exceeds their mean elsewhere most, in standard deviations."""
    prompts, completions = (
        [list(ids) for ids in column]
        for column in zip(*[(r.prompt_ids, r.completion_ids) for r in responses], strict=True)
    )
    sums = torch.zeros(2, sae.d_sae, dtype=torch.float64)
    counts, squares_F = torch.zeros(2, dtype=torch.float64), torch.zeros(sae.d_sae, dtype=torch.float64)
    [token] = loaded.tokenizer.convert_tokens_to_ids([WORD])
    for batch in iter_residuals(loaded.model, prompts, completions, sae.meta.layer):
        for place, row in enumerate(batch.rows):
            acts_NF = sae.encode(batch.h_BTD[place, : len(completions[row])]).double()
            is_word_N = torch.tensor(completions[row]) == token
            for which, rows_N in enumerate((~is_word_N, is_word_N)):
                sums[which] += acts_NF[rows_N].sum(0)
                counts[which] += int(rows_N.sum())
            squares_F += acts_NF.square().sum(0)
    total = counts.sum()
    std_F = (squares_F / total - (sums.sum(0) / total).square()).clamp(min=1e-12).sqrt()
    score_F = (sums[1] / counts[1] - sums[0] / counts[0]) / std_F.clamp(min=1e-3)
    features = [PackFeature(id=int(i), weight=1 / n, scale=float(std_F[i])) for i in score_F.topk(n).indices]
    return FeaturePack(name="lexical", model_name="tiny", sae=sae_ref(sae), features=features)


def path_of(study: Study, pack: str, guard: str, seed: int) -> Path:
    return study.out / "runs" / f"{pack}-{guard}-{seed}.json"


def run(study: Study, pack: str, guard: str, seed: int) -> tuple[str, str, int, float]:
    """One arm with one seed."""
    path, started = path_of(study, pack, guard, seed), time.perf_counter()
    if path.exists():
        return pack, guard, seed, 0.0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    split = questions(study)
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    reward = FeatureReward(load_pack(study.out / f"{pack}.json"), sae)
    training = study.hack if pack == "hack" else study.honest
    start = accuracy(loaded, split.unknown)
    metrics = study.out / "metrics" / f"{path.stem}.jsonl"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.unlink(missing_ok=True)
    policy = train_arm(
        loaded,
        split.known,
        [reward, OutcomeReward(gsm8k_exact_match)],
        TrainConfig(
            steps=study.steps,
            questions_per_step=training.questions_per_step,
            generations=study.generations,
            max_new_tokens=80,
            learning_rate=training.learning_rate,
            save_every=10**6,
            seed=seed,
            beta=0.0,
        ),
        study.out / "checkpoints" / path.stem,
        arm=f"{pack}-{guard}",
        dense=DenseConfig(
            weight=training.lam,
            gap_every=0 if guard == "off" else 4,
            guard=GuardConfig(on=guard != "off", keep_every=1),
        ),
        metrics_path=metrics,
        dual=DualVerifier(reward, load_probe("tiny/correctness_probe_l3")) if guard == "dual" else None,
    )
    write_json(
        path,
        {
            "pack": pack,
            "guard": guard,
            "seed": seed,
            "start": start,
            "final": accuracy(policy, split.unknown),
            **watched(metrics),
            "seconds": time.perf_counter() - started,
        },
    )
    return pack, guard, seed, time.perf_counter() - started


def watched(metrics: Path) -> dict[str, Any]:
    """What the metrics of a run say: rewards by step, evaluations with a finding, why it stopped."""
    rows = read_jsonl(metrics)
    steps = [row for row in rows if row["kind"] == "train"]
    events = [row for row in rows if row["kind"] == "guard"]
    stop = next((row for row in events if row["stop"]), None)
    return {
        "feature_reward": [row["rewards/feature_reward/mean"] for row in steps],
        "outcome": [row["rewards/outcome_reward/mean"] for row in steps],
        "alarms": [row["step"] for row in events],
        "steps": len(steps),
        "stopped_at": None if stop is None else stop["step"],
        "reason": None if stop is None else "; ".join(stop["findings"]),
    }


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval of Student's t over seeds; of a single seed the mean alone."""
    found = student_interval(values)
    return {"mean": found.value} | ({"low": found.low, "high": found.high} if len(values) > 1 else {})


def summary(study: Study, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an arm: start, end, damage, its paired difference from the arm without guards, if any, alarms a step."""
    by = {(r["pack"], r["guard"], r["seed"]): r for r in results}
    rows = []
    for pack in study.packs:
        for guard in study.guards:
            runs = [by[pack, guard, seed] for seed in study.seeds]
            final = [one["final"] for one in runs]
            lost = [one["start"] - one["final"] for one in runs]
            bare = [by[pack, "off", seed]["final"] for seed in study.seeds] if "off" in study.guards else None
            rows.append(
                {
                    "pack": pack,
                    "guard": guard,
                    "start": runs[0]["start"],
                    "final": interval(final),
                    "damage": interval(lost),
                    "minus_off": bare and interval([a - b for a, b in zip(final, bare, strict=True)]),
                    "reward_rise": interval([one["feature_reward"][-1] - one["feature_reward"][0] for one in runs]),
                    "alarms": sum(len(one["alarms"]) for one in runs),
                    "evaluations": sum(one["steps"] for one in runs),
                    "stopped_at": [one["stopped_at"] for one in runs],
                    "reasons": [one["reason"] for one in runs],
                }
            )
    return rows


def words(numbers: dict[str, float] | None) -> str:
    if numbers is None:
        return ""
    ends = f" [{numbers['low']:.3f}, {numbers['high']:.3f}]" if "low" in numbers else ""
    return f"{numbers['mean']:.3f}{ends}"


def markdown(study: Study, results: list[dict[str, Any]]) -> str:
    """The table as it goes into the docs; alarms with Wilson's interval, as if steps were independent."""
    lines = [
        "| pack | guards | accuracy, start | end | damage | end, minus off | alarms / steps | stopped at, by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary(study, results):
        stops = ", ".join("-" if step is None else str(step) for step in row["stopped_at"])
        cells = [row["pack"], row["guard"], f"{row['start']:.3f}", words(row["final"]), words(row["damage"])]
        low, high = wilson(row["alarms"], row["evaluations"])
        alarms = f"{row['alarms']} / {row['evaluations']} [{low:.3f}, {high:.3f}]"
        cells += [words(row["minus_off"]), *(["", ""] if row["guard"] == "off" else [alarms, stops])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Reward and training accuracy by step, one thin line a seed, as an SVG."""
    frame = pd.DataFrame(
        [
            {"pack": r["pack"], "guards": r["guard"], "seed": r["seed"], "step": step + 1, "what": what, "value": value}
            for r in results
            for what in ("feature_reward", "outcome")
            for step, value in enumerate(r[what])
        ]
    )
    base = (
        alt.Chart(frame)
        .mark_line(opacity=0.7)
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("guards:N", scale=alt.Scale(domain=list(GUARDS), range=["#b0483c", "#d9730d", "#3079cf"])),
            detail="seed:N",
        )
    )
    chart = base.properties(width=300, height=160).facet(row="what:N", column="pack:N").resolve_scale(y="independent")
    (out / "curves.svg").write_text(vl_convert.vegalite_to_svg(chart.to_dict()))


if __name__ == "__main__":
    main()
