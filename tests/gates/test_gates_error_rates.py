"""The made-up worlds of `benchmarks/gate_error_rates.py` are what they say, and the script runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mechreward.gates import length, mean_logprob, within_question_auroc

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gate_error_rates.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate_error_rates", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_error_rates"] = module
    spec.loader.exec_module(module)
    return module


def world(script: ModuleType, kind: str, n: int = 1500, **options: float) -> object:
    return script.make_world(script.Cell(kind, n, **options), np.random.default_rng(0))


@pytest.mark.parametrize("auroc", [0.5, 0.55, 0.65, 0.75])
def test_the_planted_auroc_is_what_the_cell_says(script: ModuleType, auroc: float) -> None:
    made = world(script, "signal", auroc=auroc)
    scores, _ = script.score(made)
    assert within_question_auroc(scores, made.right_N, made.questions) == pytest.approx(auroc, abs=0.012)
    assert made.right_N.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("kind", "low", "high"), [
    ("labels permuted", 0.72, 0.78), ("difficulty", 0.48, 0.52), ("random pack", 0.46, 0.54),
    ("length", 0.58, 0.70), ("words", 0.58, 0.75), ("log-probability", 0.58, 0.70), ("found on noise", 0.46, 0.54),
])  # fmt: skip
def test_what_each_score_knows_before_labels_are_permuted(
    script: ModuleType, kind: str, low: float, high: float
) -> None:
    made = world(script, kind, 400)
    scores, random_PN = script.score(made)
    assert low < within_question_auroc(scores, made.right_N, made.questions) < high
    assert random_PN.shape == (5, 3200)
    assert all(abs(within_question_auroc(row, made.right_N, made.questions) - 0.5) < 0.05 for row in random_PN)


def test_only_the_named_column_tells(script: ModuleType) -> None:
    plain, rows = world(script, "signal", 400, rival=0.6), np.arange(3200)
    answers = plain.responses(rows)
    of = lambda scores: within_question_auroc(scores, plain.right_N, plain.questions)  # noqa: E731
    assert of(length(answers)) == pytest.approx(0.5, abs=0.03)
    assert of(mean_logprob(answers)) == pytest.approx(0.6, abs=0.03)
    longer = world(script, "length", 400)
    assert within_question_auroc(longer.length_N, longer.right_N, longer.questions) == pytest.approx(0.68, abs=0.03)


def test_accuracy_and_copies(script: ModuleType) -> None:
    assert world(script, "signal", accuracy=0.2).right_N.mean() == pytest.approx(0.2, abs=0.03)
    rows = script.sources(script.Cell("signal", 500, copies=0.4), np.random.default_rng(0))
    assert (rows % 8 == 0).reshape(-1, 8)[:, 1:].mean() == pytest.approx(0.4, abs=0.03)
    assert (rows // 8 == np.arange(4000) // 8).all()
    np.testing.assert_array_equal(script.sources(script.Cell("signal", 5), np.random.default_rng(0)), np.arange(40))


def test_smoke(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    out = tmp_path / "rates.json"
    rows = script.main(["--smoke", "--json", str(out), "--kinds", "words", "signal", "--no-odd", "--aurocs", "0.9"])
    assert [(row["kind"], row["n_questions"], row["worlds"]) for row in rows] == [("words", 30, 4), ("signal", 30, 4)]
    assert json.loads(out.read_text())["rows"] == rows
    assert rows[0]["pass"] == 0 and rows[1]["pass"] >= 3
    assert rows[0]["fail"] + rows[0]["inconclusive"] == 4
