"""The words and the tone at the top of the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mechreward.features import load_pack, save_pack
from mechreward.report import read_run
from mechreward.report.verdict import arm_cards, baseline_line, between_lines, facts, headline, missing, stages

FakeRun = Callable[..., Path]


@pytest.fixture
def folder(fake_run: FakeRun, tmp_path: Path) -> Path:
    return fake_run(tmp_path / "run", steps=2, rollouts=2)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _paired(folder: Path, arm: str, low: float, high: float, p_value: float = 0.01) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["arms"][arm]["paired"] |= {"low": low, "high": high, "p_value": p_value}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("outcome", "dense", "tone"),
    [
        ((-0.2, -0.01), (-0.2, 0.1), "bad"),
        ((-0.2, -0.01), (0.01, 0.1), "good"),
        ((-0.2, 0.0), (-0.1, 0.1), "neutral"),
        ((0.0, 0.2), (-0.1, 0.1), "neutral"),
        # Two questions that both rose: the interval leaves out 0, the test shows nothing.
        ((0.25, 0.3, 0.5), (-0.3, -0.25, 0.05), "neutral"),
        ((0.25, 0.3, 0.0499), (-0.1, 0.1), "good"),
    ],
)
def test_the_tone_follows_the_intervals_not_the_words(
    outcome: tuple[float, ...], dense: tuple[float, ...], tone: str, folder: Path
) -> None:
    _change(folder / "results.json", verdict="a great success")
    _paired(folder, "outcome", *outcome)
    _paired(folder, "dense", *dense)
    top = headline(read_run(folder))
    assert (top.text, top.tone) == ("A great success.", tone)


def test_sentences_stand_apart_and_decimals_do_not_part_them(folder: Path) -> None:
    sentences = headline(read_run(folder)).sentences
    assert [sentence[:13] for sentence in sentences] == ["Outcome train", "Dense trainin", "Outcome + den"]


@pytest.mark.parametrize(("gate", "tone"), [("fail", "bad"), ("inconclusive", "neutral")])
def test_a_run_stopped_by_the_gate(gate: str, tone: str, fake_run: FakeRun, tmp_path: Path) -> None:
    top = headline(read_run(fake_run(tmp_path / "stopped", gate=gate)))
    assert top.text == f"Gate 1 did not pass ({gate})."
    assert top.detail == "The reason stands in gate1.json. Nothing was trained."
    assert top.tone == tone


def test_a_run_stopped_by_the_gate_before_its_results_were_written(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "stopped", gate="fail")
    (folder / "results.json").unlink()
    top = headline(read_run(folder))
    assert (top.text, top.tone) == ("Not trained: Gate 1 did not pass.", "bad")
    assert top.detail.startswith("Gate 1: fail. The pack does not separate")


def test_training_without_a_passed_gate_is_named(folder: Path) -> None:
    _change(folder / "gate1.json", verdict="fail")
    assert headline(read_run(folder)).detail.endswith("Trained all the same (ungated).")
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(line for line in whole.splitlines(keepends=True) if '"outcome"' in line))
    assert "ungated" not in headline(read_run(folder)).detail  # Outcome only takes no pack, so it needs no gate.
    metrics.write_text(whole)
    (folder / "gate1.json").unlink()
    assert headline(read_run(folder)).detail.startswith("Gate 1 was not run")


def test_a_given_pack_is_said_to_be_one(folder: Path) -> None:
    pack = load_pack("tiny/reasoning_pack")
    found = pack.validation
    assert found is not None and found.interval is not None
    save_pack(pack, folder / "pack.json")
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {
        "pack": "somewhere.json",
        "eval_questions": "tiny:easy",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("gate1.json", "features.parquet", "responses/known.parquet"):
        (folder / name).unlink()
    assert headline(read_run(folder)).detail == (
        f"The pack was given; gate 1: pass. Its AUROC within a question was {found.within_auroc:.3f} "
        f"({found.interval[0]:.3f} to {found.interval[1]:.3f}) on {found.n_questions} questions."
    )
    assert dict(facts(read_run(folder)))["Tested on"] == "tiny:easy"
    assert [name for name, _ in stages(read_run(folder))] == [
        "Questions", "Baseline answers", "Training", "Evaluation",
    ]  # fmt: skip
    ungated = pack.model_copy(update={"validation": None})
    save_pack(ungated, folder / "pack.json")
    assert headline(read_run(folder)).detail == "The pack was given; gate 1: not run. Trained all the same (ungated)."
    for name, words in (
        ("results.json", "the final evaluation was not reached"), ("metrics.jsonl", "training has not begun"),
    ):  # fmt: skip
        (folder / name).unlink()
        assert headline(read_run(folder)).text == f"Unfinished: {words}."
    assert headline(read_run(folder)).detail == "The pack was given; gate 1: not run."
    (folder / "pack.json").unlink()
    top = headline(read_run(folder))
    assert (top.text, top.detail) == ("Unfinished: training has not begun.", "A pack was given.")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["results.json"], "Unfinished: the final evaluation was not reached."),
        (["results.json", "metrics.jsonl"], "Unfinished: training has not begun."),
        (["results.json", "metrics.jsonl", "gate1.json"], "Unfinished: Gate 1 was not reached."),
    ],
)
def test_a_run_that_stopped_early(lost: list[str], words: str, folder: Path) -> None:
    for name in lost:
        (folder / name).unlink()
    top = headline(read_run(folder))
    assert (top.text, top.tone) == (words, "neutral")


def test_cards_hold_each_arm(folder: Path) -> None:
    outcome, dense = arm_cards(read_run(folder))
    assert (outcome.tone, dense.tone) == ("neutral", "good")
    assert (dense.before, dense.after, dense.change, dense.p) == (
        "15.3%",
        "41.2%",
        "+25.9 points (+17.1 to +34.7)",
        "p < 0.001",
    )
    assert between_lines(read_run(folder)) == [
        "outcome + dense against outcome only: +21.5 points (+12.8 to +30.1), p = 0.001"
    ]


def test_stages_and_the_last_one_reached(folder: Path) -> None:
    assert [reached for _, reached in stages(read_run(folder))] == [True] * 7
    for name in ("results.json", "metrics.jsonl", "gate1.json"):
        (folder / name).unlink()
    run = read_run(folder)
    assert [name for name, reached in stages(run) if not reached] == ["Gate 1", "Training", "Evaluation"]
    assert missing(run, "gate1.json", "Gate 1") == (
        "gate1.json is not in this run directory: the run did not reach Gate 1. "
        "The last stage with files is “Features”."
    )
    # Found, but none good enough for a pack.
    (folder / "pack.json").unlink()
    assert dict(stages(read_run(folder)))["Features"]
    (folder / "features.parquet").unlink()
    assert not dict(stages(read_run(folder)))["Features"]


def test_facts_leave_out_what_no_file_holds(folder: Path) -> None:
    (folder / "sae.json").write_text(json.dumps({"fvu": 0.0812, "l0": 31.97, "dead_share": 0.043}))
    assert dict(facts(read_run(folder)))["SAE quality"] == "FVU 0.081, L0 32.0, dead 4.3%"
    for name in ("sae.json", "pack.json", "questions.parquet", "results.json"):
        (folder / name).unlink()
    assert [name for name, _ in facts(read_run(folder))] == ["Model", "Task", "Arms", "Seed", "Device"]


def test_a_run_stopped_undecided_before_its_results_were_written(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "stopped", gate="inconclusive")
    (folder / "results.json").unlink()
    top = headline(read_run(folder))
    assert (top.text, top.tone) == ("Not trained: Gate 1 did not pass.", "neutral")
    assert not top.detail.endswith("(ungated).")


def test_cards_stand_in_the_order_of_the_settings_each_with_its_own_intervals(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    _change(folder / "results.json", arms=dict(reversed(results["arms"].items())))
    outcome, dense = arm_cards(read_run(folder))
    assert (outcome.arm, dense.arm) == ("outcome", "dense")
    assert (dense.before_interval, dense.after_interval) == ("9.3 to 21.8%", "33.7 to 48.9%")
    assert dense.n == "16 questions, 64 responses"


def test_answers_before_training_are_counted_and_what_was_not_verified_is_not_right(folder: Path) -> None:
    frame = pd.DataFrame({"question_id": ["a", "a", "b"], "correct": [True, None, False], "completion_ids": [[1]] * 3})
    frame.to_parquet(folder / "responses" / "baseline.parquet")
    assert baseline_line(read_run(folder)) == ("Before training, 1 of 3 answers to 2 UNKNOWN questions were right.")
    (folder / "responses" / "baseline.parquet").unlink()
    assert baseline_line(read_run(folder)) == ""


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ("fail", "It stopped after Gate 1, whose verdict is “fail”."),
        ("inconclusive", "It stopped after Gate 1, whose verdict is “inconclusive”."),
        ("pass", "The last stage with files is “Gate 1”."),
    ],
)
def test_why_there_is_no_training(gate: str, why: str, folder: Path) -> None:
    _change(folder / "gate1.json", verdict=gate)
    (folder / "results.json").unlink()
    run = read_run(folder)
    stopped = "results.json is not in this run directory: the run did not reach the final evaluation. "
    assert missing(run, "results.json", "the final evaluation") == stopped + "The last stage with files is “Training”."
    (folder / "metrics.jsonl").unlink()
    stopped = "metrics.jsonl is not in this run directory: the run did not reach training. "
    assert missing(read_run(folder), "metrics.jsonl", "training") == stopped + why


def test_facts_are_those_of_the_manifest_and_the_pack(folder: Path) -> None:
    _change(folder / "manifest.json", seed=5, device="cuda:1")
    _change(folder / "pack.json", pooling="last_4")
    found = dict(facts(read_run(folder)))
    assert (found["Seed"], found["Device"], found["Pack"]) == ("5", "cuda:1", "8 features, last_4 pooled")
