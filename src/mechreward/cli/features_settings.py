"""What `mechreward features show` is told."""

from __future__ import annotations

from pathlib import Path

from mechreward.cli.shared_settings import SAESettings
from mechreward.settings import Count


class FeaturesSettings(SAESettings):
    """Shows what features do: where they fire most in a run's responses, and which tokens they speak for."""

    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    adapter: str | None = None
    """A PEFT adapter to put on the model."""
    device: str = "auto"
    """Where the model runs: `cpu`, `cuda`, `cuda:1`; `auto` is CUDA where there is one."""
    dtype: str = "float32"
    """The model's own precision: `float32`, `bfloat16` or `float16`. SAE maths is always float32."""
    responses: Path
    """A run directory, or a Parquet file of responses."""
    ids: str
    """Feature ids, with commas between them: `1,2,3`."""
    contexts: Count = 5
    """Responses shown for each feature."""
    tokens: Count = 8
    """Tokens of the logit lens."""
    neuronpedia: str | None = None
    """Where Neuronpedia keeps labels of this SAE: `model/source`, such as `gemma-2-2b/20-gemmascope-res-16k`."""
    html: Path | None = None
    """Write the contexts, with coloured tokens, to this HTML file too."""
