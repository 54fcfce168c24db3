"""Which features fire on a text: tokens x features, sparse.

Read before any edit. A block's own output does not depend on edits made to it, so inspecting a text needs no steering:
on the same tokens the features are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from mechreward.errors import InputError
from mechreward.models import LoadedModel, norm_outliers, read_residuals
from mechreward.sae import SAE
from mechreward.steering.features import Feature, FeatureGroup, check_k, feature_ids
from mechreward.steering.hook import closed_ids

By = Literal["frequency", "mean", "max", "sum"]
TOKENS = 1024
"""Tokens encoded at once."""


class Fired(NamedTuple):
    """A feature and a number about it: an activation in the SAE's own units, or a share of tokens."""

    feature: Feature
    value: float


@dataclass(frozen=True, eq=False)
class Inspection:
    """Activations of all features on one row of tokens."""

    tokens: list[str]
    acts_TF: sparse.csr_array
    """In the SAE's own units."""
    counted_T: NDArray[np.bool_]
    """False for BOS, pads and tokens of massive norm (`models.norm_outliers`), which `top` leaves out."""
    labels: dict[int, str]

    def top(self, k: int = 10, by: str = "frequency", threshold: float = 0.0) -> list[Fired]:
        """The `k` features of largest number over the tokens, largest first; only activations above `threshold` count.

        Args:
            by: "frequency", the share of tokens on which a feature fires (ties by its sum); "mean", "max" or "sum".

        Raises:
            InputError: if there is no such number, k is below 1, or no token counts.
        """
        if by not in get_args(By):
            raise InputError(f"by: {by!r} is not known; use one of {', '.join(get_args(By))}")
        check_k(k)
        acts = self.counted().tocsc()
        acts = acts.multiply(acts > threshold).tocsc()
        total_F = np.asarray(acts.sum(0)).ravel()
        if by == "frequency":
            value_F = np.asarray((acts > 0).sum(0)).ravel() / acts.shape[0]
        elif by == "max":
            value_F = acts.max(axis=0).toarray().ravel()
        else:
            value_F = total_F / (acts.shape[0] if by == "mean" else 1)
        order = np.lexsort((np.arange(len(value_F)), -total_F, -value_F))[:k]
        return [Fired(self._feature(f), float(value_F[f])) for f in order.tolist() if value_F[f] > 0]

    def at(self, token: int, k: int = 10) -> list[Fired]:
        """The `k` strongest features on one token, counted from 0.

        Raises:
            InputError: if the text has no such token, or k is below 1.
        """
        if not 0 <= token < len(self.tokens):
            raise InputError(f"token: {token} is out of range; the text has tokens 0 to {len(self.tokens) - 1}")
        check_k(k)
        row_F = self.acts_TF[[token]].toarray().ravel()
        order = np.lexsort((np.arange(len(row_F)), -row_F))[:k]
        return [Fired(self._feature(f), float(row_F[f])) for f in order.tolist() if row_F[f] > 0]

    def matrix(self, features: Sequence[int] | FeatureGroup | None = None) -> NDArray[np.float32]:
        """Activations [T, K] of some features, or [T, F] of all.

        Raises:
            InputError: if one is no feature of the SAE, or none is named.
        """
        if features is None:
            return self.acts_TF.toarray()
        return self.acts_TF[:, feature_ids(features, self.acts_TF.shape[1])].toarray()

    def counted(self) -> sparse.csr_array:
        """Activations of all features on the tokens that count.

        Raises:
            InputError: if there is none.
        """
        if not self.counted_T.any():
            raise InputError(f"text: {''.join(self.tokens)!r} has no token but BOS, pads and ones of massive norm")
        return self.acts_TF[self.counted_T]

    def _feature(self, feature: int) -> Feature:
        return Feature(feature, self.labels.get(feature, ""))

    def _repr_html_(self) -> str:
        """Every token, shaded by its strongest feature, with its three strongest as a tooltip."""
        peak_T = self.acts_TF.max(axis=1).toarray().ravel() * self.counted_T
        highest = peak_T.max(initial=0.0) or 1.0
        spans = [
            f'<span style="background:rgba(230,120,40,{peak / highest:.2f})" title="{escape(self._title(t))}">'
            f"{escape(token)}</span>"
            for t, (token, peak) in enumerate(zip(self.tokens, peak_T, strict=True))
        ]
        return f'<div style="white-space:pre-wrap">{"".join(spans)}</div>'

    def _title(self, token: int) -> str:
        return ", ".join(f"{f.id} {f.label} {value:.2f}".replace("  ", " ") for f, value in self.at(token, 3))


def inspect_ids(loaded: LoadedModel, sae: SAE, ids: Sequence[int], labels: dict[int, str]) -> Inspection:
    """Reads one row of token ids.

    Raises:
        InputError: if there are no ids; as `models.read_residuals`.
    """
    if not ids:
        raise InputError("text: it has no tokens; give at least one")
    h_BTD, _ = read_residuals(loaded.model, [[]], [list(ids)], sae.meta.layer)
    pieces = [sparse.csr_array(sae.encode(piece_ND).cpu().numpy()) for piece_ND in h_BTD[0].split(TOKENS)]
    tokens = [str(loaded.tokenizer.decode([token])) for token in ids]
    closed = closed_ids(loaded.tokenizer)
    open_BT = torch.tensor([[token not in closed for token in ids]], device=h_BTD.device)
    counted_T = norm_outliers(h_BTD, open_BT)[0].cpu().numpy()
    return Inspection(tokens, sparse.vstack(pieces, format="csr"), counted_T, labels)
