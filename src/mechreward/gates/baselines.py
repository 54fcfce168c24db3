"""Scores that need nothing from inside the model: what a reward must beat before it may claim to read more than text.

Each gives one number a response. The lexical one is a logistic regression on which tokens a response holds,
cross-fitted by question (no question's own answers train its score), on counts centred within the question, so that all
it learns is how right and wrong answers *to the same question* differ in words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from mechreward.errors import InputError
from mechreward.rollout import Response

Array = NDArray[np.float64]
MAX_TOKENS = 1000
"""Commonest tokens that the lexical baseline counts."""
FOLDS = 5


def mean_logprob(responses: Sequence[Response]) -> Array:
    """Mean log-probability of a response's tokens under the model that sampled it.

    Raises:
        InputError: if a response does not have one for each token.
    """
    for response in responses:
        if len(response.logprobs) != len(response.completion_ids):
            raise InputError(
                f"logprobs: an answer to question {response.question_id} has {len(response.logprobs)} for "
                f"{len(response.completion_ids)} tokens, they must be as many"
            )
    return np.array([np.mean(response.logprobs) for response in responses])


def length(responses: Sequence[Response]) -> Array:
    """Number of completion tokens."""
    return np.array([float(len(response.completion_ids)) for response in responses])


def bag_of_words(responses: Sequence[Response], *, seed: int = 0) -> Array:
    """Cross-fitted log-odds of being right from token counts.

    Answers to questions that are not mixed get the score of a model fitted on all mixed ones.

    Raises:
        InputError: if fewer than two questions have right and wrong answers.
    """
    questions = np.array([response.question_id for response in responses])
    right = np.array([response.correct is True for response in responses])
    counts_NV = CountVectorizer(analyzer=_tokens, max_features=MAX_TOKENS, dtype=np.float32).fit_transform(responses)
    frame = pd.DataFrame(np.log1p(counts_NV.toarray()))
    x_NV = (frame - frame.groupby(questions).transform("mean")).to_numpy()
    share = pd.Series(right.astype(float)).groupby(questions).transform("mean").to_numpy()
    mixed = np.flatnonzero((share > 0) & (share < 1))
    n_mixed = len(set(questions[mixed]))
    if n_mixed < 2:
        raise InputError(f"correct: only {n_mixed} questions have both right and wrong answers, a fit needs at least 2")
    scores = _fit(x_NV[mixed], right[mixed]).decision_function(x_NV)
    folds = GroupKFold(min(FOLDS, n_mixed), shuffle=True, random_state=seed)
    for train, test in folds.split(mixed, groups=questions[mixed]):
        model = _fit(x_NV[mixed[train]], right[mixed[train]])
        scores[mixed[test]] = model.decision_function(x_NV[mixed[test]])
    return np.asarray(scores, dtype=np.float64)


def _tokens(response: Response) -> tuple[int, ...]:
    return response.completion_ids


def _fit(x_NV: NDArray[np.float32], right: NDArray[np.bool_]) -> LogisticRegression:
    return LogisticRegression(max_iter=300).fit(x_NV, right)
