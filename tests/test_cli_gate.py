"""`mechreward gate`: exit codes, what it prints and writes, one sentence on bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mechreward.cli import main
from mechreward.features import ContrastTable, catalog_names, load_pack, save_contrast, save_pack
from mechreward.models import load_model
from mechreward.rollout import Response, load_responses, prompt_hashes, save_responses, tokenise_prompts
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL


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
    assert (
        "Gate 1: pass" in said
        and "gate1.json" in said
        and "a score without ties reaches at most" in said.replace("\n", " ")
    )
    note = "note: the pack does not record the questions it was found on"
    assert note not in said
    assert record["correlations"]["plain"]["spearman"] > 0.5
    assert [row["name"] for row in record["rows"] if not row["required"]] == [
        "raw direction", "DiffMean", "dense probe", "random-weight SAE",
    ]  # fmt: skip
    assert [a["name"] for a in record["attacks"]["attacks"]] == ["empty", "opener", "injected", "repeated"]
    assert not any(a["reaches"] for a in record["attacks"]["attacks"])
    judged = load_pack(tmp_path / "a" / "pack.json").validation
    assert judged is not None and (judged.verdict, judged.spec_hash) == ("pass", record["spec_hash"])
    kept = load_responses(tmp_path / "a" / "gate1-responses.parquet")
    assert len(kept) == 160 and sum(response.correct is True for response in kept) / 160 == record["accuracy"]
    # Too few questions are no pass.
    found_on(tmp_path / "unknown.json", [])
    unknown = str(tmp_path / "unknown.json")
    code, said, _ = run(capsys, "--pack", unknown, *ask, "--limit", "6", "--out", str(tmp_path / "b"))
    assert code == 1 and "Gate 1: inconclusive" in said and note in said


def found_on(pack: Path, prompts: list[tuple[int, ...]]) -> None:
    save_pack(load_pack(TINY).model_copy(update={"provenance": {"prompts": list(prompt_hashes(prompts))}}), pack)


def test_the_questions_of_discovery_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loaded, questions = load_model(str(MODEL)), load_questions("tiny:easy", limit=5)
    prompts = [tuple(ids) for ids in tokenise_prompts(loaded, questions, max_new_tokens=8)]
    found_on(tmp_path / "pack.json", prompts)
    rows = [
        Response(q.id, 0, ids, (7, 8), "", (-1.0,) * 2, "eos", True) for q, ids in zip(questions, prompts, strict=True)
    ]
    save_responses(tmp_path / "r.parquet", [*rows, replace(rows[0], question_id="other", prompt_ids=(5, 6))])
    given = ("--pack", str(tmp_path / "pack.json"), "--out", str(tmp_path / "out"))
    capsys.readouterr()  # the bar of the weights loaded above
    for source, words in [
        (("--questions", "tiny:easy", "--limit", "12"), "was found on 5 of these 12"),
        (("--responses", str(tmp_path / "r.parquet")), "was found on 5 of these 6"),
    ]:
        code, said, error = run(capsys, *given, *source)
        assert code == 2 and words in error and "another --seed where" in error and len(error.splitlines()) == 1
        assert "sample" not in said and "note" not in said and not list((tmp_path / "out").iterdir())
    # With another seed the questions are others.
    more = ("--questions", "tiny:easy", "--limit", "2", "--samples", "2", "--max-new-tokens", "8", "--draws", "100")
    assert run(capsys, *given, *more, "--seed", "1")[0] == 1


def test_a_table_that_is_none_or_another_sae_s(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "garbage.parquet").write_bytes(b"garbage")
    frame = pd.DataFrame({"id": range(9), "support": 0.5, "scale": 1.0})
    save_contrast(ContrastTable(frame, 2, 2, 4), tmp_path / "other.parquet")
    for name, words in [
        ("garbage", "garbage.parquet is not a whole Parquet file"),
        ("other", "features: the table has 9 features, but the SAE of pack tiny/reasoning_pack has 1024"),
    ]:
        ask = ("--pack", TINY, "--questions", "tiny:easy", "--out", str(tmp_path / "out"))
        code, said, error = run(capsys, *ask, "--features", str(tmp_path / f"{name}.parquet"))
        assert code == 2 and words in error and len(error.splitlines()) == 1 and "sample" not in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "questions: give either --questions"),
        (("--questions", "tiny:easy", "--responses", "r.parquet"), "questions: give either --questions"),
        (("--questions", "tiny:nope"), "error questions: 'tiny:nope' is no setting"),
        (("--questions", "tiny:easy", "--sae", "nowhere"), "error sae: there is no file or folder 'nowhere', and a"),
        (("--responses", "none.parquet"), "responses: there is no file none.parquet"),
        (("--questions", "tiny:easy", "--draws", "3"), "draws: 3 is not allowed"),
        (("--questions", "tiny:easy", "--pack", "none.json"), "pack: none.json is neither a file nor a bundled pack"),
        (("--questions", "tiny:easy", "--rephrased"), "rephrased: whether pack"),
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
