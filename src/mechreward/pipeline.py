"""The main job, front door to back: questions and a model in; a gated dense reward, a trained policy and a report out.

`improve` runs these stages in order, each leaving whole files in the run directory and skipped when they are there:

1. baseline   sample and verify responses to the UNKNOWN questions
2. known      sample and verify responses to the KNOWN questions
3. sae        load the SAE, or train one on the model's own responses to KNOWN questions
4. discover   contrast right with wrong within each question of one half of KNOWN -> pack
5. gate       Gate 1 on the other half of KNOWN, scored by the very reward object that would train
6. train      GRPO, one run an arm: same seed, same questions in the same order; and, as `method` says, repair of wrong
              chains by steering and fine-tuning on them, beside as many right answers as they were sampled
7. evaluate   UNKNOWN again, paired with the baseline question by question
8. report     one HTML page

UNKNOWN questions are only ever sampled for evaluation. A run whose gate did not pass stops after stage 5 unless it was
told to go on ungated. `train` has a pack already: it goes from stage 1 to stage 6.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mechreward.comparison import compare_arms
from mechreward.config import ImproveConfig, RunConfig, TrainRunConfig
from mechreward.errors import InputError, named
from mechreward.features import (
    ContrastTable,
    FeaturePack,
    NoFeatures,
    build_pack,
    discover,
    load_contrast,
    load_pack,
    pack_prompt,
    save_contrast,
    save_pack,
)
from mechreward.files import read_json, write_json
from mechreward.gates import check_held_out, gate1
from mechreward.inputs import FIT, Inputs, check_given_sae, given_reward, open_folder, prepare
from mechreward.repairs import check_repair, run_repairs
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, tokenise_prompts
from mechreward.rundir import stage_seed
from mechreward.sae import SAE, Watch, load_sae, own_meta, own_shape, save_sae, train_own_sae
from mechreward.stages import (
    Outcome,
    StageProgress,
    answer_unknown,
    finish,
    grpo_options,
    run_arm,
    sample_baseline,
    sampled,
    silent,
)
from mechreward.tasks import Question, save_questions, split_questions
from mechreward.views import write_views


def improve(config: ImproveConfig, progress: StageProgress = silent) -> Outcome:
    """Runs the main job, or goes on with it (`config.resume`), and returns what came of it.

    Raises:
        InputError: bad input, found before anything is written; or responses that allow no contrast (all right, all
            wrong), after which the run directory holds whole files and a report that says so.
    """
    started = time.perf_counter()
    grpo_options(config)
    inputs = prepare(config)
    check_repair(inputs)
    if len(inputs.split.known) < 2:
        raise InputError("questions: one of them is KNOWN, and discovery and Gate 1 need one each; give more")
    folder = open_folder(inputs)
    save_questions(folder / "questions.parquet", inputs.split)
    sample_baseline(inputs, folder, progress)
    responses = sample_known(inputs, folder, progress)
    try:
        sae = get_sae(inputs, folder, responses, progress)
        halves = split_questions(inputs.split.known, 0.5, stage_seed(config.seed, "gate"))
        pack, table = discover_pack(inputs, folder, sae, answers_to(responses, halves.known), progress)
        gate = judge_pack(
            inputs, folder, FeatureReward(pack, sae), table, answers_to(responses, halves.unknown), progress
        )
    except NoFeatures as error:
        return finish(
            folder, {"verdict": f"There is no pack to gate: {error}. Nothing was trained.", "arms": {}}, started
        )
    except InputError as error:
        finish(folder, {"verdict": f"Stopped before Gate 1: {error}.", "arms": {}}, started)
        raise
    if gate["verdict"] != "pass" and not config.ungated:
        verdict = f"Gate 1 did not pass ({gate['verdict']}): {gate['reason']}. Nothing was trained."
        return finish(folder, {"verdict": verdict, "arms": {}}, started, gate["verdict"])
    for arm in config.grpo_arms:
        run_arm(inputs, folder, arm, FeatureReward(load_pack(folder / "pack.json"), sae), progress)
    try:
        repairs = run_repairs(inputs, folder, sae, responses, partial(answer_unknown, inputs), progress.stage)
    except InputError as error:
        results = compare_arms(config.grpo_arms, folder)
        words = f"{results['verdict']} Repair stopped: {error}.".strip()
        outcome = finish(folder, results | {"verdict": words}, started, gate["verdict"])
        if isinstance(error, NoFeatures):
            return outcome
        raise
    write_views(inputs, folder, sae)
    results = compare_arms([*config.grpo_arms, *config.repair_arms], folder) | repairs
    return finish(folder, results, started, gate["verdict"])


def train(config: TrainRunConfig, progress: StageProgress = silent) -> Outcome:
    """Trains with a pack that is there, or goes on with it (`config.resume`): stages 1, 6, 7 and 8 of the main job.

    Raises:
        InputError: bad input, found before anything is written. Among it is a pack without a passed gate, unless
            `ungated`, and one that was found on questions which it would be tested on.
    """
    started = time.perf_counter()
    reward = given_reward(config, config.pack)
    grpo_options(config)
    pays = "dense" in config.arms and config.dense_weight > 0
    if pays and reward.gate_warning is not None and not config.ungated:
        raise InputError(f"{reward.gate_warning}; train with it all the same with --ungated")
    inputs = prepare(config, reward.sae)
    check_unseen(inputs, reward.pack)
    folder = open_folder(inputs, pack=reward.spec_hash)
    save_questions(folder / "questions.parquet", inputs.split)
    save_pack(reward.pack, folder / "pack.json")
    record_fit(inputs, folder, reward.sae, sample_baseline(inputs, folder, progress))
    for arm in config.arms:
        run_arm(inputs, folder, arm, reward, progress)
    write_views(inputs, folder, reward.sae)
    gate = "pass" if reward.gate_passed else reward.pack.status
    return finish(folder, compare_arms(config.arms, folder), started, gate)


def check_unseen(inputs: Inputs[RunConfig], pack: FeaturePack) -> None:
    """Checks that the pack was found on none of the UNKNOWN questions; warns if it does not record its own.

    Raises:
        InputError: naming how many of them it was found on.
    """
    if not pack.found_on:
        warnings.warn(f"pack: {pack.name} does not record its questions, which may be UNKNOWN ones", stacklevel=2)
    config = inputs.config
    prompts = tokenise_prompts(
        inputs.loaded, inputs.split.unknown, max_new_tokens=config.max_new_tokens, chat=config.chat
    )
    with named(questions="questions" if config.eval_questions is None else "eval_questions"):
        check_held_out(pack, prompts, "would look better on them; test on questions that it was not found on")


def sample_known(inputs: Inputs[ImproveConfig], folder: Path, progress: StageProgress) -> list[Response]:
    """Responses of the untrained model to KNOWN questions."""
    return sampled(inputs, folder, "known", inputs.split.known, inputs.config.samples, progress)


def answers_to(responses: Sequence[Response], questions: Sequence[Question]) -> list[Response]:
    ids = {question.id for question in questions}
    return [response for response in responses if response.question_id in ids]


def record_fit(inputs: Inputs[RunConfig], folder: Path, sae: SAE, responses: Sequence[Response]) -> None:
    """How a given SAE fits the responses' residuals, kept in the run directory; warns of what is likely wrong."""
    if not (folder / FIT).exists():
        write_json(folder / FIT, check_given_sae(sae, inputs.loaded, responses).to_dict())


