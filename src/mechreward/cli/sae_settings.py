"""What a verb that asks a model is told, `mechreward sae check` and `mechreward sae layers` among them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mechreward.settings import Count, Positive, Settings, Whole


class AskSettings(Settings):
    """A model and how it is asked."""

    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    adapter: str | None = None
    """A PEFT adapter to put on the model."""
    device: str = "auto"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    dtype: str = "float32"
    """The model's own precision: `float32`, `bfloat16` or `float16`. SAE maths is always float32."""

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
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    batch_size: Count = 256
    """Responses sampled at a time."""
    seed: int = 0
    """Every random choice follows from it."""


class CheckSettings(AskSettings):
    """Reads a few residuals of a model with an SAE and says which mistake is likely if it does not fit. With --json the
    result is printed as JSON and nothing else."""

    sae: str
    """A folder or file on disk, or a SAE Lens release; may stand first, without the flag."""
    sae_id: str | None = None
    """Which SAE of a release."""
    layer: Whole | None = None
    """The block it reads, where its file does not say."""
    k: Count | None = None
    """Active features a token, where a TopK SAE's file does not say."""
    text: str | None = None
    """Text to read instead of questions and answers: a .txt, .jsonl, .csv or .parquet file, or a dataset id."""
    text_column: str = "text"
    """Column of a file or dataset that holds the text."""
    limit: Count = 16
    """Use the first so many questions or texts."""
    tokens: Count = 1024
    """Read about so many tokens."""


class JudgeSettings(AskSettings):
    """Questions, a model to answer them, and how its answers are judged."""

    verifier: str = "gsm8k_exact_match"
    """How an answer is judged: `gsm8k_exact_match`, `math`, `choice` or `exact`."""
    strictness: Literal["strict", "lenient"] = "strict"
    """`strict` wants the answer in its marked place (`#### 18`); `lenient` takes the last number of the response."""


class LayersSettings(JudgeSettings):
    """Reports for each block how well a probe tells right from wrong answers to the same question."""

    responses: Path | None = None
    """Verified responses to read instead of sampling: a run's `responses/known.parquet`."""
    layers: tuple[Whole, ...] = ()
    """Blocks to read (0-based); by default all."""
    limit: Count = 100
    """Use the first so many questions."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for each question."""
    out: Path | None = None
    """Write all numbers to this JSON file."""
