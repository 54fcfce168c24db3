"""A run directory as the main job leaves it: small, seeded, with every file the report reads."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

SCRIPT = "<script>alert('from the model')</script>"
NAMES = ("Anna", "Ben", "Clara", "David")


def write_fake_run(folder: Path, *, gate: str = "pass", steps: int = 40, rollouts: int = 32) -> Path:
    """Writes a whole run; with a gate that is not `pass`, one that stopped after it."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    _write_start(folder)
    questions = _write_questions(folder, rng)
    _write_responses(folder, "baseline", questions[24:], 4, rng)
    _write_responses(folder, "known", questions[:24], 8, rng)
    _write_pack(folder)
    _write_gate(folder, gate)
    if gate == "pass":
        _write_metrics(folder, steps, rng)
        _write_rollouts(folder, questions, rollouts, rng)
        _write_results(folder)
    else:
        verdict_words = f"Gate 1 did not pass ({gate}): the reason stands in gate1.json. Nothing was trained."
        (folder / "results.json").write_text(json.dumps({"verdict": verdict_words, "arms": {}, "runtime_s": 48.2}))
    return folder


def _write_start(folder: Path) -> None:
    config = {
        "questions": "tiny:long", "model": "tiny", "verifier": "gsm8k", "samples": 8, "eval_samples": 4, "layer": 2,
        "arms": ["outcome", "dense"], "steps": 40, "dense_weight": 0.3, "learning_rate": 1e-05, "seed": 0,
        "generator_options": {},
    }  # fmt: skip
    manifest = {
        "versions": {"mechreward": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
        "seed": 0,
        "device": "cpu",
        "created": "2026-03-04T10:20:30+00:00",
        "hashes": {"questions.parquet": "5f2c" * 16, "sae": "ab12" * 16},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _write_questions(folder: Path, rng: random.Random) -> list[dict]:
    rows = []
    for index in range(40):
        name, first, second = rng.choice(NAMES), rng.randint(10, 60), rng.randint(2, 40)
        rows.append({
            "id": f"q{index:03d}",
            "prompt": f"{name} has {first} apples and buys {second} more, then gives 7 away. How many are left?\n",
            "answer": str(first + second - 7),
            "solution": None,
            "split": "known" if index < 24 else "unknown",
        })  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "questions.parquet")
    return rows


def _write_responses(folder: Path, stage: str, questions: list[dict], samples: int, rng: random.Random) -> None:
    rows = [
        {
            "question_id": question["id"], "sample": sample, "prompt_ids": [1, 2], "completion_ids": [5] * 30,
            "text": "…", "logprobs": [-0.1] * 30, "finish": "eos" if sample else "length",
            "correct": rng.random() < 0.3, "lenient": True, "extracted": "1", "reason": "match",
        }
        for question in questions
        for sample in range(samples)
    ]  # fmt: skip
    (folder / "responses").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "responses" / f"{stage}.parquet")


