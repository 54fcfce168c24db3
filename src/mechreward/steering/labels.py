"""Finding features: by their labels, by their decoder rows, by firing together.

Search is TF-IDF with cosine similarity over words and their pieces (character 3- to 5-grams), from scikit-learn: no
embedding model, no network. Labels come from the user (Neuronpedia, Delphi), or from `token_labels`, which names
a feature by the tokens on which it fires most: crude, and no explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_union

from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_residuals, norm_outliers
from mechreward.rollout import Response
from mechreward.sae import SAE
from mechreward.steering.features import Feature, FeatureGroup, check_k


@dataclass(frozen=True)
class Labels:
    """A text by feature id."""

    texts: dict[int, str]

    def search(self, query: str, k: int = 10, among: Sequence[int] | None = None) -> FeatureGroup:
        """The `k` features whose labels are nearest to the query, nearest first; ones with nothing in common left out.

        Args:
            among: search these only; None searches all labels.

        Raises:
            InputError: if there are no labels to search, the query is empty, or k is below 1.
        """
        check_k(k)
        ids = [feature for feature in (self.texts if among is None else among) if self.texts.get(feature, "").strip()]
        if not ids:
            raise InputError("labels: there are none to search; give labels to the Variant, or make some: token_labels")
        if not query.strip():
            raise InputError("query: is empty; give a word or more")
        words = TfidfVectorizer(token_pattern=r"\S+")
        pieces = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
        index = make_union(words, pieces)
        table = index.fit_transform([self.texts[feature] for feature in ids])
        score = np.asarray((table @ index.transform([query]).T).todense()).ravel()
        order = np.argsort(-score, kind="stable")[:k]
        return FeatureGroup(tuple(Feature(ids[i], self.texts[ids[i]]) for i in order if score[i] > 0))


def neighbours(sae: SAE, features: Sequence[int], k: int, acts_TF: sparse.csr_array | None = None) -> list[int]:
    """The `k` features most like the mean of some, none of them among these, nearest first.

    Args:
        acts_TF: compare when features fire, by the cosine of these activations over tokens; None compares decoder rows.

    Raises:
        InputError: if the features fire on none of the tokens, or k is below 1.
    """
    check_k(k)
    if acts_TF is None:
        rows_FD = torch.nn.functional.normalize(sae.W_dec_FD, dim=-1)
        score_F = (rows_FD @ rows_FD[list(features)].mean(0)).cpu().numpy().astype(np.float64)
    else:
        norm_F = sparse.linalg.norm(acts_TF, axis=0)
        unit_TF = acts_TF.tocsc() @ sparse.diags_array(1 / np.where(norm_F > 0, norm_F, 1.0))
        mean_T = np.asarray(unit_TF[:, list(features)].mean(axis=1)).ravel()
        if not mean_T.any():
            raise InputError(f"features: {list(features)} fire on none of these tokens; inspect a text where they do")
        score_F = np.asarray(unit_TF.T @ mean_T).ravel()
    score_F[list(features)] = -np.inf
    order = np.argsort(-score_F, kind="stable")[: min(k, len(score_F) - len(set(features)))]
    return [int(feature) for feature in order]


def token_labels(
    loaded: LoadedModel, sae: SAE, responses: Sequence[Response], tokens: int = 3, batch_size: int = 32
) -> dict[int, str]:
    """A label for each feature that fires on the responses: the token texts that hold most of its activation.

    Raises:
        InputError: as `models.iter_residuals`.
    """
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    parts = []
    for batch in iter_residuals(loaded.model, prompts, completions, sae.meta.layer, batch_size):
        keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT).cpu()
        ids = np.concatenate(
            [np.array(completions[row])[keep_BT[i, : len(completions[row])]] for i, row in enumerate(batch.rows)]
        )
        acts = sparse.coo_array(sae.encode(batch.h_BTD[keep_BT.to(batch.h_BTD.device)]).cpu().numpy())
        parts.append(pd.DataFrame({"feature": acts.col, "token": ids[acts.row], "sum": acts.data}))
    total = pd.concat(parts).groupby(["feature", "token"])[["sum"]].sum().reset_index()
    best = total.sort_values(["feature", "sum"], ascending=[True, False]).groupby("feature").head(tokens)
    text = {int(token): str(loaded.tokenizer.decode([token])).strip() for token in best["token"].unique()}
    found: dict[int, list[str]] = {}
    for feature, token in zip(best["feature"].tolist(), best["token"].tolist(), strict=True):
        found.setdefault(int(feature), []).append(text[int(token)])
    return {feature: " ".join(texts) for feature, texts in found.items()}
