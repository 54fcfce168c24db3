"""What several verbs are told: questions, a model to answer them, how its answers are judged, and an SAE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mechreward.settings import Count, Positive, Settings, Whole


class QuestionSettings(Settings):
    """Where questions come from and how they are put."""

    questions: str | None = None
    """Questions for the model to answer: a .jsonl, .csv or .parquet file, `tiny:easy`, `tiny:long`,
    `reasoning-gym:NAME`, or a Hugging Face dataset id."""
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
    seed: int = 0
    """Every random choice follows from it."""


class AskSettings(QuestionSettings):
    """A model and how it is asked."""

    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    adapter: str | None = None
    """A PEFT adapter to put on the model."""
    device: str = "auto"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    dtype: str = "float32"
    """The model's own precision: `float32`, `bfloat16` or `float16`. SAE maths is always float32."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    batch_size: Count = 256
    """Responses sampled at a time."""


class JudgeSettings(AskSettings):
    """Questions, a model to answer them, and how its answers are judged."""

    verifier: str = "gsm8k_exact_match"
    """How an answer is judged: `gsm8k_exact_match`, `math`, `choice` or `exact`."""
    strictness: Literal["strict", "lenient"] = "strict"
    """`strict` wants the answer in its marked place (`#### 18`); `lenient` takes the last number of the response."""


class SAESettings(Settings):
    """Which SAE reads."""

    sae: str | None = None
    """A folder or file on disk, or a SAE Lens release; if left out, the bundled one for the model `tiny`, and where a
    pack is given, the one that it names."""
    sae_id: str | None = None
    """Which SAE of a release."""
    layer: Whole | None = None
    """Block that the SAE reads (0-based), where its file does not say so."""
    k: Count | None = None
    """Active features a token, where a TopK SAE's file does not say so."""
