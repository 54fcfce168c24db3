"""Arms before and after, by counts on a few responses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechreward.comparison import accuracy, compare_arms
from mechreward.gates import accuracy_interval, paired_test
from mechreward.rollout import Response, save_responses

BEFORE = {"a": "rw", "b": "ww", "c": "rr", "d": "ww"}
AFTER = {
    "outcome": {"a": "rw", "b": "rw", "c": "rr", "d": "ww"},
    "dense": {"a": "rr", "b": "rr", "c": "rr", "d": "rw"},
    "rejection_sft": {"a": "ww", "b": "ww", "c": "rw", "d": "ww"},
    "repair_sft": {"a": "rr", "b": "ww", "c": "rw", "d": "ww"},
    "repair_dpo": {"a": "rr", "b": "rr", "c": "rr", "d": "rr"},
}


def responses(verdicts: dict[str, str]) -> list[Response]:
    return [
        Response(question, sample, (1,), (2,), "x", (0.0,), "eos", one == "r")
        for question, row in verdicts.items()
        for sample, one in enumerate(row)
    ]


def means(verdicts: dict[str, str]) -> dict[str, float]:
    return {question: row.count("r") / len(row) for question, row in verdicts.items()}


def test_accuracy_is_clustered_by_question() -> None:
    found = accuracy(responses(BEFORE))
    interval = accuracy_interval([True, False, False, False, True, True, False, False], list("aabbccdd"))
    assert found == {"accuracy": 3 / 8, "low": interval.low, "high": interval.high, "n_questions": 4, "n_responses": 8}
    unverified = [*responses(BEFORE), Response("e", 0, (1,), (2,), "x", (0.0,), "eos", None)]
    assert accuracy(unverified)["accuracy"] == pytest.approx(3 / 9)


def test_each_arm_is_paired_with_the_start_and_with_the_one_it_has_to_beat(tmp_path: Path) -> None:
    save_responses(tmp_path / "responses" / "baseline.parquet", responses(BEFORE))
    for arm, verdicts in AFTER.items():
        save_responses(tmp_path / "responses" / f"final-{arm}.parquet", responses(verdicts))
    found = compare_arms(list(AFTER), tmp_path)
    for arm, verdicts in AFTER.items():
        numbers, paired = found["arms"][arm], paired_test(means(BEFORE), means(verdicts))
        assert numbers["before"] == accuracy(responses(BEFORE)) and numbers["after"] == accuracy(responses(verdicts))
        difference = sum(means(verdicts).values()) / 4 - 3 / 8
        assert numbers["paired"]["difference"] == pytest.approx(difference) == pytest.approx(paired.difference)
        assert (numbers["paired"]["low"], numbers["paired"]["p_value"]) == (paired.low, paired.p_value)
    assert [(row["arm"], row["against"], row["difference"]) for row in found["between"]] == [
        ("dense", "outcome", pytest.approx(7 / 8 - 4 / 8)),
        ("repair_sft", "rejection_sft", pytest.approx(3 / 8 - 1 / 8)),
        ("repair_dpo", "rejection_sft", pytest.approx(8 / 8 - 1 / 8)),
    ]
    assert compare_arms(["dense"], tmp_path)["between"] == []
