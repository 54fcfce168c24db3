"""A study of two arms for one step on the bundled reasoner, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mechreward.errors import InputError
from mechreward.gates import Evaluation, StudyResults
from mechreward.inputs import prepare
from mechreward.studies import study as room
from mechreward.studies.config import Candidate, StudyConfig, credit_of, kind_of, make_study
from mechreward.studies.jobs import Job
from mechreward.studies.study import collect, gate_halves, run_study, sides


def config(out: Path, **changes: object) -> StudyConfig:
    small = {
        "questions": "tiny:easy", "limit": 20, "known": 0.8, "samples": 4, "eval_samples": 1, "max_new_tokens": 60,
        "n_features": 5, "ungated": True, "arms": ("outcome", "sae"), "seeds": (0,), "steps": 1, "eval_every": 3,
        "questions_per_step": 1, "generations": 2, "learning_rate": 1e-4, "out": out,
    }  # fmt: skip
    return make_study(**(small | changes))


def here(jobs: list[Job], workers: int, on_done: object) -> dict[str, str]:  # noqa: ARG001
    """`run_jobs` in this process: what a child would do."""
    for job in jobs:
        if not job.path.exists():
            job.function(*job.arguments)
    return {}


def test_two_arms_one_step_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "run_jobs", here)
    results = run_study(config(tmp_path / "s"))
    assert [(run.arm, run.seed) for run in results.runs] == [("outcome", 0), ("sae", 0)]
    assert all([e.step for e in run.evaluations] == [0, 1] for run in results.runs)
    start = [run.evaluations[0].correct for run in results.runs]
    assert start[0] == start[1] and len(start[0]) == 4, "both start from the same model, asked with the same seeds"
    written = json.loads((tmp_path / "s" / "results.json").read_text())
    assert StudyResults(**written) == results and written["judged"] == "sae"
    # A run whose file is lost comes out the same, however many run at a time; the other is not run again.
    lost, kept = tmp_path / "s" / "runs" / "sae-0.json", tmp_path / "s" / "runs" / "outcome-0.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    # What a kill leaves behind, here of another run, has no say.
    assert not any((tmp_path / "s" / "checkpoints").iterdir())
    (tmp_path / "s" / "checkpoints" / "sae-0").mkdir()
    (tmp_path / "s" / "checkpoints" / "sae-0" / "run.json").write_text("{}")
    stamp = kept.stat().st_mtime_ns
    again = run_study(config(tmp_path / "s", resume=True, workers=2))
    assert again == results and kept.stat().st_mtime_ns == stamp
    assert before["facts"].pop("seconds") > 0
    assert before["facts"] == {"learning_rate": 1e-4, "dense_weight": 0.3}
    with pytest.raises(InputError, match="holds a run already"):
        run_study(config(tmp_path / "s"))
    # What is drawn at random is drawn for each seed, and the same in every process.
    setting, inputs = config(tmp_path / "s"), prepare(config(tmp_path / "s"))
    for arm in ("random", "shuffled", "failed"):
        packs = [room.load_reward(setting, inputs, tmp_path / "s", arm, seed).pack for seed in (0, 1, 0)]
        assert packs[0] == packs[2] and packs[0].features != packs[1].features


def test_the_end_is_what_training_gives_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards may stop a run between two evaluations, or right after the last one, and give back an earlier policy."""
    asked = []

    def train(loaded, _questions, _rewards, _config, checkpoints, *, evaluate, **_):
        checkpoints.mkdir(parents=True)
        for step in (1, 2):
            evaluate(loaded, step)
        return "the last good one"

    def evaluation(_inputs, policy, _questions, step):
        asked.append((policy if isinstance(policy, str) else "in training", step))
        return Evaluation(step=step, correct={"q": 0.5})

    for name, fake in (
        ("train_arm", train), ("_evaluation", evaluation), ("load_reward", lambda *_: len),
        ("read_start", lambda _: evaluation(None, "start", None, 0)),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, fake)
    setting = config(tmp_path, steps=2, eval_every=1)
    run = room.run_arm(setting, tmp_path, tmp_path / "runs" / "sae-0.json", "sae", 0, Candidate(1e-3, 0.3))
    assert asked == [("start", 0), ("in training", 1), ("the last good one", 2)]
    assert [one.step for one in run.evaluations] == [0, 1, 2]


SMALL = """\
stage: 2
questions: tiny:easy
limit: 20
known: 0.8
samples: 4
eval_samples: 1
max_new_tokens: 60
n_features: 5
ungated: true
arms: [outcome, sae]
seeds: [0]
steps: 1
eval_every: 1
questions_per_step: 1
generations: 2
learning_rate: 1.0e-3
"""


@pytest.mark.slow
def test_killed_with_all_its_processes_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(SMALL)

    def start(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-c",
            "import mechreward.cli as c; raise SystemExit(c.main())",
            "gate",
            "--stage",
            "2",
        ]
        command += ["--config", str(tmp_path / "study.yaml"), "--out", str(folder), *flags]
        log = (tmp_path / f"{folder.name}.log").open("ab")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, object]:
        # Two arms and one seed are inconclusive: exit code 1.
        assert process.wait(timeout=300) == 1, (tmp_path / f"{folder.name}.log").read_text()
        found: dict[str, object] = json.loads((folder / "results.json").read_text())
        return found

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = finish(start(whole), whole)
    killed = start(broken)
    first, second = (broken / "runs" / f"{arm}-0.json" for arm in ("outcome", "sae"))
    while not first.exists():
        assert killed.poll() is None, (tmp_path / "broken.log").read_text()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert not second.exists() and not (broken / "results.json").exists()
    stamp = first.stat().st_mtime_ns
    assert finish(start(broken, "--resume"), broken) == straight
    assert first.stat().st_mtime_ns == stamp, "what was there is not run again"
    assert len(straight["runs"]) == 2 and not straight["crashed"]


