"""A probe of a model: reads verified answers at one block, and trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.models import LoadedModel, norm_outliers, read_residuals
from mechreward.probes.probe import Pooling
from mechreward.probes.train import ProbeTrainingResult, train_linear_probe
from mechreward.rollout import Response, prompt_hashes


@torch.no_grad()
def read_states(
    loaded: LoadedModel, responses: Sequence[Response], layer: int, batch_size: int = 32
) -> tuple[Float[Tensor, "n t d"], Bool[Tensor, "n t"]]:
    """States after block `layer` on each answer's tokens, and the tokens that count: those of massive norm do not.

    Raises:
        InputError: as `models.read_residuals`.
    """
    prompts = [list(response.prompt_ids) for response in responses]
    completions = [list(response.completion_ids) for response in responses]
    h_NTD, mask_NT = read_residuals(loaded.model, prompts, completions, layer, batch_size)
    return h_NTD.cpu(), norm_outliers(h_NTD, mask_NT).cpu()


def train_probe_on(
    loaded: LoadedModel,
    responses: Sequence[Response],
    layer: int,
    name: str = "probe",
    *,
    pooling: Pooling = "max",
    questions: str = "",
    questions_seed: int | None = None,
    **options: Any,
) -> ProbeTrainingResult:
    """Trains a probe for "the answer is right" on verified answers, with held-out numbers grouped by question.

    Args:
        layer: block to read; another one than the reward's.
        questions, questions_seed: where the questions come from, kept in the probe with their hashes; `DualVerifier`
            compares them with the pack's.
        options: of `train_linear_probe`.

    Raises:
        InputError: an answer without a verdict, and as `read_states` and `train_linear_probe`.
    """
    unverified = next((r.question_id for r in responses if r.correct is None), None)
    if unverified is not None:
        raise InputError(f"correct: it is None in an answer to question {unverified}, verify it first")
    h_NTD, mask_NT = read_states(loaded, responses, layer)
    labels = [response.correct is True for response in responses]
    groups = [response.question_id for response in responses]
    metadata = {
        "model": loaded.name,
        "questions": questions,
        "questions_seed": questions_seed,
        "prompts": list(prompt_hashes(response.prompt_ids for response in responses)),
    }
    return train_linear_probe(
        h_NTD, labels, name, mask=mask_NT, groups=groups, layer=layer, pooling=pooling, metadata=metadata, **options
    )