def get_sae(inputs: Inputs[ImproveConfig], folder: Path, responses: Sequence[Response], progress: StageProgress) -> SAE:
    """The SAE given, or one trained on the KNOWN responses' residuals and kept in the run directory."""
    config = inputs.config
    if inputs.sae is not None:
        record_fit(inputs, folder, inputs.sae, responses)
        return inputs.sae
    if (folder / "sae" / "cfg.json").exists():
        return load_sae(folder / "sae", device=config.device)
    meta = own_meta(inputs.loaded, inputs.layer, release=str(folder / "sae"), model_name=config.model)
    rows = [(response.prompt_ids, response.completion_ids) for response in responses]
    seed = stage_seed(config.seed, "sae")
    with progress.stage(f"train SAE on block {inputs.layer}", config.sae_tokens) as advance:
        seen = 0

        def on_step(tokens: int, _: float) -> None:
            nonlocal seen
            advance(tokens - seen)
            seen = tokens

        trained = train_own_sae(
            inputs.loaded,
            rows,
            own_shape(inputs.loaded, expansion=config.sae_expansion, k=config.sae_k),
            meta=meta,
            n_tokens=config.sae_tokens,
            seed=seed,
            device=config.device,
            watch=Watch(on_step=on_step),
        )
    # The SAE comes last: where it is there, a resumed run takes this stage as done.
    write_json(folder / FIT, {"fvu": trained.fvu, "l0": trained.l0, "dead_share": trained.dead_share})
    save_sae(trained.sae, folder / "sae")
    return trained.sae


def discover_pack(
    inputs: Inputs[ImproveConfig], folder: Path, sae: SAE, responses: Sequence[Response], progress: StageProgress
) -> tuple[FeaturePack, ContrastTable]:
    """Within-question contrast of every feature on the discovery half of KNOWN."""
    config = inputs.config
    if (folder / "pack.json").exists():
        return load_pack(folder / "pack.json"), load_contrast(folder / "features.parquet")
    with progress.stage(f"discover: {sae.d_sae} features, {len(responses)} responses"):
        seed = stage_seed(config.seed, "discover")
        table = discover(inputs.loaded, sae, responses, pooling=config.pooling, seed=seed)
        save_contrast(table, folder / "features.parquet")
        pack = build_pack(
            table,
            sae,
            name=f"{Path(config.model).name}/{config.questions.replace(':', '-')}",
            model_name=config.model,
            n_features=config.n_features,
            signs=config.signs,
            prompt=pack_prompt(config.prompt_format, config.chat, inputs.loaded.tokenizer),
            provenance={
                "questions": config.questions,
                "n_questions": table.n_questions,
                "n_mixed": table.n_mixed,
                "seed": config.seed,
            },
        )
    save_pack(pack, folder / "pack.json")
    return pack, table


def judge_pack(
    inputs: Inputs[ImproveConfig],
    folder: Path,
    reward: FeatureReward,
    table: ContrastTable,
    responses: Sequence[Response],
    progress: StageProgress,
) -> dict[str, Any]:
    """Gate 1 on the other half of KNOWN; the verdict is written into the pack that will train."""
    path = folder / "gate1.json"
    if path.exists():
        gate: dict[str, Any] = read_json(path)
        return gate
    with progress.stage(f"gate 1: {len(responses)} held-out responses"):
        result = gate1(reward, responses, inputs.loaded, table=table, seed=stage_seed(inputs.config.seed, "gate"))
    save_pack(reward.pack.model_copy(update={"validation": result.validation()}), folder / "pack.json")
    write_json(path, result.to_dict())
    return result.to_dict()
