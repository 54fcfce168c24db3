"""`mechreward features show`, and the methods of `discover` that need no contrast, as a user meets them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mechreward.cli import main
from mechreward.models import load_model
from mechreward.rollout import sample_responses, save_responses, verify_responses
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL
from mechreward.verifiers import gsm8k_exact_match


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a few verified responses."""
    questions = load_questions("tiny:easy", limit=5, seed=3)
    responses = sample_responses(load_model(str(MODEL)), questions, n=8, max_new_tokens=96, seed=3)
    path = tmp_path_factory.mktemp("run")
    (path / "responses").mkdir()
    save_responses(path / "responses/known.parquet", verify_responses(responses, questions, gsm8k_exact_match))
    return path


def test_features_show(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    options = ("--responses", str(folder), "--contexts", "2", "--tokens", "3")
    code, out, _ = run(capsys, "features", "show", *options, "--ids", "3,400", "--html", str(tmp_path / "x.html"))
    assert code == 0
    assert out.index("feature 3, fires on") < out.index("feature 400, fires on")
    assert "(logit lens)" in out and "against:" in out
    assert (tmp_path / "x.html").read_text().count("<caption>") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ids", "a,b"), "ids: 'a,b' is not a list of feature ids; write them as 1,2,3"),
        (("--ids", "1024"), "feature_ids: 1024 is not a feature of this SAE; ids go from 0 to 1023"),
        (("--ids", "1", "--model", "other"), "sae: is needed and was not given"),
        (("--ids", "1", "--neuronpedia", "gemma"), "neuronpedia: 'gemma' is not allowed; write model/source"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, ...], sentence: str) -> None:
    code, _, error = run(capsys, "features", "show", "--responses", str(folder), *arguments)
    assert code == 2 and sentence in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(("method", "words"), [("attribution", ()), ("reasonscore", ("--words", "makes", "returns"))])
def test_discover_by(
    method: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    source = str(folder / "responses/known.parquet")
    options = ("--method", method, "--responses", source, "--halves", "4", "--q-max", "1", "--min-stability", "0.5")
    code, out, _ = run(capsys, "discover", *options, *words, "--out", str(tmp_path))
    assert code == 0 and "stability" in out
    assert pd.read_parquet(tmp_path / "features.parquet").attrs["method"] == method
    assert (tmp_path / "pack.json").is_file()