def _write_pack(folder: Path) -> None:
    ids = [17, 203, 411, 650, 902, 1111, 1490, 1777]
    features = [
        {
            "id": feature, "weight": round((-1) ** (rank // 3) * (1 - rank / 10), 3), "scale": 2.5, "name": "",
            "effect": round((-1) ** (rank // 3) * (0.62 - rank / 25), 3), "q_value": 0.0004 * 2**rank,
            "stability": None,
        }
        for rank, feature in enumerate(ids)
    ]  # fmt: skip
    sae = {
        "release": "tiny-sae",
        "sae_id": "block_2",
        "layer": 2,
        "d_model": 256,
        "d_sae": 2048,
        "weights_hash": "ab12",
    }
    pack = {
        "name": "found",
        "version": "1",
        "model_name": "tiny-reasoner",
        "sae": sae,
        "features": features,
        "pooling": "mean",
    }
    (folder / "pack.json").write_text(json.dumps(pack))
    table = [{"id": i, "effect": 0.1, "q_value": 0.5, "stability": 0.93 - i / 1e4, "support": i / 2000} for i in ids]
    pd.DataFrame(table).to_parquet(folder / "features.parquet")


def _write_gate(folder: Path, verdict: str) -> None:
    pack = (0.861, 0.842, 0.790, 0.886) if verdict == "pass" else (0.571, 0.521, 0.462, 0.579)
    reasons = {
        "pass": "the pack separates right from wrong answers to the same question, and better than every baseline",
        "fail": "the pack does not separate right from wrong answers to the same question (0.521, chance is 0.5)",
        "inconclusive": "the interval spans the threshold: more mixed questions are needed",
    }
    rows = [
        ("feature reward", *pack),
        ("mean log-probability", 0.603, 0.584, 0.521, 0.644),
        ("length", 0.655, 0.493, 0.431, 0.552),
    ]
    rows.append(("random features of equal frequency", 0.512, 0.507, 0.447, 0.566))
    gate = {
        "verdict": verdict, "reason": reasons[verdict], "spec_hash": "c0ffee" * 10,
        "n_questions": 24, "n_mixed": 22, "n_responses": 192, "thresholds": {"within_auroc": 0.55, "min_mixed": 20},
        "p_value": 0.0005 if verdict == "pass" else 0.241, "accuracy": 0.28, "questions_needed": None, "draws": 2000,
        "rows": [_gate_row(*row, lead=None if i == 0 else pack[1] - row[2]) for i, row in enumerate(rows)],
    }  # fmt: skip
    (folder / "gate1.json").write_text(json.dumps(gate))


def _gate_row(name: str, auroc: float, within: float, low: float, high: float, lead: float | None) -> dict:
    ends = (None, None) if lead is None else (lead - 0.08, lead + 0.08)
    return {
        "name": name, "auroc": auroc, "auroc_low": auroc - 0.07, "auroc_high": auroc + 0.07, "within_auroc": within,
        "low": low, "high": high, "difference": lead, "difference_low": ends[0], "difference_high": ends[1],
    }  # fmt: skip


def _write_metrics(folder: Path, steps: int, rng: random.Random) -> None:
    rows: list[dict] = []
    for arm, gain in (("outcome", 0.05), ("dense", 0.28)):
        for step in range(steps + 1):
            rise = gain * (1 - math.exp(-step / 15))
            if step % 10 == 0:
                value = round(0.153 + rise, 3)
                rows.append(_eval_row(arm, step, value))
            if step:
                rows.append(_train_row(arm, step, rise, rng))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _eval_row(arm: str, step: int, value: float) -> dict:
    interval = {"accuracy": value, "low": value - 0.06, "high": value + 0.065}
    return {"arm": arm, "seed": 0, "step": step, "kind": "eval", **interval, "n_questions": 16, "n_responses": 64}


def _train_row(arm: str, step: int, rise: float, rng: random.Random) -> dict:
    row = {
        "arm": arm, "seed": 0, "step": step, "kind": "train", "epoch": step / 40,
        "rewards/outcome_reward/mean": 0.15 + rise + rng.gauss(0, 0.04),
        "rewards/feature_reward/mean": -0.1 + 2 * rise + rng.gauss(0, 0.08),
        "dense/outcome_advantage_rms": 0.4 + rng.gauss(0, 0.03),
        "kl": 0.002 * step + abs(rng.gauss(0, 0.004)), "entropy": 0.31 - rise / 3 + rng.gauss(0, 0.01),
        "completions/mean_length": 88 + rng.gauss(0, 3),
        "frac_reward_zero_std": max(0, 0.4 - rise + rng.gauss(0, 0.05)),
        "grad_norm": 1 + rng.gauss(0, 0.1), "learning_rate": 1e-5 * (1 - step / 41),
    }  # fmt: skip
    if arm == "dense":
        row |= {"dense/advantage_rms": 0.12 + rng.gauss(0, 0.01), "dense/reader_seconds": 0.21 + rng.gauss(0, 0.02)}
    return row


def _write_rollouts(folder: Path, questions: list[dict], number: int, rng: random.Random) -> None:
    rows = []
    for index in range(number):
        question = questions[index % 24]
        right = rng.random() < 0.5
        completion = f"42 + 9 = 51 .\n51 - 7 = {44 if right else 58} .\nso {rng.choice(NAMES)} has that many .\n#### 44"
        if index == 0:
            completion = f"{SCRIPT} 1 + 1 = 2 .\n#### 2"
        tokens = [*completion.split(), "</s>"]
        drift = 0.25 if right else -0.25
        rows.append({
            "arm": ("outcome", "dense")[index % 2], "step": 1 + index, "question_id": question["id"],
            "prompt": question["prompt"], "completion": completion, "tokens": tokens,
            "token_rewards": [round(drift * place / 9 + rng.gauss(0, 0.15), 4) for place in range(len(tokens))],
            "outcome": float(right), "feature_reward": round(drift + rng.gauss(0, 0.05), 3),
        })  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "rollouts.parquet")


def _write_results(folder: Path) -> None:
    before = {"accuracy": 0.153, "low": 0.093, "high": 0.218, "n_questions": 16, "n_responses": 64}
    test = "paired bootstrap over questions"
    outcome = {
        "before": before,
        "after": {"accuracy": 0.197, "low": 0.129, "high": 0.263, "n_questions": 16, "n_responses": 64},
        "paired": {"difference": 0.044, "low": -0.018, "high": 0.106, "p_value": 0.162, "test": test},
    }
    dense = {
        "before": before,
        "after": {"accuracy": 0.412, "low": 0.337, "high": 0.489, "n_questions": 16, "n_responses": 64},
        "paired": {"difference": 0.259, "low": 0.171, "high": 0.347, "p_value": 0.0003, "test": test},
    }
    between = {
        "arm": "dense",
        "against": "outcome",
        "difference": 0.215,
        "low": 0.128,
        "high": 0.301,
        "p_value": 0.0012,
        "test": test,
    }
    verdict = (
        "Outcome training: inconclusive, accuracy changed by +0.044 [-0.018, +0.106], p = 0.1620 (0.153 to 0.197). "
        "Dense training: accuracy rose by +0.259 [+0.171, +0.347], p = 0.0003 (0.153 to 0.412). "
        "Outcome + dense against outcome only: final accuracy rose by +0.215 [+0.128, +0.301], p = 0.0012."
    )
    results = {
        "arms": {"outcome": outcome, "dense": dense},
        "verdict": verdict,
        "runtime_s": 151.4,
        "between": [between],
    }
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="session")
def fake_run() -> Callable[..., Path]:
    return write_fake_run


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a whole run."""
    from mechreward.report import write_report

    return write_report(write_fake_run(tmp_path_factory.mktemp("runs") / "whole")).read_text()
