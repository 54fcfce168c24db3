"""Fine-tuning on right responses, or on right ones against wrong ones, through TRL's own trainers.

- `sft`: cross-entropy on the tokens of the right completion alone (`SFTTrainer`).
- `dpo`: Direct Preference Optimization (2305.18290), right over wrong, against the starting model (`DPOTrainer`).
- `cdpo`: DPO with token weights ("Critical Tokens Matter", 2411.19943): a token of the wrong response counts 1 - s_t.
  s_t is low for critical tokens, so that what right responses have too is hardly pushed down.

      L = -log sigmoid(beta [sum_t log(pi/ref)(right_t) - sum_t (1 - s_t) log(pi/ref)(wrong_t)])

Deviations: token ids go in as they were sampled and are never tokenised anew, so TRL's own preparation of DPO data is
skipped; with full fine-tuning the reference is a copy of the starting model, with LoRA the model without its adapter.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from mechreward.errors import InputError
from mechreward.models import Limits, LoadedModel
from mechreward.steering.pairs import Pair, check_known
from mechreward.tasks import QuestionSplit
from mechreward.training.checks import check_seed
from mechreward.training.run import lora_config

Method = Literal["sft", "dpo", "cdpo"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options of one fine-tuning run.

    Raises:
        InputError: naming the first field that is not allowed.
    """

    epochs: int = 1
    batch_size: int = 8
    """Pairs an optimiser step."""
    learning_rate: float = 1e-5
    """Constant, of AdamW."""
    beta: float = 0.1
    """How strongly DPO keeps to the starting model."""
    lora_rank: int = 0
    """Rank of a new LoRA adapter on all linear layers; 0 trains every weight."""
    chat: bool = False
    """Whether the prompts went through the tokenizer's chat template."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; it must be at least 1")
        for name in ("learning_rate", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} is not allowed; it must be above 0, and finite")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank: {self.lora_rank} must not be negative")
        check_seed(self.seed)


def finetune(
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    method: str,
    split: QuestionSplit,
    config: FinetuneConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> LoadedModel:
    """Trains the model on pairs of KNOWN questions.

    Args:
        loaded: the starting model, without an adapter; trained in place, so load it anew for every run.
        method: `sft`, `dpo` or `cdpo`.
        pairs: what to train on; `dpo` needs wrong responses, `cdpo` their scores too.
        split: KNOWN and UNKNOWN; a pair of a question that is not KNOWN is refused.
        callbacks: told of every step, such as `JsonlMetrics`.

    Returns:
        The trained model in evaluation mode, with its LoRA adapter if it has one.

    Raises:
        InputError: for no pairs, pairs that lack what the method needs, that the model cannot read, or that are not of
            KNOWN questions.
    """
    config = config or FinetuneConfig()
    _check(loaded, pairs, method)
    check_known(pairs, split, loaded, chat=config.chat)
    set_seed(config.seed)  # An adapter is drawn before the trainer seeds anything.
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(loaded, pairs, method, config, folder)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        policy = replace(loaded, model=trainer.accelerator.unwrap_model(trainer.model))
    policy.model.eval()
    return policy


def make_trainer(
    loaded: LoadedModel, pairs: Sequence[Pair], method: str, config: FinetuneConfig, folder: str
) -> SFTTrainer | DPOTrainer:
    """TRL's trainer for the method, ready to run; nothing is checked here."""
    model = loaded.model.requires_grad_(True)
    named: dict[str, Any] = {
        "model": model,
        "train_dataset": _dataset(pairs, method),
        "processing_class": loaded.tokenizer,
        "peft_config": lora_config(config.lora_rank),
    }
    if method == "sft":
        trainer: SFTTrainer | DPOTrainer = SFTTrainer(args=SFTConfig(**_options(loaded, config, folder)), **named)
    else:
        if not config.lora_rank:
            named["ref_model"] = copy.deepcopy(model).requires_grad_(False)
        args = DPOConfig(**_options(loaded, config, folder), beta=config.beta)
        collator = WeightedCollator(pad_token_id=loaded.tokenizer.pad_token_id)
        kind = {"dpo": IdsDPOTrainer, "cdpo": CriticalDPOTrainer}[method]
        trainer = kind(args=args, data_collator=collator, **named)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


