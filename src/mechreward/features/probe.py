"""The `probe` discoverer: a sparse logistic regression of right against wrong on all features together.

Where `contrast` looks at one feature at a time, an L1 penalty lets features explain each other away, and keeps few of
several that say the same. Activations are centred within their question and divided by their scale (the standard
deviation within questions), so that

- effect: weight in log-odds a standard deviation, 0 for a feature that is not kept;
- stability: share of half-samples of questions (`halves`) whose own fit keeps the feature with the same sign.

The other columns are those of the contrast over the same answers: an L1 weight has no p of its own. The penalty is set
relative to the one at which the first feature comes in (scikit-learn's `l1_min_c`, of each fit's own answers), so that
it means the same for any number of answers and features. Features below the minimum support are not offered to the fit.

Deviation from a plain logistic regression: centring takes the question's mean off the features, not off the label; the
intercept, hardly penalised, takes up the share of right answers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.svm import l1_min_c

from mechreward.errors import InputError
from mechreward.features.contrast import ContrastTable, ranked
from mechreward.features.halves import HalfSamples
from mechreward.features.mixed import Array, Bools
from mechreward.features.rows import PooledRows

STRENGTH = 10.0
"""By how much C exceeds the least C that keeps a feature."""
FREE_INTERCEPT = 100.0
"""liblinear penalises the intercept with the weights; it counts for this much less."""
ROUNDS = 5000


def probe(
    rows: PooledRows,
    table: ContrastTable,
    *,
    min_support: float = 0.05,
    min_each: int = 0,
    strength: float = STRENGTH,
    halves: int = 20,
    seed: int = 0,
) -> ContrastTable:
    """The contrast's table with the probe's effects and stability, ranked anew.

    Args:
        rows: the answers to mixed questions that `table` rests on.
        min_support, min_each: as in `contrast`.
        strength: C over the least C that keeps a feature, over 1; the larger the more features are kept.
        halves: number of half-samples, even.

    Raises:
        InputError: if `strength` is not over 1, no feature has the support, or `halves` is not an even number.
    """
    if not strength > 1:
        raise InputError(f"strength: {strength} is not allowed, it must be over 1, where the first feature comes in")
    samples = HalfSamples(halves, seed)
    frame = table.frame.sort_values("id").reset_index(drop=True)
    offered_K = _offered(rows, frame, min_support, min_each)
    x_NK = rows.centred(offered_K) @ sparse.diags_array(1 / frame["scale"].to_numpy()[offered_K])
    weight_K = fit_sparse(x_NK, rows.right_N, strength, seed)
    names, code_N = _codes(rows.questions)
    in_SN = samples.draw(len(names))[:, code_N]
    kept_SK = np.stack([fit_sparse(x_NK[in_N], rows.right_N[in_N], strength, seed) for in_N in in_SN if in_N.any()])
    same_SK = (np.sign(kept_SK) == np.sign(weight_K)) & (weight_K != 0)
    effect_F, stability_F = np.zeros((2, len(frame)))
    effect_F[offered_K], stability_F[offered_K] = weight_K, same_SK.sum(0) / halves
    return replace(table, frame=ranked(frame.assign(effect=effect_F, stability=stability_F)), method="probe")


def fit_sparse(x_NK: sparse.csr_array, right_N: Bools, strength: float = STRENGTH, seed: int = 0) -> Array:
    """Weights [K] of the logistic regression with an L1 penalty; the columns have to sum to 0."""
    # As they do, the gradient at zero weights is the same with the best intercept as with none.
    least = l1_min_c(x_NK, right_N, loss="log", fit_intercept=False)
    model = LogisticRegression(
        C=strength * least,
        l1_ratio=1,
        solver="liblinear",
        intercept_scaling=FREE_INTERCEPT,
        max_iter=ROUNDS,
        tol=1e-5,
        random_state=seed,
    )
    return np.asarray(model.fit(x_NK, right_N).coef_[0], dtype=np.float64)


def _offered(rows: PooledRows, frame: pd.DataFrame, min_support: float, min_each: int) -> NDArray[np.intp]:
    right_F = (rows.acts_NF[rows.right_N] > 0).sum(0)
    wrong_F = (rows.acts_NF[~rows.right_N] > 0).sum(0)
    enough_F = (right_F + wrong_F >= min_support * len(rows.questions)) & (np.minimum(right_F, wrong_F) >= min_each)
    offered = np.flatnonzero(enough_F & (frame["scale"] > 0).to_numpy())
    if not len(offered):
        raise InputError(
            f"min_support: no feature that varies within questions fires in {min_support:g} of {len(rows.questions)} "
            f"answers and in {min_each} of each class; lower it"
        )
    return offered


def _codes(questions: list[str]) -> tuple[list[str], NDArray[np.intp]]:
    """Questions in order of appearance, and each answer's place among them."""
    names = list(dict.fromkeys(questions))
    place = {name: at for at, name in enumerate(names)}
    return names, np.array([place[name] for name in questions], dtype=np.intp)
