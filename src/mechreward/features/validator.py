"""Does a feature tell texts that show what it is said to mean from texts that do not? A true AUROC, at the right layer.

A text's score is the feature's highest activation over its tokens, read after the block that the SAE belongs to; pads,
special tokens and tokens of massive norm are left out. AUROC by scikit-learn: the chance that a positive text scores
above a negative one, ties half. It is as good as the examples are: texts that differ in length or subject differ in
more than the feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import iter_residuals, norm_outliers
from mechreward.sae import SAE
from mechreward.sae.activations import special_ids


@dataclass(frozen=True)
class ValidationResult:
    """What `validate_feature` found; means are of the texts' scores, in the SAE's units."""

    feature_id: int
    auc: float
    positive_mean: float
    negative_mean: float
    validated: bool
    """Whether `auc` reaches `threshold`."""
    threshold: float
    n_pos: int
    n_neg: int


def validate_feature(
    sae: SAE,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    feature_id: int,
    positive_examples: Sequence[str],
    negative_examples: Sequence[str],
    auc_threshold: float = 0.75,
    layer_idx: int | None = None,
) -> ValidationResult:
    """Reads both kinds of texts and compares their scores.

    Args:
        layer_idx: block whose output is read, 0-based; by default the SAE's own.

    Raises:
        InputError: if one kind has no text, a text has no token to read, the feature or layer is out of range, the SAE
            reads another width, or the threshold is not a share.
    """
    if not positive_examples or not negative_examples:
        lack = "negative_examples" if positive_examples else "positive_examples"
        raise InputError(f"{lack}: there are none; give at least one text of each kind")
    if not 0 <= auc_threshold <= 1:
        raise InputError(f"auc_threshold: {auc_threshold} is not allowed; it must be from 0 to 1")
    sae.decoder_rows([feature_id])  # checks the id before any forward
    texts = [*positive_examples, *negative_examples]
    scores = text_scores(sae, model, tokenizer, feature_id, texts, sae.layer if layer_idx is None else layer_idx)
    n_pos = len(positive_examples)
    auc = float(roc_auc_score([True] * n_pos + [False] * len(negative_examples), scores))
    return ValidationResult(
        feature_id=feature_id,
        auc=auc,
        positive_mean=sum(scores[:n_pos]) / n_pos,
        negative_mean=sum(scores[n_pos:]) / len(negative_examples),
        validated=auc >= auc_threshold,
        threshold=auc_threshold,
        n_pos=n_pos,
        n_neg=len(negative_examples),
    )


def text_scores(
    sae: SAE, model: nn.Module, tokenizer: PreTrainedTokenizerBase, feature_id: int, texts: Sequence[str], layer: int
) -> list[float]:
    """The feature's highest activation in each text.

    Raises:
        InputError: naming the first text without a token to read.
    """
    # Text by text, so that nothing is padded: the ids are those the tokenizer gives the text alone.
    rows = [list(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    special = set(special_ids(tokenizer))
    bare = next((at for at, ids in enumerate(rows) if special.issuperset(ids)), None)
    if bare is not None:
        raise InputError(f"examples: text {texts[bare]!r} has no token but special ones; leave it out")
    scores = [0.0] * len(rows)
    for batch in iter_residuals(model, [[] for _ in rows], rows, layer):
        read_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
        for at, row in enumerate(batch.rows):
            plain_T = torch.tensor([token not in special for token in rows[row]], device=read_BT.device)
            keep_T = read_BT[at, : len(rows[row])] & plain_T
            acts_N1 = sae.read(batch.h_BTD[at, : len(rows[row])][keep_T], [feature_id])
            scores[row] = float(acts_N1.max()) if len(acts_N1) else 0.0
    return scores