class IdsDPOTrainer(DPOTrainer):
    """TRL's DPO on token ids as they were sampled."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


class CriticalDPOTrainer(IdsDPOTrainer):
    """DPO with a weight a token; see the module's docstring."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        ratio_BT = self._logprobs(model, inputs) - self._reference(inputs)
        right_N, wrong_N = (ratio_BT * inputs["token_weights"][:, 1:]).sum(1).chunk(2)
        loss = -F.logsigmoid(self.beta * (right_N - wrong_N)).mean()
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _reference(self, inputs: dict[str, Any]) -> Tensor:
        if self.ref_model is not None:
            return self._logprobs(self.ref_model, inputs)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._logprobs(self.model, inputs)

    def _logprobs(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        read = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        found: Tensor = model(**read, use_cache=False, fused_lm_head=True).log_probs
        return found[:, -(labels.shape[1] - 1) :]


@dataclass
class WeightedCollator(DataCollatorForPreference):
    """TRL's collator, which puts the right responses above the wrong ones, and `token_weights` of the same shape."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super().torch_call(examples)
        if "wrong_weights" in examples[0]:
            prompts = [[0.0] * len(example["prompt_ids"]) for example in examples]
            right = [[1.0] * len(example["chosen_ids"]) for example in examples]
            wrong = [example["wrong_weights"] for example in examples]
            rows = [prompt + weights for side in (right, wrong) for prompt, weights in zip(prompts, side, strict=True)]
            output["token_weights"] = pad([torch.tensor(row) for row in rows], padding_value=0, padding_side="right")
        return output


def _dataset(pairs: Sequence[Pair], method: str) -> Dataset:
    if method == "sft":
        rows = [
            {
                "input_ids": [*pair.prompt_ids, *pair.right_ids],
                "labels": [-100] * len(pair.prompt_ids) + list(pair.right_ids),
            }
            for pair in pairs
        ]
        return Dataset.from_list(rows)
    columns: dict[str, Any] = {
        "prompt_ids": [list(pair.prompt_ids) for pair in pairs],
        "chosen_ids": [list(pair.right_ids) for pair in pairs],
        "rejected_ids": [list(pair.wrong_ids) for pair in pairs],
    }
    if method == "cdpo":
        columns["wrong_weights"] = [[1 - score for score in pair.wrong_scores] for pair in pairs]
    return Dataset.from_dict(columns)


def _options(loaded: LoadedModel, config: FinetuneConfig, folder: str) -> dict[str, Any]:
    on_cpu = next(loaded.model.parameters()).device.type == "cpu"
    return {
        "output_dir": folder,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "max_length": None,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "seed": config.seed,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _check(loaded: LoadedModel, pairs: Sequence[Pair], method: str) -> None:
    if method not in get_args(Method):
        raise InputError(f"method: {method!r} is not known; use one of {', '.join(get_args(Method))}")
    if isinstance(loaded.model, PeftModel):
        raise InputError(f"model: {loaded.name} carries an adapter; merge it into the model first")
    if not pairs:
        raise InputError("pairs: there are none; training needs at least one")
    limits = Limits.of(loaded.model)
    for pair in pairs:
        if not pair.prompt_ids or not pair.right_ids:
            raise InputError(f"pairs: that of {pair.question_id} has no prompt or no right response; both are needed")
        if method != "sft" and not pair.wrong_ids:
            raise InputError(
                f"pairs: that of {pair.question_id} has no wrong response; {method} needs one, sft does not"
            )
        if method == "cdpo" and len(pair.wrong_scores) != len(pair.wrong_ids):
            counts = f"{len(pair.wrong_scores)} scores for {len(pair.wrong_ids)} wrong tokens"
            raise InputError(f"pairs: that of {pair.question_id} has {counts}; cdpo needs one each")
        if not all(0 <= score <= 1 for score in pair.wrong_scores):
            raise InputError(f"pairs: that of {pair.question_id} has a score outside 0 to 1; s_t is a probability")
        _check_readable(limits, pair, [pair.right_ids] if method == "sft" else [pair.right_ids, pair.wrong_ids])


def _check_readable(limits: Limits, pair: Pair, sides: Sequence[Sequence[int]]) -> None:
    for side in sides:
        ids = [*pair.prompt_ids, *side]
        if long := limits.too_long(ids):
            raise InputError(f"pairs: a response of {pair.question_id} {long}")
        if stray := limits.stray(ids):
            raise InputError(f"pairs: that of {pair.question_id} {stray}")
