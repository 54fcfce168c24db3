"""One GRPO run: questions and rewards in, a trained policy out, resumable step for step.

A run that is killed and started again with the same arguments goes on from its last whole checkpoint and ends with the
same weights as one never killed, because all that a step depends on is in the checkpoint (weights, optimiser, schedule,
random states, the dense memory) or in the arguments. The questions' order is drawn here for the whole run (one
permutation after another) and handed to TRL as a single epoch: TRL's own sampler starts its shuffle anew on resuming,
which repeats the first epoch's order.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from mechreward.errors import InputError
from mechreward.files import append_row, make_folder, read_json, sha256_bytes, write_json
from mechreward.hacking import DualVerifier
from mechreward.models import LoadedModel, eval_mode
from mechreward.reward import Reward
from mechreward.rollout import tokenise_prompts
from mechreward.rundir import n_launched
from mechreward.tasks import Question
from mechreward.training.checks import check_seed
from mechreward.training.dense import DenseConfig, split_rewards
from mechreward.training.grpo import MechRewardGRPOTrainer
from mechreward.training.guard import Event, why_stopped
from mechreward.training.last_good import load_good
from mechreward.training.logging import EveryStep, JsonlMetrics, RolloutRecorder

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
"""TRL's, which looks at the name only after the first rollouts."""
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
"""transformers' that need no arguments of their own and no evaluations: the others fail once training begins."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of a GRPO run.

    Raises:
        InputError: naming the first field that is not allowed.
    """

    steps: int = 40
    """Optimiser steps."""
    questions_per_step: int = 16
    """Questions a step, of all processes together; each process has as many of its completions."""
    generations: int = 8
    """Completions a question (the GRPO group)."""
    micro_batch: int = 32
    """Completions a forward and backward pass; lowered to what divides a step's completions."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: str = "constant"
    """Learning rate schedule, as transformers names them."""
    beta: float = 0.02
    """Weight of the KL term against the starting model, TRL's, in the loss of every arm; 0 turns it off. On by default,
    since any reward holds only near the model that it was validated on. Small: 1 nat a token costs 2 % of one
    standard deviation of the outcome. It takes a forward a step, and with full fine-tuning a copy of the model."""
    loss_type: str = "dapo"
    """TRL's loss type."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """How TRL scales outcome advantages."""
    lora_rank: int = 0
    """Rank of a new LoRA adapter on all linear layers (alpha twice the rank); 0 trains every weight."""
    chat: bool = False
    """Put prompts through the tokenizer's chat template."""
    bf16: bool = False
    """Train under bfloat16 autocast (a GPU's; leave off on a CPU)."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    save_every: int = 10
    """Steps between checkpoints."""
    eval_every: int = 10
    """Steps between calls of `evaluate`."""
    seed: int = 0
    """Decides question order, sampling and adapter initialisation."""

    def __post_init__(self) -> None:
        for name in ("steps", "questions_per_step", "micro_batch", "max_new_tokens", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.generations < 2:
            raise InputError(f"generations: {self.generations}; a group needs at least 2 completions")
        if self.lora_rank < 0 or not 0 <= self.beta < math.inf:
            raise InputError(f"lora_rank, beta: {self.lora_rank}, {self.beta} must be 0 or more, and finite")
        check_seed(self.seed)
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} must be a positive number")
        known = {"schedule": SCHEDULES, "scale_rewards": ["group", "batch", "none"]}
        for name, names in (known | {"loss_type": LOSSES}).items():
            if getattr(self, name) not in names:
                raise InputError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(names)}")


def train_arm(
    loaded: LoadedModel,
    questions: Sequence[Question],
    reward_funcs: Sequence[Reward],
    config: TrainConfig,
    out: str | Path,
    *,
    arm: str = "dense",
    dense: DenseConfig | None = None,
    metrics_path: str | Path | None = None,
    rollouts_path: str | Path | None = None,
    evaluate: Callable[[LoadedModel, int], None] | None = None,
    dual: DualVerifier | None = None,
) -> LoadedModel:
    """Trains one arm, or goes on with it from the last whole checkpoint in `out`.

    Args:
        loaded: the starting model; it is trained in place, so load it anew for every arm.
        reward_funcs: called with the columns `answer` and `question_id`; FeatureRewards are dense.
        out: folder of this arm's checkpoints.
        arm: name in metrics and rollouts.
        metrics_path: metrics.jsonl, one row a step; None writes none.
        rollouts_path: rollouts.parquet; None writes none.
        evaluate: called with the policy (in evaluation mode) and the step, every `config.eval_every` steps; on
            resuming, not for steps up to the checkpoint's.
        dual: a second opinion on every rollout, for the guards (`dense.guard`), which are on by default.

    Returns:
        The trained model in evaluation mode, with its LoRA adapter if it has one; of a run that its guards stopped, the
        last good policy. The metrics then end with a row of kind `guard` that says why.

    Raises:
        InputError: no questions, one that leaves no room for `config.max_new_tokens` in the model's context,
            checkpoints of a run with other arguments in `out`, or nothing to train.
    """
    if not questions:
        raise InputError("questions: there are none; training needs at least one")
    # Here, not when the question's turn comes: TRL reads past the context, or breaks off, in the middle of training.
    tokenise_prompts(loaded, questions, max_new_tokens=config.max_new_tokens, chat=config.chat)
    out = make_folder(out)
    _check_same_run(out, _describe(loaded, questions, reward_funcs, config, arm, dense))
    recorder = RolloutRecorder(rollouts_path, arm, config.seed) if rollouts_path is not None else None
    callbacks: list[TrainerCallback] = [recorder] if recorder is not None else []
    if metrics_path is not None:
        callbacks.append(JsonlMetrics(metrics_path, arm, config.seed))
    model = _trainable(loaded, config)
    args = make_args(config, out, next(loaded.model.parameters()).device, n_launched())
    copied = config.beta > 0 and not config.lora_rank and not isinstance(model, PeftModel)
    if copied:
        args.beta = 0.0  # TRL would load the reference by the model's name; what trains may be another, or have none.
    trainer = MechRewardGRPOTrainer(
        model=model,
        reward_funcs=list(reward_funcs),
        args=args,
        train_dataset=make_dataset(questions, config),
        processing_class=loaded.tokenizer,
        peft_config=lora_config(config.lora_rank),
        callbacks=callbacks,
        dense=dense,
        on_rollouts=recorder,
        dual=dual,
        on_guard=None if metrics_path is None else partial(_write_event, Path(metrics_path), arm, config.seed),
    )
    if copied:
        keep_reference(trainer, config.beta)
    trainer.remove_callback(PrinterCallback)  # Numbers go to metrics.jsonl, not to the terminal.
    policy = replace(loaded, model=trainer.accelerator.unwrap_model(trainer.model))
    if evaluate is not None:
        trainer.add_callback(EveryStep(config.eval_every, lambda step: _evaluate(evaluate, policy, step)))
    checkpoint = last_checkpoint(out)
    trainer.guard.stopped = None if checkpoint is None else why_stopped(checkpoint)
    if trainer.guard.stopped is None:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.guard.stopped is not None:
        load_good(policy.model, out)
    policy.model.eval()
    return policy


def _write_event(path: Path, arm: str, seed: int, event: Event) -> None:
    append_row(path, {"arm": arm, "seed": seed, "kind": "guard"} | event)


def make_dataset(questions: Sequence[Question], config: TrainConfig) -> Dataset:
    """All questions of the run in the order they are trained on: seeded permutations, one after another."""
    generator = torch.Generator().manual_seed(config.seed)
    needed = config.steps * config.questions_per_step
    order: list[int] = []
    while len(order) < needed:
        order += torch.randperm(len(questions), generator=generator).tolist()
    chosen = [questions[index] for index in order[:needed]]
    prompts = [[{"role": "user", "content": q.prompt}] if config.chat else q.prompt for q in chosen]
    return Dataset.from_dict(
        {"prompt": prompts, "answer": [q.answer for q in chosen], "question_id": [q.id for q in chosen]}
    )


def make_args(config: TrainConfig, out: Path, device: torch.device, processes: int = 1) -> GRPOConfig:
    """TRL's arguments: one generation batch an optimiser step, one line of logs a step, nothing reported elsewhere.

    Raises:
        InputError: if a step's completions cannot be shared out evenly among the processes.
    """
    rows, left = divmod(config.questions_per_step * config.generations, processes)
    if left:
        raise InputError(
            f"questions_per_step, generations: {config.questions_per_step} x {config.generations} completions cannot "
            f"be shared out evenly among {processes} processes"
        )
    micro = max(size for size in range(1, min(config.micro_batch, rows) + 1) if rows % size == 0)
    return GRPOConfig(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=config.generations,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        beta=config.beta,
        loss_type=config.loss_type,
        scale_rewards=config.scale_rewards,
        disable_dropout=True,
        shuffle_dataset=False,
        bf16=config.bf16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        dataloader_pin_memory=device.type != "cpu",
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def last_checkpoint(folder: str | Path) -> Path | None:
    """The furthest whole checkpoint: its trainer_state.json, which is written last, is JSON and of that step."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _saved_step(path) == int(match[1])
    ]
    return max(found)[1] if found else None


