"""The logit lens of a feature: which tokens its decoder row speaks for, read straight off the unembedding.

The row goes through the model's own final norm as if it were the whole residual, (norm(row) - norm(-row)) / 2, then
through the unembedding without its bias. That keeps the norm's gain, which decides much, whatever form it has (Gemma's
is 1 + w), and drops a layer norm's bias; the scale is that of a residual that points wholly along the row. It says what
the feature writes to the output directly and nothing of what later blocks make of it: trust it in late layers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.features.nodes import check_fit
from mechreward.models import LoadedModel, find_final_norm, unwrap
from mechreward.sae import SAE


@dataclass(frozen=True)
class LensReading:
    """Tokens that a feature speaks for and against, with their logits, strongest first."""

    feature_id: int
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


def logit_lens(loaded: LoadedModel, sae: SAE, feature_ids: Sequence[int], k: int = 10) -> list[LensReading]:
    """The `k` tokens of highest and of lowest logit for each feature; of equal ones the lowest id first.

    Raises:
        InputError: if an id is out of range, the SAE does not fit the model, k is not between 1 and the vocabulary, or
            the model has no final norm under a known name or no unembedding.
    """
    check_fit(loaded, sae)
    logits_KV = lens_logits(loaded.model, sae.decoder_rows(feature_ids))
    if not 1 <= k <= logits_KV.shape[1]:
        raise InputError(f"k: {k} is not allowed; give 1 to {logits_KV.shape[1]}, the size of the vocabulary")
    readings = []
    for feature, logits_V in zip(feature_ids, logits_KV, strict=True):
        down, up = logits_V.sort(stable=True), logits_V.sort(stable=True, descending=True)
        promoted, suppressed = ([*zip(o.indices[:k].tolist(), o.values[:k].tolist(), strict=True)] for o in (up, down))
        readings.append(LensReading(feature, _spelt(loaded, promoted), _spelt(loaded, suppressed)))
    return readings


@torch.no_grad()
def lens_logits(model: nn.Module, rows_KD: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
    """Logits of decoder rows, float32, on the CPU."""
    inner, norm = unwrap(model), find_final_norm(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise InputError(f"model: {type(inner).__name__} has no unembedding; it has no logit lens")
    weight_VD = head.get_parameter("weight")
    rows_KD = rows_KD.to(weight_VD)
    along_KD = (norm(rows_KD) - norm(-rows_KD)) / 2
    return (along_KD.float() @ weight_VD.float().T).cpu()


def _spelt(loaded: LoadedModel, found: list[tuple[int, float]]) -> list[tuple[str, float]]:
    return [(str(loaded.tokenizer.decode([token])), value) for token, value in found]
