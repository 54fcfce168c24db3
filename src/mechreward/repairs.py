"""The repair arms of the main job: wrong chains on KNOWN questions made right by steering, and trained on.

Each arm starts from the untrained model and sees as many chains as there are verified repairs:

- `rejection_sft`: SFT on right responses as they were sampled. The baseline to beat;
- `repair_sft`: SFT on the repaired chains;
- `repair_dpo`: DPO, repaired over wrong;
- `repair_cdpo`: DPO with token weights, where the critical tokens come with scores (`critical: contrast`).

Every stage leaves whole files and is skipped when they are there. A training that was killed starts anew from the same
seed, so that it ends as one that never was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from mechreward.chains import ContrastiveConfig, Roller
from mechreward.comparison import accuracy
from mechreward.config import ImproveConfig, RepairArm
from mechreward.errors import InputError
from mechreward.files import append_row, make_folder, read_json, read_jsonl, write_json
from mechreward.inputs import Inputs, load_policy
from mechreward.models import LoadedModel
from mechreward.rollout import Response, load_responses, save_responses
from mechreward.rundir import stage_seed
from mechreward.sae import SAE
from mechreward.steering import (
    Pair,
    RepairConfig,
    Repaired,
    kept_repairs,
    load_repairs,
    rejection_pairs,
    repair_known,
    save_repairs,
    summarise,
)
from mechreward.steering.cuts import check_critical
from mechreward.steering.repair_known import count_uncut
from mechreward.training import FinetuneConfig, JsonlMetrics, finetune

METHODS: dict[RepairArm, str] = {
    "rejection_sft": "sft", "repair_sft": "sft", "repair_dpo": "dpo", "repair_cdpo": "cdpo",
}  # fmt: skip


def check_repair(inputs: Inputs[ImproveConfig]) -> None:
    """What repair needs beyond the rest of the main job, before any work is spent.

    Raises:
        InputError: for an adapter, or questions without the worked solutions that are to find the critical token.
    """
    if not inputs.config.repair_arms:
        return
    if isinstance(inputs.loaded.model, PeftModel):
        raise InputError(
            f"adapter: {inputs.config.adapter} cannot be fine-tuned by repair; merge it into the model first"
        )
    check_critical(inputs.config.critical, inputs.split.known)


def run_repairs(
    inputs: Inputs[ImproveConfig],
    folder: Path,
    sae: SAE,
    responses: Sequence[Response],
    answer: Callable[[LoadedModel], list[Response]],
    stage: Callable[[str], Any],
) -> dict[str, Any]:
    """Repairs KNOWN chains, then trains each repair arm and answers UNKNOWN with it; nothing for GRPO alone.

    Args:
        responses: verified ones to KNOWN questions.
        answer: verified responses of a policy to UNKNOWN questions.
        stage: a context manager around each stage, by its title.

    Returns:
        What results.json says of the repairs themselves.

    Raises:
        InputError: as `repair_stage` and `arm_pairs`.
    """
    config = inputs.config
    if not config.repair_arms:
        return {}
    with stage(f"repair wrong chains: {config.tries} tries a chain in each arm"):
        repairs = repair_stage(inputs, folder, sae, responses)
    for arm in config.repair_arms:
        with stage(f"train and evaluate {arm}: {len(repairs)} chains"):
            run_repair_arm(inputs, folder, arm, arm_pairs(arm, repairs, responses, config.seed), answer)
    return {"repair": read_json(folder / "repair.json")}


def repair_stage(
    inputs: Inputs[ImproveConfig], folder: Path, sae: SAE, responses: Sequence[Response]
) -> list[Repaired]:
    """Repairs KNOWN responses; writes repairs.parquet and, when that is whole, repair.json.

    Raises:
        InputError: if there is nothing to repair, nothing to steer with, no repair is right, or there are fewer right
            responses than repairs.
    """
    config = inputs.config
    if not (folder / "repair.json").exists():
        roller = Roller(
            inputs.loaded,
            inputs.split.known,
            inputs.verifier,
            config.max_new_tokens,
            temperature=config.temperature,
            batch_size=config.batch_size,
            seed=stage_seed(config.seed, "repair"),
        )
        contrastive = ContrastiveConfig(
            lr=config.contrast_learning_rate, epochs=config.contrast_epochs, seed=config.seed
        )
        chosen = RepairConfig(
            critical=config.critical, contrastive=contrastive, tries=config.tries, pooling=config.pooling
        )
        attempts = repair_known(roller, sae, responses, chosen)
        repairs = kept_repairs(attempts)
        save_repairs(folder / "repairs.parquet", repairs)
        uncut = count_uncut(roller, responses, chosen.chains, attempts)
        write_json(folder / "repair.json", summarise(attempts) | {"n_kept": len(repairs), "n_uncut": uncut})
    repairs = load_repairs(folder / "repairs.parquet")
    if not repairs:
        raise InputError("repairs: no try by steering came out right; there is nothing to train on")
    return repairs


def run_repair_arm(
    inputs: Inputs[ImproveConfig],
    folder: Path,
    arm: RepairArm,
    pairs: Sequence[Pair],
    answer: Callable[[LoadedModel], list[Response]],
) -> None:
    """Trains one arm from the starting model; leaves its metrics, the model and its answers to UNKNOWN.

    Args:
        pairs: of KNOWN questions alone; `finetune` refuses any other.
        answer: verified answers of a policy to UNKNOWN questions.
    """
    path = folder / "responses" / f"final-{arm}.parquet"
    if path.exists():
        return
    config, metrics = inputs.config, folder / "metrics.jsonl"
    about = {"arm": arm, "seed": config.seed, "kind": "eval"}
    if not any(row["arm"] == arm for row in read_jsonl(metrics)):
        baseline = load_responses(folder / "responses" / "baseline.parquet")
        append_row(metrics, about | {"step": 0} | accuracy(baseline))
    options = FinetuneConfig(
        epochs=config.epochs,
        batch_size=config.questions_per_step,
        learning_rate=config.sft_learning_rate if METHODS[arm] == "sft" else config.dpo_learning_rate,
        lora_rank=config.lora_rank,
        chat=config.chat,
        seed=stage_seed(config.seed, "finetune") % 2**31,
    )
    logged = JsonlMetrics(metrics, arm, config.seed)
    policy = finetune(load_policy(config), pairs, METHODS[arm], inputs.split, options, callbacks=[logged])
    responses = answer(policy)
    last = max(row["step"] for row in read_jsonl(metrics) if row["arm"] == arm)
    append_row(metrics, about | {"step": last} | accuracy(responses))
    model_folder = make_folder(folder / "checkpoints" / arm)
    policy.model.save_pretrained(str(model_folder))
    policy.tokenizer.save_pretrained(str(model_folder))
    save_responses(path, responses)


def arm_pairs(arm: RepairArm, repairs: Sequence[Repaired], responses: Sequence[Response], seed: int) -> list[Pair]:
    """What an arm trains on: as many chains in every arm.

    Raises:
        InputError: if there are fewer right responses than repairs.
    """
    if arm == "rejection_sft":
        return rejection_pairs(responses, len(repairs), stage_seed(seed, "rejection"))
    return [one.pair() for one in repairs]