def test_tuning_never_sees_unknown_and_outcome_has_no_dense_weight(tmp_path: Path) -> None:
    tuned = config(tmp_path, learning_rates=(1e-3, 1e-4), dense_weights=(0.1, 0.3))
    assert tuned.candidates("outcome") == [(1e-3, 0.0), (1e-4, 0.0)]
    assert tuned.candidates("sae") == [(1e-3, 0.1), (1e-3, 0.3), (1e-4, 0.1), (1e-4, 0.3)]
    inputs = prepare(tuned)
    trained, tried = sides(tuned, inputs, trial=True)
    same, tested = sides(tuned, inputs, trial=False)
    assert trained == same and tested == inputs.split.unknown
    assert len(trained) == 12 and len(tried) == 4
    assert {q.id for q in trained + tried} == {q.id for q in inputs.split.known}
    plain = config(tmp_path)
    assert sides(plain, inputs, trial=False) == (inputs.split.known, inputs.split.unknown)
    assert {q.id for half in gate_halves(inputs) for q in half} == {q.id for q in inputs.split.known}


def test_tuning_takes_the_best_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worth = {("outcome", 1e-3): 0.2, ("outcome", 1e-4): 0.4, ("sae", 1e-3): 0.5, ("sae", 1e-4): 0.5}

    def trial(_: StudyConfig, __: Path, path: Path, arm: str, seed: int, c: Candidate, is_trial: bool) -> None:
        assert is_trial and seed == 1000
        path.parent.mkdir(exist_ok=True)
        curve = [{"step": 0, "correct": {"q": 0.9}}, {"step": 1, "correct": {"q": worth[arm, c.learning_rate]}}]
        path.write_text(json.dumps({"arm": arm, "seed": seed, "evaluations": curve}))

    monkeypatch.setattr(room, "run_jobs", here)
    monkeypatch.setattr(room, "run_arm", trial)
    chosen = room.tune(config(tmp_path, learning_rates=(1e-3, 1e-4)), tmp_path, room.silent)
    assert chosen == {"outcome": (1e-4, 0.0), "sae": (1e-3, 0.3)}
    assert json.loads((tmp_path / "tuning.json").read_text())["outcome"]["tried"] == 2


def test_the_study_says_what_crashed(tmp_path: Path) -> None:
    setting = config(tmp_path, seeds=(0, 1))
    for arm, seed in (("outcome", 0), ("outcome", 1), ("sae", 1)):
        path = tmp_path / "runs" / f"{arm}-{seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"arm": arm, "seed": seed, "evaluations": [{"step": 0, "correct": {"q": 0.5}}]}))
    found = collect(setting, tmp_path, {"sae-0": "ValueError: no"})
    assert [(run.arm, run.seed) for run in found.runs] == [("outcome", 0), ("outcome", 1), ("sae", 1)]
    assert [(c.arm, c.seed, c.error) for c in found.crashed] == [("sae", 0, "ValueError: no")]


def test_arm_names() -> None:
    assert (kind_of("sae/step"), credit_of("sae/step", "per_token"), credit_of("sae", "potential")) == (
        "sae", "step", "potential",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arms": ("outcome", "magic")}, "'magic' is none of outcome, sae"),
        ({"arms": ("outcome", "sae/best")}, "'sae/best' is none of"),
        ({"arms": ("sae",)}, "outcome has to be among them"),
        ({"arms": ("outcome", "sae", "sae")}, "none may come twice"),
        ({"arms": ("outcome", "outcome/step")}, "'outcome/step': the outcome alone has no dense reward"),
        ({"judged": "probe"}, "^judged: 'probe' must be one of the arms"),
        ({"arms": ("outcome", "random/step"), "judged": "random/step"}, "neither outcome nor random"),
        ({"arms": ("outcome", "random"), "judged": "random"}, "neither outcome nor random"),
        ({"seeds": (0, 1000)}, "^seeds: must differ from each other"),
        ({"seeds": (1, 1)}, "seeds: must differ"),
        ({"seeds": ()}, "seeds:"),
        ({"workers": 0}, "workers: 0 is not allowed"),
        ({"arm": 1}, "arm: there is no such field"),
    ],
)
def test_bad_settings(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        config(tmp_path, **change)


def test_seeds_decide_order_of_questions_alike_in_all_arms(tmp_path: Path) -> None:
    jobs = [room.run_job(config(tmp_path), tmp_path, arm, 3, Candidate(1e-3, 0.3)) for arm in ("outcome", "sae/step")]
    assert [job.path.name for job in jobs] == ["outcome-3.json", "sae-step-3.json"]
    assert [job.arguments[3:5] for job in jobs] == [("outcome", 3), ("sae/step", 3)]
    assert np.all([job.arguments[6] is False for job in jobs])
