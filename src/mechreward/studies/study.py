"""A study from front to back: what the arms share, a run for each arm and seed, one results file.

1. shared     KNOWN answers, the SAE, discovery and Gate 1, by the main job's own stages (`mechreward.pipeline`)
2. start      the starting model's accuracy on UNKNOWN: step 0 of every run
3. tune       every candidate of every arm with the tuning seeds, on a part of KNOWN that is not trained on; skipped
              for arms with one candidate
4. runs       each arm with each seed, all arms of a seed before the next: the same starting model, questions in the
              same order; accuracy on UNKNOWN by question, sampled with the same seeds in all arms, every `eval_every`
              steps and at the end
5. results    `results.json`, as Gate 2 reads it, with what crashed

One JSON file a run, skipped where it is there; a run depends on its arguments alone, so that a study resumed after a
kill leaves the files of one that was never killed.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechreward.errors import InputError
from mechreward.features import load_contrast, load_pack
from mechreward.files import read_json, write_json
from mechreward.gates import ArmRun, Crash, Evaluation, StudyResults, question_means
from mechreward.hacking import GuardConfig
from mechreward.inputs import Inputs, open_folder, prepare
from mechreward.models import LoadedModel
from mechreward.pipeline import answers_to, discover_pack, get_sae, judge_pack, sample_known
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.rollout import load_responses
from mechreward.rundir import stage_seed
from mechreward.sae import load_sae
from mechreward.stages import StageProgress, grpo_options, silent, verified
from mechreward.studies.config import Candidate, StudyConfig, credit_of, kind_of
from mechreward.studies.jobs import Job, run_jobs
from mechreward.studies.rewards import arm_reward
from mechreward.studies.survival import check_measurable, check_some_right, measure
from mechreward.tasks import Question, QuestionSplit, save_questions, split_questions
from mechreward.training import DenseConfig, train_arm

TUNING_SHARE = 0.25
"""Of KNOWN: what candidates are compared on, where there is something to tune."""


def run_study(config: StudyConfig, progress: StageProgress = silent) -> StudyResults:
    """Runs a study, or goes on with it (`config.resume`).

    Raises:
        InputError: bad input, or a pack that did not pass Gate 1 without `ungated`.
    """
    for seed in (*config.tune_seeds, *config.seeds):
        grpo_options(config.model_copy(update={"seed": seed}))
    inputs = prepare(config)
    if len(inputs.split.known) < 2:
        raise InputError("questions: one of them is KNOWN, and discovery and Gate 1 need one each; give more")
    if config.survival:
        check_measurable(config, inputs)
    folder = open_folder(inputs)
    share(inputs, folder, progress)
    start(inputs, folder, progress)
    if config.survival:
        check_some_right(read_start(folder))
    chosen = tune(config, folder, progress)
    jobs = [run_job(config, folder, arm, seed, chosen[arm]) for seed in config.seeds for arm in config.arms]
    errors = _run(jobs, config, progress, f"train {len(jobs)} runs")
    results = collect(config, folder, errors)
    write_json(folder / "results.json", results.model_dump(mode="json"))
    return results


def share(inputs: Inputs[StudyConfig], folder: Path, progress: StageProgress) -> None:
    """The stages before training, each skipped if its files are there."""
    save_questions(folder / "questions.parquet", inputs.split)
    responses = sample_known(inputs, folder, progress)
    sae = get_sae(inputs, folder, responses, progress)
    halves = gate_halves(inputs)
    pack, table = discover_pack(inputs, folder, sae, answers_to(responses, halves.known), progress)
    held_out = answers_to(responses, halves.unknown)
    gate = judge_pack(inputs, folder, FeatureReward.from_pack(pack, sae), table, held_out, progress)
    if gate["verdict"] != "pass" and not inputs.config.ungated:
        raise InputError(
            f"pack: Gate 1 did not pass ({gate['verdict']}: {gate['reason']}); a study needs --ungated then"
        )


def start(inputs: Inputs[StudyConfig], folder: Path, progress: StageProgress) -> None:
    """The starting model on UNKNOWN, asked with the seeds of every arm: sampled once, for all runs."""
    path, config = folder / "start.json", inputs.config
    if path.exists():
        return
    questions = inputs.split.unknown
    with progress.stage(f"evaluate the start: {len(questions)} questions x {config.eval_samples}"):
        write_json(path, _evaluation(inputs, inputs.loaded, questions, 0).model_dump(mode="json"))


def read_start(folder: Path) -> Evaluation:
    """What `start` wrote."""
    return Evaluation(**read_json(folder / "start.json"))


def _evaluation(
    inputs: Inputs[StudyConfig], policy: LoadedModel, questions: Sequence[Question], step: int
) -> Evaluation:
    seed = stage_seed(inputs.config.seed, "evaluate")
    answers = verified(inputs, policy, questions, inputs.config.eval_samples, seed, lambda _: None)
    right = question_means([bool(answer.correct) for answer in answers], [answer.question_id for answer in answers])
    return Evaluation(step=step, correct=right)


def gate_halves(inputs: Inputs[StudyConfig]) -> QuestionSplit:
    """The half of KNOWN that is discovered on, and the other."""
    return split_questions(inputs.split.known, 0.5, stage_seed(inputs.config.seed, "gate"))


def run_job(config: StudyConfig, folder: Path, arm: str, seed: int, candidate: Candidate, trial: str = "") -> Job:
    """The run of one arm and seed; with `trial`, one of tuning."""
    stem = f"{arm.replace('/', '-')}-{seed}{trial}"
    path = folder / ("trials" if trial else "runs") / f"{stem}.json"
    return Job(stem, path, run_arm, (config, folder, path, arm, seed, candidate, bool(trial)))


def run_arm(
    config: StudyConfig, folder: Path, path: Path, arm: str, seed: int, candidate: Candidate, trial: bool = False
) -> ArmRun:
    """Trains one arm with one seed and writes its accuracy by question to `path`.

    Args:
        trial: train for `tune_steps` and test on the part of KNOWN that tuning keeps aside, at the end only.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    inputs = prepare(config)
    trained_on, tested_on = sides(config, inputs, trial)
    steps = config.tune_steps or config.steps if trial else config.steps
    evaluations = [] if trial else [read_start(folder)]

    def evaluate(policy: LoadedModel, step: int) -> None:
        if step < steps:
            evaluations.append(_evaluation(inputs, policy, tested_on, step))

    # A checkpoint of a run that was killed would be gone on with, without the evaluations before it.
    checkpoints = folder / "checkpoints" / path.stem
    shutil.rmtree(checkpoints, ignore_errors=True)
    reward = load_reward(config, inputs, folder, arm, seed)
    chosen = {"learning_rate": candidate.learning_rate, "seed": seed, "steps": steps}
    every = {"save_every": 10**6, "eval_every": steps if trial else config.eval_every}
    policy = train_arm(
        inputs.loaded,
        trained_on,
        [reward, OutcomeReward(inputs.verifier)],
        grpo_options(config.model_copy(update=chosen | every)),
        checkpoints,
        arm=arm,
        dense=_dense(config, arm, candidate),
        evaluate=evaluate,
    )
    # Of what training gives back: where the guards stopped it, the last good policy.
    evaluations.append(_evaluation(inputs, policy, tested_on, steps))
    run = ArmRun(arm=arm, seed=seed, evaluations=tuple(evaluations))
    if config.survival and arm == config.judged and not trial:
        found = measure(config, prepare(config), policy, reward, tested_on, seed, stage_seed(config.seed, "evaluate"))
        write_json(folder / "survival" / path.name, found.model_dump(mode="json"))
    facts = {"seconds": round(time.perf_counter() - started, 1)} | candidate._asdict()
    shutil.rmtree(checkpoints)
    write_json(path, run.model_dump(mode="json") | {"facts": facts})
    return run


