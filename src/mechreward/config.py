"""What a run is told that trains a policy: flat, strict records, the same in YAML, on the command line and in Python.

`RunConfig` holds what all such runs share; `ImproveConfig` is the main job's, `TrainRunConfig` that of a run which is
given a pack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from mechreward.settings import Count, NotNegative, Positive, Settings, Share, check_signs, make_settings

Arm = Literal["outcome", "dense"]
RepairArm = Literal["rejection_sft", "repair_sft", "repair_dpo", "repair_cdpo"]


class RunConfig(Settings):
    """Questions, a model and GRPO on the answers to them."""

    questions: str
    """A .jsonl, .csv or .parquet file, `tiny:easy`, `tiny:long`, `reasoning-gym:NAME`, or a Hugging Face dataset id."""
    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    adapter: str | None = None
    """A PEFT adapter to put on the model."""
    device: str = "auto"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    dtype: str = "float32"
    """The model's own precision: `float32`, `bfloat16` or `float16`. SAE maths is always float32."""

    question_column: str = "question"
    """Column of a file or dataset that holds the question."""
    answer_column: str = "answer"
    """Column that holds the gold answer; of a GSM8K answer, what follows `####` is taken."""
    id_column: str | None = None
    """Column that holds a unique id; rows are numbered if there is none."""
    generator_options: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """Options of a reasoning-gym generator, e.g. `min_terms: 2`, or of `datasets.load_dataset`, e.g. `name: main`."""
    split: str = "test"
    """Split of a Hugging Face dataset."""
    prompt_format: str = "{question}"
    """Text around the question, e.g. `Question: {question} Answer:`."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    verifier: str = "gsm8k_exact_match"
    """How an answer is judged: `gsm8k_exact_match`, `math`, `choice` or `exact`."""
    strictness: Literal["strict", "lenient"] = "strict"
    """`strict` wants the answer in its marked place (`#### 18`); `lenient` takes the last number of the response."""
    limit: Count | None = None
    """Use only the first so many questions."""
    known: Share = 0.6
    """Share of the questions that are KNOWN (discovery, gate, training); the others are UNKNOWN and only tested on."""
    eval_questions: str | None = None
    """Another source of the same form, whose questions are UNKNOWN; all of `questions` are KNOWN then."""
    eval_split: str | None = None
    """Its split, if it is a Hugging Face dataset; `split` if left out."""
    eval_limit: Count | None = None
    """Use only the first so many of its questions."""
    eval_generator_options: dict[str, int | float | bool | str] | None = None
    """Its options. If left out, those of `questions` where both are one source, else none."""

    eval_samples: Count = 4
    """Responses sampled for each UNKNOWN question at every evaluation."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature, in discovery, training and evaluation alike."""
    batch_size: Count = 256
    """Responses sampled at a time."""

    sae: str | None = None
    """An SAE: a folder or file on disk, or a SAE Lens release; if left out, the bundled one for the model `tiny`, for
    others the one that the pack names."""
    sae_id: str | None = None
    """Which SAE of a release."""
    sae_file_k: Count | None = None
    """Active features a token of the SAE given, where its file does not say (Qwen-Scope)."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Decoder block that the SAE reads (0-based), where its file does not say."""
    ungated: bool = False
    """Train even with a pack that carries no passed gate. The report says so."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ("dense",)
    """What GRPO trains: `outcome` (answers alone), `dense` (answers and features)."""
    steps: Count = 40
    """Optimiser steps an arm."""
    questions_per_step: Count = 16
    """Questions a step; times `generations` responses."""
    generations: Annotated[int, Field(ge=2)] = 8
    """Responses a question in a training step (the GRPO group)."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of a LoRA adapter on all linear layers; 0 trains every weight."""
    beta: NotNegative = 0.02
    """Weight of the KL term against the starting model, in every arm; 0 turns it off."""
    dense_weight: NotNegative = 0.3
    """RMS of the dense advantage as a share of the outcome advantage's."""
    credit: Literal["per_token", "return_to_go", "potential", "step", "trajectory", "stage3"] = "per_token"
    """How token rewards become token advantages."""
    step_end: Annotated[str, Field(min_length=1)] = "\n"
    """For credit `step`: a token whose text contains this ends a step."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount of `return_to_go` and `potential`."""
    eval_every: Count = 10
    """Steps between evaluations on UNKNOWN."""
    save_every: Count = 10
    """Steps between checkpoints; a killed run goes on from the last one."""

    seed: int = 0
    """Every random choice follows from it."""
    out: Path = Path("runs/improve")
    """The run directory."""
    resume: bool = False
    """Go on with the run in `out` where it stopped."""

    @model_validator(mode="after")
    def _sides_fit(self) -> RunConfig:
        if self.eval_questions is None:
            for name in ("eval_split", "eval_limit", "eval_generator_options"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: {getattr(self, name)!r} is of eval_questions, which were not given")
        elif self.known != RunConfig.model_fields["known"].default:
            raise ValueError(f"known: {self.known} is not allowed with eval_questions; all of questions are KNOWN then")
        if self.sae_id is not None and self.sae is None:
            raise ValueError(f"sae_id: {self.sae_id!r} is of sae, which was not given")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms: {', '.join(self.arms)} has one twice; name each once")
        return self

    @property
    def grpo_arms(self) -> tuple[Arm, ...]:
        """What GRPO trains."""
        return self.arms

    @property
    def repair_arms(self) -> tuple[RepairArm, ...]:
        """What is fine-tuned on repaired chains."""
        return ()


class TrainRunConfig(RunConfig):
    """Trains a policy by GRPO on right answers and the features of a gated pack, and tests it on other questions."""

    pack: str
    """The feature pack: a file, or a bundled pack's name."""
    known: Share = 0.6
    """Share of the questions that are KNOWN, and trained on; the others are UNKNOWN and only tested on."""
    out: Path = Path("runs/train")
    """The run directory."""


class ImproveConfig(RunConfig):
    """Questions and a model in; a gated dense reward, a trained policy and a report out."""

    samples: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for each KNOWN question."""
    sae: str | None = None
    """An SAE: a folder on disk or a SAE Lens release. None trains one on the model's own responses."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Decoder block to read (0-based). Needed to train an SAE, or where the file of one does not say."""
    sae_expansion: Count = 8
    """Width of a trained SAE, in multiples of the model's."""
    sae_k: Count = 32
    """Active features a token of a trained TopK SAE."""
    sae_tokens: Annotated[int, Field(ge=512)] = 400_000
    """Tokens a trained SAE sees; it is trained on 512 at a time."""

    pooling: Annotated[str, Field(pattern=r"^(mean|max|last|last_k|last_0*[1-9]\d*|weighted_mean|step_end(:.+)?)$")] = (
        "mean"
    )
    """How a response's token rewards become one score, in discovery and in the gate: `mean`, `max`, `last`, `last_16`,
    `weighted_mean` (later tokens count more) or `step_end` (at the tokens that end a line; `step_end:.` a sentence)."""
    n_features: Count = 20
    """Most features a pack may hold."""
    signs: Literal["any", "balanced"] = "any"
    """`balanced` takes half of the features of each sign: where most answers are wrong, the largest effects are all
    penalties, and a pack of penalties alone pays an empty answer most."""
    ungated: bool = False
    """Train even if Gate 1 did not pass. The report says so."""

    method: Literal["grpo", "repair", "both"] = "grpo"
    """`grpo` trains `arms`; `repair` fine-tunes on wrong chains that steering made right, beside as many sampled right
    ones; `both` does both, side by side."""
    critical: Literal["rollouts", "contrast", "solution"] = "rollouts"
    """For repair: how the token before which a wrong chain is cut is found. `contrast` (cDPO) adds the arm
    `repair_cdpo`, DPO with its token scores; `solution` needs worked solutions."""
    contrast_learning_rate: Positive = 3e-4
    """For `critical: contrast`: learning rate of cDPO's two adapters; the bundled model needs 5e-3."""
    contrast_epochs: Count = 1
    """For `critical: contrast`: their passes over the responses."""
    tries: Count = 4
    """For repair: tries a chain."""
    epochs: Count = 2
    """For repair: passes over the chains."""
    sft_learning_rate: Positive = 1e-4
    """For repair: constant learning rate of SFT."""
    dpo_learning_rate: Positive = 3e-5
    """For repair: constant learning rate of DPO and cDPO."""

    @model_validator(mode="after")
    def _signs_fit(self) -> ImproveConfig:
        check_signs(self.signs, self.n_features)
        return self

    @property
    def grpo_arms(self) -> tuple[Arm, ...]:
        """What GRPO trains by this method."""
        return () if self.method == "repair" else self.arms

    @property
    def repair_arms(self) -> tuple[RepairArm, ...]:
        """What is fine-tuned by this method; cDPO needs the token scores that only `contrast` gives."""
        if self.method == "grpo":
            return ()
        every: tuple[RepairArm, ...] = get_args(RepairArm)
        return every if self.critical == "contrast" else every[:-1]


def make_config(**values: Any) -> ImproveConfig:
    """Builds a configuration of the main job.

    Raises:
        InputError: naming the first bad field, its value and what is allowed.
    """
    return make_settings(ImproveConfig, values)


def make_train_config(**values: Any) -> TrainRunConfig:
    """Builds a configuration of a run with a pack that is there.

    Raises:
        InputError: as `make_config`.
    """
    return make_settings(TrainRunConfig, values)
