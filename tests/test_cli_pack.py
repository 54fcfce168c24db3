"""`mechreward pack`: what each verb prints, and exit code 1 for what may not go into the catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mechreward.cli import main
from mechreward.features import FeaturePack, PackValidation, load_pack, save_pack
from mechreward.tiny import SAE_FOLDER

TINY = "tiny/reasoning_pack"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["pack", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_list_marks_the_validation(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(capsys, "list")
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert code == 0 and len(lines) == 3
    assert lines[TINY].endswith("validation: gate 1: pass")
    assert lines["qwen3.5-4b/reasoning_pack"].endswith("validation: reported by its authors, not reproduced")


def test_show_prints_features_gate_and_provenance(capsys: pytest.CaptureFixture[str]) -> None:
    pack = load_pack(TINY)
    code, said, _ = run(capsys, "show", TINY)
    assert code == 0 and all(f"\n {feature.id} " in said for feature in pack.features)
    for line in (
        f"spec: {pack.spec_hash}",
        "provenance command: python experiments/tiny_pack.py --questions 300",
        "validation: gate 1: pass",
        "prompt: '{question}', plain",
        f"{pack.validation.n_questions} questions" if pack.validation else "",
    ):
        assert line in said


def test_show_prints_our_reading(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(capsys, "show", "qwen3.5-4b/reasoning_pack")
    assert code == 0 and "validation: reported by its authors, not reproduced" in said
    assert "our reading 1: 11 of 100 answers were wrong" in said and "reported spearman_rho: 0.54" in said
    assert "weights not recorded" in said and "prompt: not recorded" in said


def test_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, _ = run(capsys, "schema")
    assert code == 0 and json.loads(said) == FeaturePack.model_json_schema()
    code, said, _ = run(capsys, "schema", "--out", str(tmp_path / "s.json"))
    assert (code, said.strip()) == (0, str(tmp_path / "s.json"))
    assert json.loads((tmp_path / "s.json").read_text()) == FeaturePack.model_json_schema()


def test_validate(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(capsys, "validate", TINY, "--sae", str(SAE_FOLDER))
    assert (code, f"{TINY}: acceptable" in said) == (0, True)
    theirs = "qwen3.5-4b/reasoning_pack"
    code, said, _ = run(capsys, "validate", TINY, theirs)
    assert code == 1 and f"{TINY}: acceptable" in said and f"{theirs}: not acceptable" in said
    assert run(capsys, "validate", theirs, "--reported")[0] == 0
    code, said, _ = run(capsys, "validate", theirs, "--reported", "--sae", str(SAE_FOLDER))
    assert (code, "made for an SAE with d_model 2560, this one has 128" in said) == (1, True)
    code, _, error = run(capsys, "validate", "tiny/other")
    assert code == 2 and "bundled: qwen3.5-4b/reasoning_pack, qwen3.6-35b-a3b/reasoning_pack, tiny/reas" in error


WANTING: list[tuple[dict[str, Any], str]] = [
    ({"validation": None}, "validation: Gate 1 has not judged the pack"),
    ({"pooling": "max"}, "validation.spec_hash: is "),
    ({"verdict": "fail"}, "validation.verdict: is fail, must be pass"),
    ({"verdict": "inconclusive"}, "validation.verdict: is inconclusive, must be pass"),
    ({"interval": None}, "validation.interval: a passed gate has"),
    ({"within_auroc": None}, "validation.interval: a passed gate has"),
    ({"prompt": None}, "prompt: is missing"),
    ({"provenance": {}}, "provenance.questions_license: is missing"),
]


@pytest.mark.parametrize("changes, finding", WANTING)
def test_what_is_not_acceptable(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], finding: str
) -> None:
    pack = load_pack(TINY)
    of_gate = {name: value for name, value in changes.items() if name in PackValidation.model_fields}
    if of_gate and pack.validation is not None:
        changes = {"validation": pack.validation.model_copy(update=of_gate)}
    save_pack(pack.model_copy(update=changes), tmp_path / "pack.json")
    code, said, _ = run(capsys, "validate", str(tmp_path / "pack.json"))
    assert code == 1 and f"\n  {finding}" in said
    wanted = 5 if "provenance" in changes else 1
    assert said.count("\n  ") == wanted


def test_validating_nothing_is_not_success(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "validate")
    assert (code, error) == (2, "error packs: none was given; name files or bundled packs (`mechreward pack list`)\n")


def test_reported_does_not_excuse_a_pack_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_pack(load_pack(TINY).model_copy(update={"validation": None}), tmp_path / "pack.json")
    assert run(capsys, "validate", str(tmp_path / "pack.json"), "--reported")[0] == 1
    theirs = load_pack("qwen3.5-4b/reasoning_pack")
    assert theirs.reported is not None
    unread = theirs.model_copy(update={"reported": theirs.reported.model_copy(update={"reading": []})})
    save_pack(unread, tmp_path / "pack.json")
    code, said, _ = run(capsys, "validate", str(tmp_path / "pack.json"), "--reported")
    assert (code, "reported.reading: is empty" in said) == (1, True)


def test_a_weights_hash_is_wanted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pack = load_pack(TINY)
    save_pack(pack.model_copy(update={"sae": pack.sae.model_copy(update={"weights_hash": None})}), tmp_path / "p.json")
    code, said, _ = run(capsys, "validate", str(tmp_path / "p.json"))
    assert code == 1 and "sae.weights_hash: is missing" in said
