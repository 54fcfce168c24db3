"""Discovery over a model's verified responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechreward.features.contrast import ContrastTable, contrast
from mechreward.features.mixed import check_mixed
from mechreward.features.pack import Pooling
from mechreward.features.pooling import check_responses, pooled_activations
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.sae import SAE


def discover(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    *,
    pooling: Pooling = "mean",
    min_support: float = 0.05,
    top_k: int = 50,
    halves: int = 50,
    seed: int = 0,
    batch_size: int = 32,
) -> ContrastTable:
    """Contrast over a model's verified responses; only questions with right and wrong answers are read at all.

    Raises:
        InputError: if the answers are all right or all wrong, fewer than two questions have both, a completion has no
            tokens, or a residual is not finite.
    """
    check_responses(responses)
    seen: dict[str, set[bool | None]] = {}
    for response in responses:
        seen.setdefault(response.question_id, set()).add(response.correct)
    mixed = {question for question, labels in seen.items() if len(labels) == 2}
    check_mixed(len(mixed), len(seen), len(responses), {label is True for s in seen.values() for label in s})
    kept = [response for response in responses if response.question_id in mixed]
    batches = pooled_activations(loaded, sae, kept, pooling, batch_size=batch_size)
    table = contrast(batches, min_support=min_support, top_k=top_k, halves=halves, seed=seed)
    return replace(table, n_questions=len(seen))
