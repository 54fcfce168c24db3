"""Scores of answers from fits that have not seen their question, by dense readings of the residual stream.

States are centred within their question, so that how hard a question is cannot help. Two readings, for comparison with
what an SAE's features give:

- `direction_scores`: the difference of means between right and wrong answers (fixed-effects slope of each coordinate,
  as `contrast` has it for features), a raw direction with nothing fitted beyond it;
- `dense_probe_scores`: logistic regression with an L2 penalty on standardised coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechreward.errors import InputError

Array = NDArray[np.float64]
Places = NDArray[np.intp]
FOLDS = 5
PENALTY = 0.05
"""scikit-learn's C. Strong, because there are often fewer answers than state dimensions."""


def cross_fitted(score: Callable[[Places, Places], Array], questions: Sequence[str], *, seed: int = 0) -> Array:
    """Each fold of questions scored by `score(training places, places to score)`; at most `FOLDS` folds.

    Raises:
        InputError: if there are fewer than two questions.
    """
    names = np.asarray(questions)
    n_questions = len(set(questions))
    if n_questions < 2:
        raise InputError(f"responses: they answer {n_questions} question, a fit needs at least 2")
    scores_N = np.zeros(len(names))
    for train, test in GroupKFold(min(FOLDS, n_questions), shuffle=True, random_state=seed).split(names, groups=names):
        scores_N[test] = score(train, test)
    return scores_N


def direction_scores(
    states_ND: NDArray[Any], right_N: NDArray[np.bool_], questions: Sequence[str], *, seed: int = 0
) -> Array:
    """Projections on the difference of means of the other questions, in the residual's units squared."""
    x_ND = centred(states_ND, questions)
    y_N = centred(right_N[:, None], questions)[:, 0]
    return cross_fitted(lambda train, test: x_ND[test] @ (y_N[train] @ x_ND[train]), questions, seed=seed)


def dense_probe_scores(
    states_ND: NDArray[Any], right_N: NDArray[np.bool_], questions: Sequence[str], *, seed: int = 0
) -> Array:
    """Log-odds of being right from a probe fitted on the other questions."""
    x_ND = centred(states_ND, questions)
    return cross_fitted(lambda train, test: probe_scores(x_ND[train], right_N[train], x_ND[test]), questions, seed=seed)


def probe_scores(x_ND: Array, right_N: NDArray[np.bool_], other_MD: Array) -> Array:
    """Log-odds [M] of other answers from a probe fitted on these; both centred within their questions."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=500))
    return np.asarray(probe.fit(x_ND, right_N).decision_function(other_MD))


def centred(values_NV: NDArray[Any], questions: Sequence[str] | NDArray[Any]) -> Array:
    """Each column less its mean over the answers to the same question."""
    x_NV = np.asarray(values_NV, dtype=np.float64)
    names, code_N = np.unique(np.asarray(questions), return_inverse=True)
    sums_QV = np.zeros((len(names), *x_NV.shape[1:]))
    np.add.at(sums_QV, code_N, x_NV)
    return np.asarray(x_NV - (sums_QV / np.bincount(code_N)[:, None])[code_N])
