"""Reading a run directory: what is there, what is not, and what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mechreward.errors import InputError
from mechreward.report import read_run

FakeRun = Callable[..., Path]


def test_reads_every_file(fake_run: FakeRun, tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", steps=4, rollouts=3))
    assert run.arms == ["outcome", "dense"]
    assert sorted(run.responses) == ["baseline", "known"]
    assert run.train is not None and run.evals is not None and run.rollouts is not None and run.questions is not None
    assert (len(run.train), len(run.evals), len(run.rollouts), len(run.questions)) == (8, 2, 3, 40)


def test_every_file_is_optional(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=4)
    for path in sorted(folder.glob("*.*")):
        if path.name != "config.yaml":
            path.unlink()
    run = read_run(folder)
    assert run.arms == ["outcome", "dense"]
    assert (run.manifest, run.gate, run.train, run.evals, run.rollouts, run.results) == (None,) * 6


@pytest.mark.parametrize("content", ["missing", "empty", "file"])
def test_a_folder_that_is_no_run_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if content == "empty":
        path.mkdir()
    elif content == "file":
        path.write_text("x")
    with pytest.raises(InputError, match="run_dir: .*run") as raised:
        read_run(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("gate1.json", "{", "gate1.json is not valid JSON"),
        ("results.json", "[1]", "results.json holds list"),
        ("config.yaml", "a: [", "config.yaml is not valid YAML"),
        ("config.yaml", "word", "config.yaml holds str"),
        ("rollouts.parquet", "PAR1", "rollouts.parquet is not a readable Parquet file"),
        ("metrics.jsonl", '{"arm": "a"\n{}\n', "metrics.jsonl line 1 is not valid JSON"),
        ("metrics.jsonl", '{"arm": "a", "kind": "eval"}\n', "metrics.jsonl line 1 has no 'step'"),
        ("metrics.jsonl", '["arm", "step", "kind"]\n', "metrics.jsonl line 1 holds list, where a JSON object"),
        ("metrics.jsonl", "3\n", "metrics.jsonl line 1 holds int, where a JSON object"),
    ],
)
def test_a_broken_file_is_named(file: str, content: str, words: str, fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=4)
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=words):
        read_run(folder)


def test_metrics_that_are_no_text_are_named(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=4)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"metrics.jsonl is not text in UTF-8 \(byte \d+\)"):
        read_run(folder)


def test_a_missing_column_is_named(fake_run: FakeRun, tmp_path: Path) -> None:
    import pandas as pd

    folder = fake_run(tmp_path / "run", steps=4)
    pd.read_parquet(folder / "rollouts.parquet").drop(columns="tokens").to_parquet(folder / "rollouts.parquet")
    with pytest.raises(InputError, match=r"rollouts.parquet has no column 'tokens'"):
        read_run(folder)


def test_a_killed_run_s_half_line_is_left_out_and_a_step_logged_twice_counts_once(tmp_path: Path) -> None:
    row = {"arm": "dense", "seed": 0, "step": 0, "kind": "eval", "accuracy": 0.1}
    lines = [row, {**row, "accuracy": 0.2}, {**row, "seed": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"arm": "dense", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert run.evals is not None and run.evals["accuracy"].tolist() == [0.2, 0.1]
    assert run.arms == ["dense"]


def test_arms_of_a_repair_are_those_that_were_trained_not_the_settings_of_grpo(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: repair\narms: [dense]\n")
    assert read_run(tmp_path).arms == []
    rows = [{"arm": arm, "seed": 0, "step": 0, "kind": "eval", "accuracy": 0.1} for arm in ("repair_dpo", "repair_sft")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results.json").write_text(json.dumps({"arms": {"rejection_sft": {}, "repair_sft": {}}}))
    assert read_run(tmp_path).arms == ["repair_dpo", "repair_sft", "rejection_sft"]
    (tmp_path / "config.yaml").write_text("method: both\narms: [dense]\n")
    assert read_run(tmp_path).arms == ["dense", "repair_dpo", "repair_sft", "rejection_sft"]
