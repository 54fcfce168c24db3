"""The capability panel: scores of sources, lm-eval as a process that may fail, results that lack a number."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from mechreward.errors import InputError
from mechreward.gates import accuracy_interval
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import sample_responses, verify_responses
from mechreward.studies import capability
from mechreward.studies.capability import Score, lm_eval_scores, panel_of, panel_scores, read_score
from mechreward.tasks import Question, load_questions
from mechreward.tiny import MODEL
from mechreward.verifiers import gsm8k_exact_match


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(str(MODEL))


def test_scores_are_accuracies_with_clustered_errors(tiny: LoadedModel) -> None:
    asked = {"n_questions": 6, "samples": 2, "max_new_tokens": 60, "seed": 3}
    scores = panel_scores(tiny, ["tiny:easy"], gsm8k_exact_match, **asked)  # type: ignore[arg-type]
    questions = load_questions("tiny:easy", limit=6, seed=3)
    answers = verify_responses(
        sample_responses(tiny, questions, n=2, max_new_tokens=60, batch_size=64, seed=3), questions, gsm8k_exact_match
    )
    right = np.array([answer.correct for answer in answers])
    wanted = accuracy_interval(right, [answer.question_id for answer in answers])
    assert scores == {"tiny:easy": (wanted.value, wanted.error)} and wanted.value == right.mean()


def harness(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = folder / "lm_eval"
    command.write_text("#!/bin/sh\n" + script)
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


RESULTS = {
    "results": {
        "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "mmlu"},
        "hellaswag": {"acc,none": 0.3, "acc_stderr,none": 0.02, "acc_norm,none": 0.4, "acc_norm_stderr,none": 0.03},
        "broken": {"acc,none": float("nan"), "acc_stderr,none": 0.1},
        "bare": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
        "odd": {"perplexity,none": 3.0},
    }
}


def test_lm_eval_is_run_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer.json").write_text(json.dumps(RESULTS))
    there = tmp_path / "out" / "m"
    script = f'echo "$@" > {tmp_path}/asked; mkdir -p {there}; cp {tmp_path}/answer.json {there}/results_1.json\n'
    harness(tmp_path, script, monkeypatch)
    scores = lm_eval_scores("some/model", ["mmlu", "hellaswag"], tmp_path / "out", limit=10)
    assert scores == {"mmlu": Score(0.25, 0.01), "hellaswag": Score(0.4, 0.03)}
    asked = (tmp_path / "asked").read_text()
    assert "pretrained=some/model" in asked and "--tasks mmlu,hellaswag" in asked and "--limit 10" in asked


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo loading >&2; echo no such task >&2; exit 3\n", r"ended with exit code 3 \(no such task\)"),
        ("exit 1\n", "it said nothing"),
        ("exit 0\n", "ended well and left no results"),
        ("sleep 5\n", "took longer than 0.2 seconds on mmlu"),
    ],
)
def test_a_harness_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str
) -> None:
    harness(tmp_path, script, monkeypatch)
    with pytest.raises(InputError, match=sentence):
        lm_eval_scores("m", ["mmlu"], tmp_path / "out", timeout=0.2 if "sleep" in script else 60.0)


def test_no_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="lm_eval: the command is not there"):
        lm_eval_scores("m", ["mmlu"], tmp_path)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("gsm8k", "have no task 'gsm8k'"),
        ("odd", "odd has none of"),
        ("broken", "broken has acc,none = nan"),
        ("bare", "standard error 'N/A'; both must be numbers"),
    ],
)
def test_a_score_that_is_not_there_is_an_error(task: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_score(RESULTS, task)


def test_before_and_after_are_of_the_same_tasks() -> None:
    before, after = {"a": Score(0.5, 0.1)}, {"a": Score(0.4, 0.2)}
    task = panel_of(before, after)["a"]
    assert (task.before, task.before_error, task.after, task.after_error) == (0.5, 0.1, 0.4, 0.2)
    with pytest.raises(InputError, match="panel: b was measured on one side only"):
        panel_of(before, after | {"b": Score(0.1, 0.1)})


def test_the_newest_results_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of an earlier run lie in the same folder, and come first by name."""
    out = tmp_path / "out"
    out.mkdir()
    for name, score, age in (("results_2.json", 0.25, 0), ("results_1.json", 0.75, 500), ("results_3.json", 0.5, 900)):
        (out / name).write_text(json.dumps({"results": {"t": {"acc,none": score, "acc_stderr,none": 0.1}}}))
        stamp = (out / name).stat().st_mtime - age
        os.utime(out / name, (stamp, stamp))
    harness(tmp_path, "exit 0\n", monkeypatch)
    assert lm_eval_scores("m", ["t"], out) == {"t": Score(0.25, 0.1)}


def test_a_panel_s_questions_are_asked_in_the_form_given(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(source: str, **options: object) -> list[Question]:
        asked.append((source, options))
        return load_questions("tiny:easy", limit=2, seed=3)

    monkeypatch.setattr(capability, "load_questions", load)
    options = {"n_questions": 2, "max_new_tokens": 2, "prompt_format": "Q {question}", "seed": 3}
    panel_scores(tiny, ["a", "b"], gsm8k_exact_match, **options)  # type: ignore[arg-type]
    assert asked == [(name, {"limit": 2, "seed": 3, "prompt_format": "Q {question}"}) for name in ("a", "b")]
