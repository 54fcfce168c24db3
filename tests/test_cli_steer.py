"""`mechreward steer inspect`, `generate` and `sweep` on the bundled model: exit codes, what they say and write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mechreward import steering
from mechreward.cli.main import main
from mechreward.models import load_model
from mechreward.rollout import verify_responses
from mechreward.sae import load_sae
from mechreward.steering import Variant
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

ASK = ("--questions", "tiny:easy", "--limit", "4", "--calibration", "4", "--max-new-tokens", "24", "--seed", "3")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def sweep(capsys: pytest.CaptureFixture[str], out: Path, *flags: str) -> tuple[int, str, dict[str, Any]]:
    code, said, _ = run(capsys, "steer", "sweep", *ASK, "--out", str(out), *flags)
    return code, said, json.loads(out.read_text())


def test_a_sweep_that_gains_nothing_ends_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What all answers hold already cannot be gained."""
    flags = ("--features", "835", "408", "831", "--mode", "pin", "--strengths", "0.5", "1", "--controls", "random")
    code, said, curve = sweep(capsys, tmp_path / "all.json", *flags, "--contains", ":")
    assert code == 1 and curve["knee"] is None and "no fluent strength gains anything (n 4 questions)" in said
    assert [(point["arm"], point["strength"]) for point in curve["points"]] == [
        ("none", 0.0), ("edit", 0.5), ("random", 0.5), ("edit", 1.0), ("random", 1.0),
    ]  # fmt: skip
    assert {point["behaviour"] for point in curve["points"]} == {1.0} and "all.json" in said


def test_a_sweep_with_a_knee_ends_with_0(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strength that is said and written is the curve's own; what is swept are the features and strengths given."""
    inner, asked = steering.sweep, []

    def sweep_(variant, features, strengths, protocol, **options):
        asked.append((features, strengths, options["mode"], options["controls"], len(protocol.prompts)))
        curve = inner(variant, features, strengths, protocol, **options)
        return replace(curve, knee=0.25)

    monkeypatch.setattr(steering, "sweep", sweep_)
    flags = ("--features", "835", "408", "--strengths", "0.25", "--controls", "wrong_sign", "--contains", ":")
    code, said, curve = sweep(capsys, tmp_path / "knee.json", *flags)
    assert code == 0 and curve["knee"] == 0.25 and "knee at strength 0.25 (n 4 questions)" in said
    assert asked == [([835, 408], (0.25,), "nudge", ("wrong_sign",), 4)]


def test_sweep_counts_right_answers_or_a_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ("--features", "835", "--strengths", "0.1", "--controls", "wrong_sign", "--max-new-tokens", "70")
    shares = {}
    for name, more in (("strict", ()), ("lenient", ("--strictness", "lenient")), ("text", ("--contains", "####"))):
        _, _, curve = sweep(capsys, tmp_path / f"{name}.json", *flags, *more)
        assert all(point["n_prompts"] == 4 for point in curve["points"])
        shares[name] = curve["points"][0]["behaviour"]
    variant = Variant(load_model(str(MODEL)), load_sae(str(SAE_FOLDER)))
    questions = load_questions("tiny:easy", limit=4, seed=3)
    drawn = variant.generate([q.prompt for q in questions], max_new_tokens=70, temperature=1.0, seed=3)
    answers = [replace(row, question_id=q.id) for (row,), q in zip(drawn, questions, strict=True)]
    judged = verify_responses(answers, questions, gsm8k_exact_match)
    assert shares["strict"] == sum(bool(one.correct) for one in judged) / 4
    assert shares["lenient"] == sum(bool(one.lenient) for one in judged) / 4
    assert shares["text"] == sum("####" in one.text for one in judged) / 4 > 0


def test_generate_answers_with_and_without(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, _ = run(capsys, "steer", "generate", *ASK, "--features", "835", "--strength", "0", "--mode", "nudge")
    plain = [line.removeprefix("  as it is  ") for line in said.splitlines() if line.startswith("  as it is")]
    steered = [line.removeprefix("  steered   ") for line in said.splitlines() if line.startswith("  steered")]
    assert code == 0 and len(plain) == 4 and plain == steered
    variant = Variant(load_model(str(MODEL)), load_sae(str(SAE_FOLDER)))
    variant.set([408, 831], 3000.0, mode="pin", unit="raw")
    edits = tmp_path / "edits.json"
    edits.write_text(json.dumps(variant.json()))
    alone = (*ASK[:4], *ASK[6:])  # edits bring their own units: nothing is calibrated
    code, said, _ = run(capsys, "steer", "generate", *alone, "--edits", str(edits))
    steered = [line.removeprefix("  steered   ") for line in said.splitlines() if line.startswith("  steered")]
    assert code == 0 and len(steered) == 4 and steered != plain


def test_inspect_shows_what_fires(capsys: pytest.CaptureFixture[str]) -> None:
    text = "Ada has 12 apples . on Monday Ada buys 4 ."
    variant = Variant(load_model(str(MODEL)), load_sae(str(SAE_FOLDER)))
    seen = variant.inspect(text)
    for flags, expected in (((), seen.top(3, "max")), (("--token", "5"), seen.at(5, 3))):
        code, said, _ = run(capsys, "steer", "inspect", text, "--top", "3", *flags)
        rows = [line.split() for line in said.splitlines()]
        numbers = [(row[0], row[1]) for row in rows if len(row) == 2 and row[0].isdigit() and row[1][0].isdigit()]
        assert code == 0 and numbers == [(str(one.feature.id), f"{one.value:.4g}") for one in expected]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sweep", "--features", "3"), "questions: is needed"),
        (("sweep", *ASK), "features: is needed; give the ids of the features to edit"),
        (("sweep", *ASK, "--features", "3", "--verifier", "vibes"), "verifier: "),
        (("sweep", *ASK, "--features", "3", "--model", "x"), "sae: is needed to steer x"),
        (("generate", *ASK), "features: give either --features or --edits"),
        (("generate", *ASK, "--features", "3", "--edits", "e.json"), "features: give either --features or --edits"),
        (("generate", *ASK, "--edits", "e.json"), "calibration: 4 is given with --edits, which hold their own"),
        (("generate", *ASK[:4], "--edits", "e.json", "--strength", "2"), "strength: 2.0 is given with --edits"),
        (("generate", *ASK[:4], "--edits", "e.json", "--mode", "pin"), "mode: pin is given with --edits"),
        (("generate", *ASK[:4], "--edits", "e.json", "--where", "all"), "where: all is given with --edits"),
        (("generate", *ASK, "--features", "99999"), "feature: 99999 is not a feature of this SAE"),
        (("sweep", *ASK, "--features", "99999"), "feature: 99999 is not a feature of this SAE"),
        (("sweep", *ASK, "--features", "3", "--strengths", "1", "1"), "strengths: [1.0, 1.0] must be"),
        (("sweep", *ASK, "--features", "3", "--limit", "1"), "prompts: 1 are given"),
        (("inspect", "Ada has 12 apples .", "--token", "99"), "token: 99 is out of range; the text has tokens 0 to"),
        (("inspect", "Ada has 12 apples .", "--top", "-3"), "top: -3 is too small"),
        (("inspect", ""), "text: "),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    code, said, error = run(capsys, "steer", *arguments)
    assert code == 2 and sentence in error and len(error.strip().splitlines()) == 1 and "calibrate" not in said
