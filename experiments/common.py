"""What experiments 01, 02, 03 and 07 share: the same questions, pack, training and evaluation, whatever the reward.

Each seed is a run directory of its own, by the main job's stages (`mechreward.pipeline`), so that `mechreward report`
reads it; `summary.json` beside them has the differences of all seeds. The smoke settings take the bundled model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mechreward.comparison import compare_arms
from mechreward.config import Arm, ImproveConfig
from mechreward.features import load_pack
from mechreward.files import write_json
from mechreward.inputs import Inputs, load_policy, open_folder, prepare
from mechreward.models import LoadedModel
from mechreward.pipeline import answers_to, discover_pack, get_sae, judge_pack, sample_known
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.rollout import save_responses
from mechreward.rundir import stage_seed
from mechreward.settings import make_settings, read_fields
from mechreward.stages import finish, grpo_options, sample_baseline, silent, verified
from mechreward.tasks import save_questions, split_questions
from mechreward.training import DenseConfig, train_arm

SMOKE: dict[str, Any] = {
    "questions": "tiny:easy", "limit": 24, "known": 0.75, "samples": 4, "eval_samples": 2, "max_new_tokens": 60,
    "n_features": 5, "steps": 2, "eval_every": 2, "questions_per_step": 2, "generations": 4, "learning_rate": 1e-3,
    "ungated": True,
}  # fmt: skip
Rewards = Callable[[FeatureReward, OutcomeReward, ImproveConfig], list[Any]]
"""From the pack's reward, the outcome's and the settings to what is trained on."""


@dataclass(frozen=True)
class Options:
    """One experiment over seeds."""

    out: Path
    """Folder of a run directory a seed, and of summary.json."""
    config: Path | None = None
    """YAML of the settings of `mechreward improve`; needed without `--smoke`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides questions' split, sampling, discovery and training of its run."""
    smoke: bool = False
    """The bundled model, a few questions and steps, one seed: shows that the script runs."""


@dataclass(frozen=True)
class Trained:
    """One seed's end."""

    inputs: Inputs[ImproveConfig]
    folder: Path
    policy: LoadedModel
    results: dict[str, Any]


def options(description: str | None, arguments: list[str] | None) -> Options:
    """From the command line, or from `arguments`."""
    given = tyro.cli(Options, args=sys.argv[1:] if arguments is None else arguments, description=description)
    return Options(given.out, given.config, (given.seeds[0],), True) if given.smoke else given


def configs(given: Options) -> list[ImproveConfig]:
    """One configuration a seed."""
    fields = dict(SMOKE) if given.smoke else {}
    if given.config is not None:
        fields |= read_fields(ImproveConfig, given.config)
    return [make_settings(ImproveConfig, fields | {"seed": s, "out": given.out / f"seed-{s}"}) for s in given.seeds]


def train(config: ImproveConfig, arm: Arm, rewards: Rewards) -> Trained:
    """Discovery, Gate 1, training and evaluation on UNKNOWN, in a run directory of its own."""
    started = time.perf_counter()
    inputs = prepare(config)
    folder = open_folder(inputs)
    save_questions(folder / "questions.parquet", inputs.split)
    sample_baseline(inputs, folder, silent)
    known = sample_known(inputs, folder, silent)
    sae = get_sae(inputs, folder, known, silent)
    halves = split_questions(inputs.split.known, 0.5, stage_seed(config.seed, "gate"))
    pack, table = discover_pack(inputs, folder, sae, answers_to(known, halves.known), silent)
    reward = FeatureReward.from_pack(pack, sae)
    gate = judge_pack(inputs, folder, reward, table, answers_to(known, halves.unknown), silent)
    reward = FeatureReward.from_pack(load_pack(folder / "pack.json"), sae)
    policy = train_arm(
        load_policy(config),
        inputs.split.known,
        rewards(reward, OutcomeReward(inputs.verifier), config),
        grpo_options(config),
        folder / "checkpoints" / arm,
        arm=arm,
        dense=DenseConfig(credit=config.credit, gamma=config.gamma, step_end=config.step_end),
        metrics_path=folder / "metrics.jsonl",
        rollouts_path=folder / "rollouts.parquet",
    )
    seed = stage_seed(config.seed, "baseline")
    after = verified(inputs, policy, inputs.split.unknown, config.eval_samples, seed, lambda _: None)
    save_responses(folder / "responses" / f"final-{arm}.parquet", after)
    outcome = finish(folder, compare_arms([arm], folder), started, gate["verdict"])
    return Trained(inputs, folder, policy, outcome.results)


def run(description: str | None, arm: Arm, rewards: Rewards, arguments: list[str] | None = None) -> list[Trained]:
    """Every seed; prints each verdict, writes `summary.json`."""
    given = options(description, arguments)
    trained = []
    for config in configs(given):
        trained.append(train(config, arm, rewards))
        print(f"seed {config.seed}: {trained[-1].results['verdict']}", flush=True)
    rows = {str(one.inputs.config.seed): one.results["arms"][arm] for one in trained}
    write_json(given.out / "summary.json", {"arm": arm, "seeds": rows})
    print(f"wrote {given.out / 'summary.json'}")
    return trained