def _saved_step(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _trainable(loaded: LoadedModel, config: TrainConfig) -> Any:
    model = loaded.model
    if isinstance(model, PeftModel):
        if config.lora_rank:
            raise InputError(f"lora_rank: {config.lora_rank}, but the model already has an adapter; merge it or use 0")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
        return model
    return model.requires_grad_(True)


def keep_reference(trainer: MechRewardGRPOTrainer, beta: float) -> None:
    """Gives a trainer made with beta 0 a KL term of weight `beta` against a copy of its policy as it is now.

    Raises:
        InputError: if the policy is sharded (FSDP, DeepSpeed).
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(f"beta: {beta} needs a copy of the model, and it is sharded; use lora_rank, or beta 0")
    policy = trainer.accelerator.unwrap_model(trainer.model)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    args: Any = trainer.args
    trainer.beta = args.beta = beta
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)


def lora_config(rank: int) -> LoraConfig | None:
    """A LoRA adapter on all linear layers, alpha twice the rank; None for rank 0."""
    if not rank:
        return None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _evaluate(function: Callable[[LoadedModel, int], None], policy: LoadedModel, step: int) -> None:
    with eval_mode(policy.model):
        function(policy, step)


def _describe(
    loaded: LoadedModel,
    questions: Sequence[Question],
    reward_funcs: Sequence[Reward],
    config: TrainConfig,
    arm: str,
    dense: DenseConfig | None,
) -> dict[str, Any]:
    parts = split_rewards(list(reward_funcs), None)
    asked = [f"{q.id}\0{q.prompt}\0{q.answer}\0".encode() for q in questions]
    hashes = [reward.spec_hash for reward in parts.dense]
    return {
        "arm": arm,
        "model": loaded.name,
        "questions": sha256_bytes(*asked),
        "features": [list(pair) for pair in zip(hashes, parts.dense_weights, strict=True)],
        "scalar_weights": parts.scalar_weights,
        "config": asdict(config),
        "dense": asdict(dense or DenseConfig()),
    }


def _check_same_run(out: Path, description: dict[str, Any]) -> None:
    path = out / "run.json"
    if last_checkpoint(out) is None:
        write_json(path, description)
        return
    saved = read_json(path)
    changed = [key for key in description if saved.get(key) != description[key]]
    if changed:
        raise InputError(f"out: {out} holds checkpoints of a run with another {', '.join(changed)}; use a new folder")
