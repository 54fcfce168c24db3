"""Scores that need nothing from inside the model: what a reward must beat before it may claim to read more than text.

Each gives one number a response. Two are log-probabilities (mean, least), one is length, one says whether the response
has the form of an answer. Two are fitted, on which tokens a response holds, centred within the question (so that
all there is to learn is how answers *to the same question* differ) and cross-fitted by question (no question's answers
train their own score). `bag_of_words` predicts which answers are right. `reward_from_words` predicts the reward itself:
its target has no label noise, so that a reward that merely fires on words is recovered from far fewer answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict

from mechreward.errors import InputError
from mechreward.features.crossfit import FOLDS, Places, centred, cross_fitted
from mechreward.rollout import Response

Array = NDArray[np.float64]
MAX_TOKENS = 1000
"""Commonest tokens that the fitted baselines count."""
NEAR = 1e-9
"""Less than any share of right answers but 0."""
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


def mean_logprob(responses: Sequence[Response]) -> Array:
    """Mean log-probability of a response's tokens under the model that sampled it.

    Raises:
        InputError: if a response does not have one for each token.
    """
    check_logprobs(responses)
    return np.array([np.mean(response.logprobs) for response in responses])


def min_logprob(responses: Sequence[Response]) -> Array:
    """Log-probability of a response's least likely token: where it was least sure.

    Raises:
        InputError: as `mean_logprob`.
    """
    check_logprobs(responses)
    return np.array([min(response.logprobs) for response in responses])


def format_flag(responses: Sequence[Response]) -> Array:
    """0, 1 or 2: a point if the verifier found an answer in the response, and one if it ended by itself."""
    return np.array([float(r.extracted is not None) + float(r.finish == "eos") for r in responses])


def check_logprobs(responses: Sequence[Response]) -> None:
    """Raises InputError unless every response has a log-probability for each token."""
    for response in responses:
        if len(response.logprobs) != len(response.completion_ids):
            raise InputError(
                f"logprobs: an answer to question {response.question_id} has {len(response.logprobs)} for "
                f"{len(response.completion_ids)} tokens, they must be as many"
            )


def length(responses: Sequence[Response]) -> Array:
    """Number of completion tokens."""
    return np.array([float(len(response.completion_ids)) for response in responses])


def bag_of_words(responses: Sequence[Response], *, seed: int = 0) -> Array:
    """Cross-fitted log-odds of being right from token counts.

    Answers to questions that are not mixed get the score of a model fitted on all mixed ones.

    Raises:
        InputError: if fewer than two questions have right and wrong answers.
    """
    right_N = np.array([response.correct is True for response in responses])
    questions = _questions(responses)
    x_NV = centred(np.log1p(_counts(responses)), questions)
    share_N = right_N - centred(right_N[:, None], questions)[:, 0]
    mixed = np.flatnonzero((share_N > NEAR) & (share_N < 1 - NEAR))
    n_mixed = len(set(questions[mixed]))
    if n_mixed < 2:
        raise InputError(f"correct: only {n_mixed} questions have both right and wrong answers, a fit needs at least 2")
    scores_N = _fit(x_NV[mixed], right_N[mixed])(x_NV)

    def held_out(train: Places, test: Places) -> Array:
        return _fit(x_NV[mixed[train]], right_N[mixed[train]])(x_NV[mixed[test]])

    scores_N[mixed] = cross_fitted(held_out, questions[mixed].tolist(), seed=seed)
    return np.asarray(scores_N, dtype=np.float64)


def reward_from_words(responses: Sequence[Response], scores_N: Array, *, seed: int = 0) -> Array:
    """What token counts (their logarithms, and their shares of the length) explain of a reward: cross-fitted ridge.

    The penalty is that of least error on the held-out answers, which favours the baseline a little.

    Raises:
        InputError: if there are fewer than two questions.
    """
    questions = _questions(responses)
    n_questions = len(set(questions))
    if n_questions < 2:
        raise InputError(f"responses: they answer {n_questions} question, a fit needs at least 2")
    counts_NV = _counts(responses)
    shares_NV = counts_NV / length(responses)[:, None]
    x_NV = centred(np.hstack([np.log1p(counts_NV), shares_NV]), questions)
    y_N = centred(scores_N[:, None], questions)[:, 0]
    # One target a penalty, so that a fold's Gram matrix is made once.
    model = Ridge(PENALTIES, solver="cholesky")
    y_NA = np.tile(y_N[:, None], len(PENALTIES))
    folds = GroupKFold(min(FOLDS, n_questions), shuffle=True, random_state=seed)
    predicted_NA = cross_val_predict(model, x_NV, y_NA, groups=questions, cv=folds)
    errors_A = ((predicted_NA - y_NA) ** 2).sum(0)
    return np.asarray(predicted_NA[:, errors_A.argmin()], dtype=np.float64)


def _questions(responses: Sequence[Response]) -> NDArray[Any]:
    return np.array([response.question_id for response in responses])


def _counts(responses: Sequence[Response]) -> Array:
    """[N, V]: how often each of the commonest tokens stands in each response."""
    counter = CountVectorizer(analyzer=_tokens, max_features=MAX_TOKENS)
    return np.asarray(counter.fit_transform(responses).toarray(), dtype=np.float64)


def _tokens(response: Response) -> tuple[int, ...]:
    return response.completion_ids


def _fit(x_NV: Array, right_N: NDArray[np.bool_]) -> Callable[[Array], Array]:
    fitted: Callable[[Array], Array] = LogisticRegression(max_iter=300).fit(x_NV, right_N).decision_function
    return fitted
