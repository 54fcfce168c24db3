"""What `mechreward serve` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mechreward.cli.shared_settings import SAESettings
from mechreward.settings import Count, Positive


class ServeSettings(SAESettings):
    """Serves a pack's rewards over HTTP, for trainers that cannot read the residual stream themselves (verl,
    OpenRLHF): token ids in, a reward for each completion and each of its tokens out. Ends with Ctrl-C."""

    model: str = "tiny"
    """The model that reads: a Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    adapter: str | None = None
    """A PEFT adapter to put on the model."""
    pack: str
    """The feature pack: a file, or a bundled pack's name."""
    ungated: bool = False
    """Serve a pack that carries no passed gate."""
    verifier: str | None = None
    """Judge answers as well: `gsm8k_exact_match`, `math`, `choice` or `exact`; features alone if left out."""
    strictness: Literal["strict", "lenient"] = "strict"
    """Which of the verifier's two verdicts counts."""
    mode: Literal["bounded", "sum"] = "bounded"
    """How outcome and features are combined; `bounded` never pays a wrong answer more than a right one."""
    weight: Positive = 1.0
    """Of the features."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback needs a secret."""
    port: int = Field(default=8765, ge=0, le=65535)
    """0 takes a free one."""
    token_file: Path | None = None
    """File of the secret that clients have to send; else the environment variable MECHREWARD_TOKEN."""
    batch_size: Count = 32
    """Rows a forward."""
    max_rows: Count = 1024
    """Most rows a request may have, and most that may wait."""
    max_mb: Count = 64
    """Largest request, in MiB."""
    device: str = "auto"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    dtype: str = "float32"
    """The model's own precision: `float32`, `bfloat16` or `float16`. SAE maths is always float32."""
