"""`mechreward gate`: exit codes, what it prints and writes, one sentence on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechreward.cli import main
from mechreward.features import catalog_names, load_pack


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["gate", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


TINY = next(name for name in catalog_names() if name.startswith("tiny"))


def test_the_bundled_pack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ask = ("--questions", "tiny:easy", "--samples", "4", "--max-new-tokens", "80", "--seed", "11", "--draws", "200")
    code, said, _ = run(capsys, "--stage", "1", "--pack", TINY, *ask, "--limit", "40", "--out", str(tmp_path / "a"))
    record = json.loads((tmp_path / "a" / "gate1.json").read_text())
    assert code == 0 and record["verdict"] == "pass", record["reason"]
    assert "Gate 1: pass" in said and "gate1.json" in said and "at this accuracy at most" in said.replace("\n", " ")
    assert record["correlations"]["plain"]["spearman"] > 0.5
    assert [row["name"] for row in record["rows"] if not row["required"]] == [
        "raw direction", "DiffMean", "dense probe", "random-weight SAE",
    ]  # fmt: skip
    assert [a["name"] for a in record["attacks"]["attacks"]] == ["empty", "opener", "injected", "repeated"]
    assert not any(a["reaches"] for a in record["attacks"]["attacks"])
    judged = load_pack(tmp_path / "a" / "pack.json").validation
    assert judged is not None and (judged.verdict, judged.spec_hash) == ("pass", record["spec_hash"])
    # Too few questions are no pass.
    code, said, _ = run(capsys, "--pack", TINY, *ask, "--limit", "6", "--out", str(tmp_path / "b"))
    assert code == 1 and "Gate 1: inconclusive" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "questions: give either --questions"),
        (("--questions", "tiny:easy", "--responses", "r.parquet"), "questions: give either --questions"),
        (("--responses", "none.parquet"), "responses: there is no file none.parquet"),
        (("--questions", "tiny:easy", "--draws", "3"), "draws: 3 is not allowed"),
        (("--questions", "tiny:easy", "--pack", "none.json"), "pack: none.json is neither a file nor a bundled pack"),
        (("--questions", "tiny:easy", "--features", "none.parquet"), "features: there is no file none.parquet"),
        (("--questions", "tiny:easy", "--out", "/dev/null/x"), "out: cannot write to the folder /dev/null/x"),
    ],
)
def test_bad_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    pack = () if "--pack" in arguments else ("--pack", TINY)
    out = () if "--out" in arguments else ("--out", str(tmp_path / "out"))
    code, said, error = run(capsys, *pack, *arguments, *out)
    assert code == 2 and sentence in error and len(error.strip().splitlines()) == 1
    assert "sample" not in said
