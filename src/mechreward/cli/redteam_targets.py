"""What the red team attacks: a reward, questions, and models that are loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mechreward.cli.asking import asked, load_given_reward
from mechreward.cli.redteam_settings import RedTeamSettings, RunSettings
from mechreward.config import ImproveConfig, RunConfig, TrainRunConfig
from mechreward.errors import InputError, named
from mechreward.inputs import load_policy, load_run_reward, verifier_of
from mechreward.models import LoadedModel, load_model
from mechreward.report.data import read_yaml
from mechreward.reward import FeatureReward
from mechreward.rundir import CONFIG
from mechreward.settings import make_settings, read_fields
from mechreward.stages import kept_policies
from mechreward.tasks import Question, load_split
from mechreward.tiny import model_path
from mechreward.verifiers import Verifier


@dataclass(frozen=True)
class Targets:
    """Everything but the models is loaded."""

    reward: FeatureReward
    questions: list[Question]
    verifier: Verifier
    max_new_tokens: int
    models: Mapping[str, Callable[[], LoadedModel]]
    """By the name of its column; the first one's threshold holds for all."""


def given(settings: RedTeamSettings) -> Targets:
    """What was named one by one."""
    names = {"before": settings.model} | ({"after": settings.after} if settings.after is not None else {})
    options: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    models = {
        name: partial(
            load_model, model_path(model), adapter=settings.adapter if name == list(names)[-1] else None, **options
        )
        for name, model in names.items()
    }
    return Targets(
        reward=load_given_reward(settings, settings.pack, settings.model, settings.device),
        questions=asked(settings, settings.questions, settings.limit),
        verifier=verifier_of(settings.verifier, settings.strictness),
        max_new_tokens=settings.max_new_tokens,
        models=models,
    )


def of_run(settings: RunSettings) -> Targets:
    """What a run directory holds: the starting model and the policies of its arms, its pack, SAE, UNKNOWN questions.

    Raises:
        InputError: if the folder is no run, holds no pack or no such policy, or was sampled through a chat template.
    """
    folder = settings.run
    for needed in (CONFIG, "pack.json", "questions.parquet"):
        if not (folder / needed).exists():
            raise InputError(f"run: {folder} has no {needed}; name a run directory of `mechreward improve` or `train`")
    with named(run_dir="run"):
        told = read_yaml(folder / CONFIG) or {}
    if "stage" in told:
        raise InputError(f"run: {folder} is a study; name a run directory of `mechreward improve` or `train`")
    kind = TrainRunConfig if "pack" in told else ImproveConfig
    stored = make_settings(kind, read_fields(kind, folder / CONFIG))
    if stored.chat:
        raise InputError(f"run: {folder} asks through a chat template, and canaries are not put through one")
    config = stored.model_copy(update={"device": settings.device})
    kept = kept_policies(folder)
    missing = [arm for arm in settings.arms if arm not in kept]
    if missing or not kept:
        raise InputError(
            f"arms: {folder} kept no policy of {', '.join(missing) or 'any arm'}; there are {', '.join(kept) or 'none'}"
        )
    models: dict[str, Callable[[], LoadedModel]] = {"before": partial(load_policy, config)}
    models |= {arm: partial(load_kept, config, kept[arm]) for arm in settings.arms or kept}
    return Targets(
        reward=load_run_reward(config, folder),
        questions=load_split(folder / "questions.parquet").unknown[: settings.limit],
        verifier=verifier_of(config.verifier, config.strictness),
        max_new_tokens=config.max_new_tokens,
        models=models,
    )


def load_kept(config: RunConfig, policy: Path) -> LoadedModel:
    """A policy that a run kept: a whole model, or an adapter to put on the model that the run started with."""
    if (policy / "adapter_config.json").exists():
        return load_policy(config.model_copy(update={"adapter": str(policy)}))
    return load_model(policy, dtype=config.dtype, device=config.device)
