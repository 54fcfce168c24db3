"""A study of two arms for one step on the bundled reasoner, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mechreward.errors import InputError
from mechreward.features import load_pack
from mechreward.gates import Answer, Evaluation, StudyResults, Survival
from mechreward.inputs import prepare
from mechreward.rollout import Response
from mechreward.rundir import stage_seed
from mechreward.studies import study as room
from mechreward.studies.config import Candidate, StudyConfig, credit_of, kind_of, make_study
from mechreward.studies.jobs import Job
from mechreward.studies.study import collect, gate_halves, run_study, sides
from mechreward.tasks import Question


def config(out: Path, **changes: object) -> StudyConfig:
    small = {
        "questions": "tiny:easy", "limit": 20, "known": 0.8, "samples": 4, "eval_samples": 1, "max_new_tokens": 60,
        "n_features": 5, "ungated": True, "arms": ("outcome", "sae"), "seeds": (0,), "steps": 1, "eval_every": 3,
        "questions_per_step": 1, "generations": 2, "learning_rate": 1e-3, "out": out,
    }  # fmt: skip
    return make_study(**(small | changes))


def here(jobs: list[Job], workers: int, on_done: object) -> dict[str, str]:  # noqa: ARG001
    """`run_jobs` in this process: what a child would do."""
    for job in jobs:
        if not job.path.exists():
            job.function(*job.arguments)
    return {}


@dataclass(frozen=True)
class Whole:
    """A study that ran through in this process, one thread, and what it wrote then: one test runs a part of it anew."""

    folder: Path
    results: StudyResults
    written: dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("study") / "s"
    torch.set_num_threads(1)  # as in every process of a study that the command line starts here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "run_jobs", here)
        results = run_study(config(folder))
    return Whole(folder, results, json.loads((folder / "results.json").read_text()))


def test_two_arms_one_step_and_resumed(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "run_jobs", here)
    folder, results = whole.folder, whole.results
    assert [(run.arm, run.seed) for run in results.runs] == [("outcome", 0), ("sae", 0)]
    assert all([e.step for e in run.evaluations] == [0, 1] for run in results.runs)
    start = [run.evaluations[0].correct for run in results.runs]
    assert start[0] == start[1] and len(start[0]) == 4, "both start from the same model, asked with the same seeds"
    assert StudyResults(**whole.written) == results and whole.written["judged"] == "sae"
    # A run whose file is lost comes out the same, however many run at a time; the other is not run again.
    lost, kept = folder / "runs" / "sae-0.json", folder / "runs" / "outcome-0.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    # What a kill leaves behind, here of another run, has no say.
    assert not any((folder / "checkpoints").iterdir())
    (folder / "checkpoints" / "sae-0").mkdir()
    (folder / "checkpoints" / "sae-0" / "run.json").write_text("{}")
    stamp = kept.stat().st_mtime_ns
    again = run_study(config(folder, resume=True, workers=2))
    assert again == results and kept.stat().st_mtime_ns == stamp
    assert before["facts"].pop("seconds") > 0
    assert before["facts"] == {"learning_rate": 1e-3, "dense_weight": 0.3}
    with pytest.raises(InputError, match="holds a run already"):
        run_study(config(folder))
    # What is drawn at random is drawn for each seed, and the same in every process.
    setting, inputs = config(folder), prepare(config(folder))
    for arm in ("random", "shuffled", "failed"):
        packs = [room.load_reward(setting, inputs, folder, arm, seed).pack for seed in (0, 1, 0)]
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


@pytest.mark.slow
def test_killed_with_all_its_processes_and_resumed_equals_uninterrupted(whole: Whole, tmp_path: Path) -> None:
    same = config(tmp_path).model_dump(mode="json", exclude_unset=True, exclude={"out"})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"stage": 2} | same))

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

    broken = tmp_path / "broken"
    killed = start(broken)
    first, second = (broken / "runs" / f"{arm}-0.json" for arm in ("outcome", "sae"))
    while not first.exists():
        assert killed.poll() is None, (tmp_path / "broken.log").read_text()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert not second.exists() and not (broken / "results.json").exists()
    stamp = first.stat().st_mtime_ns
    assert finish(start(broken, "--resume"), broken) == whole.written
    assert first.stat().st_mtime_ns == stamp, "what was there is not run again"
    assert len(whole.written["runs"]) == 2 and not whole.written["crashed"]


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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": (0, -1)}, "^seed: -1 is out of range"),
        ({"tune_seeds": (2**32,)}, "^seed: 4294967296 is out of range"),
        ({"limit": 2, "known": 0.5}, "^questions: one of them is KNOWN, and discovery and Gate 1 need one each"),
        ({"survival": True, "probe": "none"}, "^probe: none is neither a file"),
    ],
)
def test_what_no_run_could_be_made_of_is_found_before_anything_is_written(
    change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        run_study(config(tmp_path / "s", **change))
    assert not (tmp_path / "s").exists()


def test_what_tuning_chose_is_kept_when_the_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashes = {1e-3}

    def trial(_: StudyConfig, __: Path, path: Path, arm: str, seed: int, c: Candidate, ___: bool) -> None:
        if c.learning_rate not in crashes:
            path.parent.mkdir(exist_ok=True)
            record = {"arm": arm, "seed": seed, "evaluations": [{"step": 1, "correct": {"q": 100 * c.learning_rate}}]}
            path.write_text(json.dumps(record))

    monkeypatch.setattr(room, "run_jobs", here)
    monkeypatch.setattr(room, "run_arm", trial)
    setting = config(tmp_path, learning_rates=(1e-3, 1e-4))
    first = room.tune(setting, tmp_path, room.silent)
    assert first == {"outcome": (1e-4, 0.0), "sae": (1e-4, 0.3)}
    crashes.clear()
    assert room.tune(setting, tmp_path, room.silent) == first


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


def test_runs_are_started_seed_by_seed_with_what_tuning_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = config(tmp_path / "s", seeds=(4, 2), workers=3, survival=True)
    chosen = {"outcome": Candidate(1e-3, 0.0), "sae": Candidate(1e-4, 0.2)}
    asked: list[tuple] = []

    def runs(jobs: list[Job], workers: int, on_done: Callable[[Job], None]) -> dict[str, str]:
        asked.append((workers, [(job.name, job.arguments[3:]) for job in jobs]))
        for job in jobs[1:]:
            on_done(job)
        return {"outcome-4": "ValueError: no"}

    inputs = prepare(setting)
    for name, fake in (
        ("prepare", lambda _: inputs), ("open_folder", lambda _: tmp_path), ("tune", lambda *_: chosen),
        ("share", lambda *_: asked.append("share")), ("start", lambda *_: None), ("run_jobs", runs),
        ("read_start", lambda _: Evaluation(step=7, correct={"q": 0.5})),
        ("check_measurable", lambda _config, given: asked.append(given)),
        ("check_some_right", lambda start: asked.append(start.step)),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, fake)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "outcome-2.json").touch()
    bar = Counted()
    monkeypatch.setattr(room, "collect", lambda *_: StudyResults(judged="sae", runs=()))
    run_study(setting, bar)
    candidates = [("outcome", 4, chosen["outcome"], False), ("sae", 4, chosen["sae"], False)]
    candidates += [("outcome", 2, chosen["outcome"], False), ("sae", 2, chosen["sae"], False)]
    assert asked == [
        inputs,
        "share",
        7,
        (3, [(f"{arm}-{seed}", (arm, seed, *rest)) for arm, seed, *rest in candidates]),
    ]
    assert bar.counts == [1, 1, 1, 1] and bar.title == "train 4 runs"


class Counted:
    """A progress bar that notes what it is told."""

    def __init__(self) -> None:
        self.title, self.counts = "", []

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:  # noqa: ARG002
        self.title = title
        yield self.counts.append


@pytest.mark.parametrize(("trial", "steps"), [(False, 6), (True, 2)])
def test_a_run_is_trained_as_its_arm_seed_and_candidate_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: bool, steps: int
) -> None:
    setting = config(
        tmp_path, arms=("outcome", "sae", "sae/return_to_go"), judged="sae/return_to_go", steps=6, tune_steps=2,
        learning_rates=(1e-3, 1e-4), gamma=0.7, step_end=".", credit="step", survival=True, eval_every=3,
    )  # fmt: skip
    trained, asked, measured = [], [], []

    def train(loaded, questions, rewards, options, checkpoints, *, arm, dense, evaluate):
        trained.append((questions, rewards[0], options, arm, dense))
        checkpoints.mkdir(parents=True)
        evaluate(loaded, 1)
        return loaded

    def measure(_config, inputs, policy, reward, questions, seed, answer_seed):
        measured.append((inputs.loaded is policy, reward, questions, seed, answer_seed))
        one = (Answer(question="q", correct=True, live=0.0, frozen=0.0, probe=None),)
        return Survival(arm="sae", seed=seed, before=one, after=one)

    for name, fake in (
        ("train_arm", train), ("load_reward", lambda *given: given[-2:]), ("measure", measure),
        ("verified", lambda _inputs, _policy, *given: asked.append(given[:3]) or right(given[0])),
        ("read_start", lambda _: Evaluation(step=0, correct={"q": 0.5})),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, fake)
    inputs = prepare(setting)
    trained_on, tested_on = sides(setting, inputs, trial)
    for arm, credit in (("sae", "step"), ("sae/return_to_go", "return_to_go")):
        path = tmp_path / "runs" / f"{arm.replace('/', '-')}-5.json"
        run = room.run_arm(setting, tmp_path, path, arm, 5, Candidate(1e-4, 0.2), trial)
        assert [one.step for one in run.evaluations] == ([1, 2] if trial else [0, 1, 6])
        questions, reward, options, named, dense = trained.pop()
        assert (questions, reward, named) == (trained_on, (arm, 5), arm)
        assert (options.learning_rate, options.seed, options.steps) == (1e-4, 5, steps)
        assert (options.eval_every, options.save_every) == (2 if trial else 3, 10**6)
        assert (dense.weight, dense.credit, dense.gamma, dense.step_end) == (0.2, credit, 0.7, ".")
        assert not dense.guard.on and dense.gap_every == 0
    evaluated = stage_seed(setting.seed, "evaluate")
    assert {one[1:] for one in asked} == {(1, evaluated)} and all(one[0] == tested_on for one in asked)
    judged = [(False, ("sae/return_to_go", 5), tested_on, 5, evaluated)]
    assert measured == ([] if trial else judged)
    assert (tmp_path / "survival" / "sae-return_to_go-5.json").exists() != trial


def right(questions: list[Question]) -> list[Response]:
    return [Response(q.id, 0, (1,), (2,), "", (0.0,), "eos", True) for q in questions]


def test_a_candidate_of_which_a_trial_crashed_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(_: StudyConfig, __: Path, path: Path, arm: str, seed: int, c: Candidate, ___: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if c.learning_rate == 1e-4 and (arm == "outcome" or seed == 1000):
            record = {"arm": arm, "seed": seed, "evaluations": [{"step": 1, "correct": {"q": 0.0}}]}
            path.write_text(json.dumps(record))

    monkeypatch.setattr(room, "run_jobs", here)
    monkeypatch.setattr(room, "run_arm", trial)
    one = config(tmp_path, learning_rates=(1e-3, 1e-4))
    assert room.tune(one, tmp_path, room.silent)["outcome"] == (1e-4, 0.0), "a 0 is better than a crash"
    both = config(tmp_path / "b", learning_rates=(1e-3, 1e-4), tune_seeds=(1000, 1001))
    with pytest.raises(InputError, match="^arms: no trial of sae came to an end; its logs are in .*trials"):
        room.tune(both, tmp_path / "b", room.silent)


def test_a_pack_that_did_not_pass_is_not_studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prepare(config(tmp_path, ungated=False))
    pack, given, calls = load_pack("tiny/reasoning_pack"), right(inputs.split.known), []
    for name, result in (("sample_known", given), ("get_sae", inputs.sae), ("save_questions", None)):
        monkeypatch.setattr(room, name, lambda *_, result=result: result)
    monkeypatch.setattr(room, "discover_pack", lambda *found: calls.append(found[3]) or (pack, None))
    monkeypatch.setattr(
        room, "judge_pack", lambda *found: calls.append(found[4]) or {"verdict": "inconclusive", "reason": "too few"}
    )
    with pytest.raises(InputError, match=r"^pack: Gate 1 did not pass \(inconclusive: too few\); a study needs --ung"):
        room.share(inputs, tmp_path, room.silent)
    halves = gate_halves(inputs)
    for half, seen in zip(halves, calls, strict=True):
        assert {q.id for q in half} == {r.question_id for r in seen}
    room.share(replace(inputs, config=config(tmp_path)), tmp_path, room.silent)


def test_canaries_are_plain_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^survival: canaries and the panel are plain texts"):
        config(tmp_path, survival=True, chat=True)