def _dense(config: StudyConfig, arm: str, candidate: Candidate) -> DenseConfig:
    return DenseConfig(
        weight=candidate.dense_weight,
        credit=credit_of(arm, config.credit),
        gamma=config.gamma,
        step_end=config.step_end,
        gap_every=0,
        guard=GuardConfig(on=config.guards),
    )


def sides(config: StudyConfig, inputs: Inputs[StudyConfig], trial: bool) -> tuple[list[Question], list[Question]]:
    """Questions to train on and to test on. Tuning never sees UNKNOWN, and what it tests on is never trained on."""
    tuned = any(len(config.candidates(arm)) > 1 for arm in config.arms)
    known = inputs.split.known
    if not tuned:
        return known, inputs.split.unknown
    parts = split_questions(known, 1 - TUNING_SHARE, stage_seed(config.seed, "tune"))
    return parts.known, parts.unknown if trial else inputs.split.unknown


def load_reward(config: StudyConfig, inputs: Inputs[StudyConfig], folder: Path, arm: str, seed: int) -> FeatureReward:
    """The reward of an arm, made anew from what the arms share: the same in every process.

    What an arm draws (random features, shuffled signs and labels) it draws for each seed, so that the luck of the draw
    is in the spread over seeds.
    """
    own = folder / "sae"
    sae = inputs.sae or load_sae(own, device=config.device)
    found = FeatureReward.from_pack(load_pack(folder / "pack.json"), sae)
    responses = answers_to(load_responses(folder / "responses" / "known.parquet"), gate_halves(inputs).known)
    table = load_contrast(folder / "features.parquet")
    return arm_reward(
        kind_of(arm), found, table, responses, inputs.loaded, stage_seed(config.seed, f"arms-{seed}")
    )  # fmt: skip


