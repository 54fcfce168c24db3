"""Accuracy on UNKNOWN before and after training, arm against arm, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mechreward.gates import accuracy_interval, paired_test, question_means
from mechreward.rollout import Response, load_responses


def accuracy(responses: Sequence[Response]) -> dict[str, Any]:
    """Share of right responses with its 95 % interval, clustered by question."""
    questions = [response.question_id for response in responses]
    interval = accuracy_interval([bool(response.correct) for response in responses], questions)
    counts = {"n_questions": len(set(questions)), "n_responses": len(responses)}
    return {"accuracy": interval.value, "low": interval.low, "high": interval.high} | counts


def _by_question(responses: Sequence[Response]) -> dict[str, float]:
    return question_means([bool(r.correct) for r in responses], [r.question_id for r in responses])


def compare_arms(arms: Sequence[str], folder: Path) -> dict[str, Any]:
    """Every arm against the untrained model, and dense against outcome-only, question by question on UNKNOWN."""
    before = load_responses(folder / "responses" / "baseline.parquet")
    table: dict[str, Any] = {}
    means = {}
    for arm in arms:
        after = load_responses(folder / "responses" / f"final-{arm}.parquet")
        means[arm] = _by_question(after)
        paired = asdict(paired_test(_by_question(before), means[arm]))
        table[arm] = {"before": accuracy(before), "after": accuracy(after), "paired": paired}
    results: dict[str, Any] = {"arms": table}
    if len(means) == 2:
        results["dense_minus_outcome"] = asdict(paired_test(means["outcome"], means["dense"]))
    return results | {"verdict": verdict_words(results)}


def verdict_words(results: dict[str, Any]) -> str:
    """What the intervals allow to be said, and no more."""
    sentences = []
    for arm, numbers in results["arms"].items():
        before, after, paired = numbers["before"]["accuracy"], numbers["after"]["accuracy"], numbers["paired"]
        sentences.append(f"{_said(paired, arm.capitalize() + ' training', 'accuracy')} ({before:.3f} to {after:.3f}).")
    between = results.get("dense_minus_outcome")
    if between is not None:
        sentences.append(_said(between, "Dense against outcome-only", "final accuracy") + ".")
    return " ".join(sentences)


def _said(paired: dict[str, Any], subject: str, quantity: str) -> str:
    interval = f"{paired['difference']:+.3f} [{paired['low']:+.3f}, {paired['high']:+.3f}], p = {paired['p_value']:.4f}"
    if paired["low"] > 0:
        return f"{subject}: {quantity} rose by {interval}"
    if paired["high"] < 0:
        return f"{subject}: {quantity} fell by {interval}"
    return f"{subject}: inconclusive, {quantity} changed by {interval}"
