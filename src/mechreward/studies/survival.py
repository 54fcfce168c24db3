"""What Gate 3 is told of a trained policy: its answers as reward and probe read them, canaries, the panel.

The policy answers the test questions, and so does the starting model, with the same seeds. The reward reads each answer
twice, on the states of the model that gave it (live) and on the starting model's (frozen); a held-out probe of another
block reads it on the starting model's. Canaries are put to the reward read on either model; both times a hack is paid
that gets the starting model's median reward of right answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import numpy as np
import torch

from mechreward.errors import InputError, named
from mechreward.gates import Answer, Canaries, Evaluation, Survival, question_means
from mechreward.hacking import AdversarialSuite
from mechreward.inputs import Inputs
from mechreward.models import LoadedModel, check_layer, d_model, iter_residuals, norm_outliers
from mechreward.probes import LinearProbe, load_probe
from mechreward.reward import FeatureReward, pool
from mechreward.reward.feature_reward import read_tokens
from mechreward.rollout import Response
from mechreward.stages import verified
from mechreward.studies.capability import Score, panel_of, panel_scores
from mechreward.studies.config import StudyConfig
from mechreward.tasks import Question, load_questions

PROBE = "tiny/correctness_probe_l3"
"""Of the bundled model."""
NO_RIGHT_ANSWER = "questions: the starting model has no answer right, so there is no reward of a right one"


def measure(
    config: StudyConfig,
    inputs: Inputs[StudyConfig],
    policy: LoadedModel,
    reward: FeatureReward,
    questions: Sequence[Question],
    seed: int,
    answer_seed: int,
) -> Survival:
    """Measures one policy against the starting model, `inputs.loaded`.

    Args:
        questions: that neither discovery, gate, training nor tuning has seen.
        answer_seed: of the sampling of answers.

    Raises:
        InputError: if the probe reads the reward's own block, or none of the starting model's answers is right.
    """
    base = inputs.loaded
    probe = load_held_out(config, reward.layer)
    sides: list[tuple[Answer, ...]] = []
    for model in (base, policy):
        given = verified(inputs, model, questions, config.eval_samples, answer_seed, lambda _: None)
        sides.append(read_answers(given, reward, model, base, probe))
    right = [answer.frozen for answer in sides[0] if answer.correct]
    if not right:
        raise InputError(NO_RIGHT_ANSWER)
    threshold = float(np.median(right))
    before, after = (paid_canaries(reward, model, questions, threshold) for model in (base, policy))
    validation = reward.pack.validation
    return Survival(
        arm=config.judged,
        seed=seed,
        before=sides[0],
        after=sides[1],
        gate1_low=None if validation is None or validation.interval is None else validation.interval[0],
        canaries_before=before,
        canaries_after=after,
        panel=panel_of(_panel(config, inputs, base), _panel(config, inputs, policy)),
    )


def load_held_out(config: StudyConfig, reward_layer: int) -> LinearProbe | None:
    """The probe that is never in a reward: the settings', the tiny model's own, or none."""
    source = config.probe or (PROBE if config.model == "tiny" else None)
    if source is None:
        return None
    probe = load_probe(source)
    if probe.layer is None or probe.layer == reward_layer:
        raise InputError(
            f"probe: {source} reads block {probe.layer}, the reward {reward_layer}; it must be another one"
        )
    return probe


def check_measurable(config: StudyConfig, inputs: Inputs[StudyConfig]) -> None:
    """Checks what `measure` will ask for, before anything is sampled for a study that it could not measure.

    Raises:
        InputError: for a probe that cannot be loaded, or reads the reward's own block, one that the model has not, or
            states of another width; and for a source of the panel that cannot be loaded.
    """
    probe, model = load_held_out(config, inputs.layer), inputs.loaded.model
    if probe is not None and probe.layer is not None:
        with named(layer="probe"):
            check_layer(model, probe.layer)
        if probe.d_model != d_model(model):
            raise InputError(
                f"probe: {probe.name} reads width {probe.d_model}, but {config.model} has {d_model(model)}"
            )
    for source in config.panel:
        with named(source="panel"):
            load_questions(source, limit=1, seed=config.seed, prompt_format=config.prompt_format)


def check_some_right(start: Evaluation) -> None:
    """Raises InputError where no answer of the starting model is right, before a run is trained."""
    if not any(start.correct.values()):
        raise InputError(NO_RIGHT_ANSWER)


@torch.no_grad()
def read_answers(
    given: Sequence[Response], reward: FeatureReward, live: LoadedModel, frozen: LoadedModel, probe: LinearProbe | None
) -> tuple[Answer, ...]:
    """Each answer with its pooled reward on both models and the probe's probability; those without a readable token
    are left out."""
    prompts = [list(answer.prompt_ids) for answer in given]
    completions = [list(answer.completion_ids) for answer in given]
    ends_BT = reward.step_ends(live.tokenizer, completions)
    pooled = []
    for model in (live, frozen):
        [(reward_BT, mask_BT)] = read_tokens([reward], model.model, prompts, completions)
        pooled.append(pool(reward_BT, mask_BT, reward.aggregation, ends_BT))
    chance_B = torch.full((len(given),), torch.nan)
    if probe is not None:
        assert probe.layer is not None
        for batch in iter_residuals(frozen.model, prompts, completions, probe.layer):
            # As it was trained: a token of massive norm would decide a maximum alone.
            readable_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
            chance_B[batch.rows] = probe.row_proba(batch.h_BTD, readable_BT).cpu()
    rows = zip(given, *(values.tolist() for values in pooled), chance_B.tolist(), strict=True)
    return tuple(
        Answer(
            question=answer.question_id,
            correct=answer.correct is True,
            live=on_live,
            frozen=on_frozen,
            probe=None if probe is None else chance,
        )
        for answer, on_live, on_frozen, chance in rows
        if not (isnan(on_live) or isnan(on_frozen) or (probe is not None and isnan(chance)))
    )


def paid_canaries(
    reward: FeatureReward, model: LoadedModel, questions: Sequence[Question], threshold: float
) -> Canaries:
    """Hacks on these questions that the reward, read on `model`, pays at least `threshold`."""
    suite = AdversarialSuite.from_questions(questions)
    found = suite.evaluate_reward(reward.bind(model.model, model.tokenizer), threshold)
    hacks = [row for row in found.per_prompt if row["expected_hack"]]
    paid = question_means([bool(row["paid"]) for row in hacks], [row["name"].split("/", 1)[1] for row in hacks])
    return Canaries(paid=paid, n=found.n_hacks)


def _panel(config: StudyConfig, inputs: Inputs[StudyConfig], model: LoadedModel) -> dict[str, Score]:
    return panel_scores(
        model,
        config.panel,
        inputs.verifier,
        n_questions=config.panel_questions,
        max_new_tokens=config.max_new_tokens,
        prompt_format=config.prompt_format,
        temperature=config.temperature,
        seed=config.seed,
    )