def tune(config: StudyConfig, folder: Path, progress: StageProgress) -> dict[str, Candidate]:
    """Each arm's best candidate by mean final accuracy over the tuning seeds; of equal ones the first.

    Chosen once: a crashed trial that came to an end when the study goes on could turn the choice, and an arm's later
    seeds would be trained with other settings than its first ones.

    Raises:
        InputError: if every trial of an arm crashed.
    """
    path = folder / "tuning.json"
    if path.exists():
        return {arm: Candidate(one["learning_rate"], one["dense_weight"]) for arm, one in read_json(path).items()}
    tried = {arm: config.candidates(arm) for arm in config.arms}
    trials = {
        (arm, place, seed): run_job(config, folder, arm, seed, candidate, f"-{place}")
        for arm, candidates in tried.items()
        if len(candidates) > 1
        for place, candidate in enumerate(candidates)
        for seed in config.tune_seeds
    }
    if trials:
        _run(list(trials.values()), config, progress, f"tune: {len(trials)} trials")
    chosen = {}
    for arm, candidates in tried.items():
        scores = [
            _trial_score([trials[arm, place, seed] for seed in config.tune_seeds]) if len(candidates) > 1 else 0.0
            for place in range(len(candidates))
        ]
        if max(scores) < 0:
            raise InputError(f"arms: no trial of {arm} came to an end; its logs are in {folder / 'trials'}")
        chosen[arm] = candidates[scores.index(max(scores))]
    write_json(path, {arm: {**c._asdict(), "tried": len(tried[arm])} for arm, c in chosen.items()})
    return chosen


def _trial_score(jobs: Sequence[Job]) -> float:
    """Mean final accuracy; -1 for a candidate of which a trial crashed."""
    if not all(job.path.exists() for job in jobs):
        return -1.0
    return float(np.mean([read_run(job.path).curve[-1][1] for job in jobs]))


def collect(config: StudyConfig, folder: Path, errors: dict[str, str]) -> StudyResults:
    """All runs that there are, and the errors of the others."""
    candidate = Candidate(0.0, 0.0)
    jobs = {(arm, seed): run_job(config, folder, arm, seed, candidate) for arm in config.arms for seed in config.seeds}
    runs = [read_run(job.path) for job in jobs.values() if job.path.exists()]
    crashed = [Crash(arm=arm, seed=s, error=errors[job.name]) for (arm, s), job in jobs.items() if job.name in errors]
    return StudyResults(judged=config.judged, runs=tuple(runs), crashed=tuple(crashed))


def read_run(path: Path) -> ArmRun:
    """What `run_arm` wrote."""
    record: dict[str, Any] = read_json(path)
    return ArmRun(**{name: record[name] for name in ArmRun.model_fields})


def _run(jobs: Sequence[Job], config: StudyConfig, progress: StageProgress, title: str) -> dict[str, str]:
    with progress.stage(title, len(jobs)) as advance:
        advance(sum(job.path.exists() for job in jobs))
        return run_jobs(jobs, config.workers, lambda _: advance(1))
