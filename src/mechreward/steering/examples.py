"""From examples to features and vectors: contrast of two sets of texts, sparse fits of pairs, CAA vectors.

- `contrast`: each text's mean activations (log(1 + x)), Welch's t test a feature, Benjamini and Hochberg over those
  that fire at all. The sets may differ in size and have nothing to do with each other. For right against wrong answers
  to the *same* questions use `features.discover`, which takes differences between questions out.
- `sparse_fit`: L1 logistic regression, without intercept, on activations of the wanted minus the unwanted text of each
  pair; the penalty is the largest of a grid that leaves no more than `k` features.
- `steering_vector`: CAA (Rimsky et al. 2312.06681), mean of h+ - h- at the last token over pairs. Deviation: an example
  given in several paraphrases is averaged over these first, so that it counts once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mechreward.errors import InputError
from mechreward.gates import welch
from mechreward.models import LoadedModel, read_residuals
from mechreward.steering.features import FeatureGroup, check_k
from mechreward.steering.variant import Text, Variant

PENALTIES = np.logspace(-3, 2, 16)
"""Inverse strengths of the L1 penalty that are tried, strongest first."""
Example = str | Sequence[str]
"""A text, or paraphrases of it."""


@dataclass(frozen=True)
class Contrast:
    """Features that differ between two sets of texts, those of smallest q first."""

    first: FeatureGroup
    """Stronger in the first set."""
    second: FeatureGroup
    frame: pd.DataFrame
    """Columns id, difference, effect (Cohen's d), p_value, q_value; features that never fire are left out."""


def contrast(variant: Variant, first: Sequence[Text], second: Sequence[Text], k: int = 5) -> Contrast:
    """The `k` features of largest |t| on either side.

    Raises:
        InputError: if a set has fewer than two texts, or k is below 1.
    """
    check_k(k)
    for name, texts in (("first", first), ("second", second)):
        if len(texts) < 2:
            raise InputError(f"{name}: {len(texts)} texts are given; a spread needs at least 2")
    sides = [np.log1p(np.stack([mean_activations(variant, text) for text in texts])) for texts in (first, second)]
    live = np.flatnonzero(sides[0].any(0) | sides[1].any(0))
    table = welch(sides[0][:, live], sides[1][:, live])
    frame = pd.DataFrame({"id": live, **table}).sort_values(["q_value", "p_value", "id"]).reset_index(drop=True)
    above, below = (frame[sign * frame["difference"] > 0]["id"].head(k).tolist() for sign in (1, -1))
    return Contrast(variant.group(above), variant.group(below), frame)


def mean_activations(variant: Variant, text: Text) -> NDArray[np.float64]:
    """[F]: mean over the tokens of a text that edits would touch.

    Raises:
        InputError: if there is none.
    """
    return np.asarray(variant.inspect(text).counted().mean(axis=0), dtype=np.float64).ravel()


def sparse_fit(variant: Variant, pairs: Sequence[tuple[Text, Text]], k: int = 5) -> dict[int, float]:
    """At most `k` features that tell the wanted text of each pair from the unwanted one, with weights whose largest
    size is 1; only features that have a unit take part.

    Raises:
        InputError: for fewer than two pairs, a variant without scales, or if nothing tells the texts apart.
    """
    if len(pairs) < 2:
        raise InputError(f"examples: {len(pairs)} pairs are given; a fit needs at least 2")
    if variant.scales is None:
        raise InputError("scales: strengths are in units of features; calibrate the variant first")
    unit_F = variant.scales.p99_F
    usable = np.flatnonzero(unit_F > 0)
    apart_PL = np.stack([mean_activations(variant, a) - mean_activations(variant, b) for a, b in pairs])[:, usable]
    apart_PL /= unit_F[usable]
    x, y = np.concatenate([apart_PL, -apart_PL]), np.repeat([1, 0], len(pairs))
    weight_L = np.zeros(len(usable))
    for penalty in PENALTIES:
        fit = LogisticRegression(l1_ratio=1.0, C=penalty, solver="liblinear", fit_intercept=False, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found_L = fit.fit(x, y).coef_[0]
        if np.count_nonzero(found_L) > k:
            break
        weight_L = found_L
    if not weight_L.any():
        raise InputError(f"examples: no set of at most {k} features tells the wanted texts from the unwanted ones")
    weight_L = weight_L / np.abs(weight_L).max()
    order = np.argsort(-np.abs(weight_L), kind="stable")
    return {int(usable[i]): float(weight_L[i]) for i in order if weight_L[i]}


def steering_vector(loaded: LoadedModel, layer: int, pairs: Sequence[tuple[Example, Example]]) -> Tensor:
    """[D]: mean over pairs of the state after a wanted text minus that after an unwanted one, after block `layer`.

    Args:
        pairs: (wanted, unwanted); a side may be several paraphrases, which are averaged first.

    Raises:
        InputError: if there is no pair, or a side has no text.
    """
    if not pairs:
        raise InputError("pairs: none is given; give at least one")
    return torch.stack([_last(loaded, layer, a) - _last(loaded, layer, b) for a, b in pairs]).mean(0)


def _last(loaded: LoadedModel, layer: int, example: Example) -> Tensor:
    texts = [example] if isinstance(example, str) else list(example)
    if not texts:
        raise InputError("pairs: a side has no text; give one or more")
    rows = [list(loaded.tokenizer(text)["input_ids"]) for text in texts]
    h_BTD, mask_BT = read_residuals(loaded.model, [[]] * len(rows), rows, layer)
    return h_BTD[torch.arange(len(rows)), mask_BT.sum(1) - 1].mean(0)
