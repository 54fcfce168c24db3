"""`mechreward eval` and `mechreward steer repair`: exit codes, what they write, one sentence on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechreward.cli import main
from mechreward.features import catalog_names
from mechreward.rollout import load_responses
from mechreward.steering import load_repairs
from mechreward.tasks import load_split

TINY = next(name for name in catalog_names() if name.startswith("tiny"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_fuzz_with_a_pack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ask = ("--questions", "tiny:easy", "--limit", "6", "--samples", "3", "--max-new-tokens", "70", "--seed", "4")
    code, said, _ = run(
        capsys, "eval", *ask, "--fuzz", "--kinds", "names", "numbers", "--pack", TINY, "--out", str(tmp_path / "a")
    )
    found = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert code == int(found["signal"]["verdict"] == "brittle") and "eval.json" in said
    responses = load_responses(tmp_path / "a" / "responses.parquet")
    assert len(responses) == 6 * 3 * 3
    for kind in ("original", "names", "numbers"):
        mine = [
            r for r in responses if (f"~{kind}-" in r.question_id) or (kind == "original" and "~" not in r.question_id)
        ]
        row = found["accuracy"][kind]
        assert row["n"] == len(mine) == 18 and row["value"] == pytest.approx(sum(map(lambda r: r.correct, mine)) / 18)
    assert found["agreement"]["across"]["n_families"] == 6
    code, said, _ = run(capsys, "eval", *ask, "--out", str(tmp_path / "b"))
    plain = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert code == 0 and set(plain) == {"n_questions", "accuracy"} and set(plain["accuracy"]) == {"original"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("eval",), "questions: is needed"),
        (("eval", "--questions", "tiny:easy", "--kinds", "names"), "kinds: names are asked for without --fuzz"),
        (("eval", "--questions", "tiny:easy", "--pack", TINY), "pack: its signal is compared on variations"),
        (("eval", "--questions", "tiny:easy", "--fuzz", "--pack", TINY, "--samples", "1"), "samples: 1 answer"),
        (("eval", "--questions", "tiny:easy", "--fuzz", "--pack", "none.json"), "pack: none.json is neither"),
        (("steer", "repair"), "questions: is needed"),
        (("steer", "repair", "--questions", "tiny:easy", "--model", "x"), "sae: is needed to steer x"),
        (("steer", "repair", "--questions", "tiny:easy", "--tries", "0"), "tries: 0 is not allowed"),
        (("steer", "repair", "--questions", "tiny:easy", "--out", "/dev/null/x"), "out: cannot write to the folder"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    code, said, error = run(capsys, *arguments)
    assert code == 2 and sentence in error and len(error.strip().splitlines()) == 1
    assert "sample" not in said


def test_repair_keeps_unknown_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, _ = run(
        capsys, "steer", "repair", "--questions", "tiny:easy", "--limit", "64", "--samples", "6", "--tries", "2",
        "--max-new-tokens", "70", "--critical", "solution", "--chains", "8", "--pooling", "step_end:.",
        "--out", str(tmp_path),
    )  # fmt: skip
    repairs, split = load_repairs(tmp_path / "repairs.parquet"), load_split(tmp_path / "questions.parquet")
    record = json.loads((tmp_path / "repair.json").read_text())
    assert code == (0 if repairs else 1) and repairs and "repairs.parquet" in said
    assert record["n_kept"] == len(repairs) == record["arms"]["steered"]["repaired"]
    known, unknown = {q.id for q in split.known}, {q.id for q in split.unknown}
    sampled = {r.question_id for r in load_responses(tmp_path / "responses" / "known.parquet")}
    assert sampled == known and {one.question_id for one in repairs} <= known and not sampled & unknown
    for one in repairs:
        assert one.repaired_ids[: one.cut] == one.wrong_ids[: one.cut] and one.repaired_ids != one.wrong_ids
        assert one.repaired_text.split()[-1] == next(q.answer for q in split.known if q.id == one.question_id)
