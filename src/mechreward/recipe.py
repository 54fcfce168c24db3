"""What a training of an SAE is told: light enough to be read before the libraries that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mechreward.settings import Count, Positive, Settings, Whole

Trainable = Literal["topk", "batchtopk", "matryoshka", "jumprelu"]


class SAERecipe(Settings):
    """Trains a sparse autoencoder of one block of a model on text, questions and the model's own answers."""

    layer: Whole
    """Decoder block whose output is read (0-based)."""
    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    adapter: str | None = None
    """A PEFT adapter to put on the model."""
    device: str = "auto"
    """Where model and SAE are: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    dtype: str = "float32"
    """The model's own precision: `float32`, `bfloat16` or `float16`. SAE maths is always float32."""

    text: tuple[str, ...] = ()
    """Documents: .txt (parted by blank lines), .jsonl, .csv or .parquet files, or Hugging Face dataset ids."""
    text_column: str = "text"
    """Column of a file or dataset that holds the documents."""
    text_options: dict[str, str] = Field(default_factory=dict)
    """Options of `datasets.load_dataset` for documents, e.g. `name: wikitext-2-raw-v1`."""
    task: tuple[str, ...] = ()
    """Questions, read with their worked solutions: .jsonl, .csv or .parquet files, `tiny:easy`, `tiny:long`,
    `reasoning-gym:NAME`, or Hugging Face dataset ids."""
    question_column: str = "question"
    """Column of a file or dataset that holds the question."""
    answer_column: str = "answer"
    """Column that holds the gold answer; a GSM8K answer (with `####`) is a worked solution too."""
    solution_column: str | None = None
    """Column that holds a worked solution, where the answer is none."""
    generator_options: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """Options of a reasoning-gym generator, e.g. `min_terms: 2`, or of `datasets.load_dataset`, e.g. `name: main`."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    prompt_format: str = "{question}"
    """Text around the question, e.g. `Question: {question} Answer:`."""
    chat: bool = False
    """Put questions, solutions and answers through the tokenizer's chat template."""
    limit: Count | None = None
    """Use only the first so many documents or questions of each source."""

    own_answers: Whole = 0
    """Responses the model samples to each question, to train on as well."""
    max_new_tokens: Count = 256
    """Longest response, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature of the responses."""
    sample_batch: Count = 256
    """Responses sampled at a time."""

    row_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest row the model reads at a time, in tokens; longer documents become several rows. By default 512, or all
    that the model reads if that is less."""
    packed: bool = False
    """Join rows with EOS between them into rows of full length: no pads, but attention crosses documents."""
    outlier_factor: Positive = 10.0
    """A token is left out if its norm exceeds this many times the median norm of its row."""

    architecture: Trainable = "topk"
    """`topk`, or `batchtopk`, `matryoshka`, `jumprelu`, which all are read as JumpReLU."""
    expansion: Count = 8
    """Features, in multiples of the model's width."""
    k: Count = 32
    """Active features a token: exactly for `topk`, on average for the others."""
    widths: tuple[Count, ...] = ()
    """Features of the inner Matryoshka levels; by default 1/32, 3/32, 7/32 and 15/32 of all."""
    l0_coefficient: Positive = 1.0
    """Weight of a JumpReLU's penalty on active features beyond or below `k`."""
    bandwidth: Positive = 2.0
    """Width around a JumpReLU's threshold within which it is learnt, in units of the scaled input."""

    tokens: Count = 2_000_000
    """Tokens to train on, in as many passes over the rows as it takes."""
    reuse: Count = 1
    """Times each token's state is trained on before the model reads on: more is quicker where reading is the slow
    part; 2,000,000 tokens at 4 are 500,000 read."""
    batch_size: Count = 4096
    """Tokens a step."""
    lr: Positive | None = None
    """Peak learning rate of Adam; by default 2e-4 * sqrt(16384 / features)."""
    held_out_tokens: Annotated[int, Field(ge=2)] = 32768
    """Measure on at most so many tokens, from one document in 20 that is never trained on."""
    eval_every: Count = 50
    """Steps between measurements."""
    save_every: Count = 200
    """Steps between checkpoints; a killed run goes on from the last one."""

    seed: int = 0
    """Every random choice follows from it."""
    out: Path = Path("runs/sae")
    """Folder of the SAE (SAE Lens format) and of the run's records."""
    resume: bool = False
    """Go on with the run in `out` where it stopped."""
