"""Accuracy on UNKNOWN before and after training, arm against arm, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mechreward.config import RepairArm
from mechreward.gates import accuracy_interval, paired_test, question_means
from mechreward.report.formats import arm_label, paired_tone
from mechreward.rollout import Response, load_responses

AGAINST = {
    "dense": "outcome",
    "repair_sft": "rejection_sft",
    "repair_dpo": "rejection_sft",
    "repair_cdpo": "rejection_sft",
}
"""The arm that each has to beat."""


def accuracy(responses: Sequence[Response]) -> dict[str, Any]:
    """Share of right responses with its 95 % interval, clustered by question."""
    questions = [response.question_id for response in responses]
    interval = accuracy_interval([bool(response.correct) for response in responses], questions)
    counts = {"n_questions": len(set(questions)), "n_responses": len(responses)}
    return {"accuracy": interval.value, "low": interval.low, "high": interval.high} | counts


def _by_question(responses: Sequence[Response]) -> dict[str, float]:
    return question_means([bool(r.correct) for r in responses], [r.question_id for r in responses])


def compare_arms(arms: Sequence[str], folder: Path) -> dict[str, Any]:
    """Every arm against the untrained model, and against the arm it has to beat, question by question on UNKNOWN."""
    before = load_responses(folder / "responses" / "baseline.parquet")
    table: dict[str, Any] = {}
    means = {}
    for arm in arms:
        after = load_responses(folder / "responses" / f"final-{arm}.parquet")
        means[arm] = _by_question(after)
        paired = asdict(paired_test(_by_question(before), means[arm]))
        table[arm] = {"before": accuracy(before), "after": accuracy(after), "paired": paired}
    between = [
        {"arm": arm, "against": base, **asdict(paired_test(means[base], means[arm]))}
        for arm, base in AGAINST.items()
        if arm in means and base in means
    ]
    results = {"arms": table, "between": between}
    return results | {"verdict": verdict_words(results)}


def verdict_words(results: dict[str, Any]) -> str:
    """What the intervals allow to be said, and no more."""
    sentences = []
    for arm, numbers in results["arms"].items():
        before, after, paired = numbers["before"]["accuracy"], numbers["after"]["accuracy"], numbers["paired"]
        subject = arm_label(arm) if arm in get_args(RepairArm) else f"{arm.capitalize()} training"
        sentences.append(f"{_said(paired, subject, 'accuracy')} ({before:.3f} to {after:.3f}).")
    for paired in results["between"]:
        subject = f"{_start(arm_label(paired['arm']))} against {arm_label(paired['against'])}"
        sentences.append(_said(paired, subject, "final accuracy") + ".")
    return " ".join(sentences)


def _start(label: str) -> str:
    return label[:1].upper() + label[1:]


def _said(paired: dict[str, Any], subject: str, quantity: str) -> str:
    interval = f"{paired['difference']:+.3f} [{paired['low']:+.3f}, {paired['high']:+.3f}], p = {paired['p_value']:.4f}"
    tone = paired_tone(paired)
    if tone == "good":
        return f"{subject}: {quantity} rose by {interval}"
    if tone == "bad":
        return f"{subject}: {quantity} fell by {interval}"
    return f"{subject}: inconclusive, {quantity} changed by {interval}"
