"""The baselines: by hand, and a bag of words that finds words, is cross-fitted, and ignores difficulty."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mechreward.errors import InputError
from mechreward.gates import auroc, bag_of_words, length, mean_logprob, reward_from_words, within_question_auroc
from mechreward.rollout import Response


def make_responses(n_questions: int, n_answers: int, tell: float, seed: int = 0) -> list[Response]:
    """Answers of six tokens; token 7 stands among them with probability .5 +- tell as the answer is right or wrong."""
    rng = np.random.default_rng(seed)
    rows = []
    for question in range(n_questions):
        for sample in range(n_answers):
            right = sample % 2 == 0
            ids = rng.integers(10, 30, 6).tolist()
            if rng.random() < 0.5 + (tell if right else -tell):
                ids[int(rng.integers(6))] = 7
            rows.append(Response(f"q{question}", sample, (1,), tuple(ids), "", (-1.0,) * 6, "eos", correct=right))
    return rows


def judged(responses: list[Response]) -> float:
    return within_question_auroc(
        bag_of_words(responses), [r.correct is True for r in responses], [r.question_id for r in responses]
    )


def test_by_hand() -> None:
    one = Response("q", 0, (1,), (4, 5), "", (-1.0, -2.0), "eos", correct=True)
    two = replace(one, completion_ids=(4,), logprobs=(-0.25,))
    assert mean_logprob([one, two]).tolist() == [-1.5, -0.25]
    assert length([one, two]).tolist() == [2.0, 1.0]


def test_missing_logprobs() -> None:
    with pytest.raises(InputError, match="question q has 1 for 2 tokens"):
        mean_logprob([Response("q", 0, (1,), (4, 5), "", (-1.0,), "eos", correct=True)])


def test_bag_of_words_finds_words() -> None:
    # Presence at .9 against .1 is an AUROC of .9 at most.
    assert 0.84 < judged(make_responses(60, 6, tell=0.4)) < 0.93


def test_bag_of_words_is_cross_fitted() -> None:
    # With 26 words and 60 answers a model scored on its own training answers would reach .8.
    values = [judged(make_responses(15, 4, tell=0.0, seed=seed)) for seed in range(10)]
    assert 0.4 < np.mean(values) < 0.58


def test_bag_of_words_does_not_learn_which_questions_are_easy() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for question in range(60):
        easy = question % 2
        for sample in range(6):
            right = bool(rng.random() < (0.8 if easy else 0.2))
            ids = (40 + easy, *(int(i) for i in rng.integers(10, 20, 4)))
            rows.append(Response(f"q{question}", sample, (1,), ids, "", (-1.0,) * 5, "eos", correct=right))
    scores = bag_of_words(rows)
    assert auroc(scores, [r.correct is True for r in rows]) < 0.6
    easy_rows = np.array([r.completion_ids[0] == 41 for r in rows])
    assert abs(scores[easy_rows].mean() - scores[~easy_rows].mean()) < 0.3


def test_bag_of_words_scores_questions_that_are_not_mixed() -> None:
    responses = make_responses(40, 6, tell=0.4)
    responses = [replace(r, correct=True) if r.question_id == "q0" else r for r in responses]
    scores = bag_of_words(responses)
    held = [7 in r.completion_ids for r in responses[:6]]
    assert np.isfinite(scores).all() and 0 < sum(held) < 6
    assert scores[:6][held].min() > scores[:6][~np.array(held)].max()


def test_bag_of_words_needs_two_mixed_questions() -> None:
    with pytest.raises(InputError, match="only 1 questions have both"):
        bag_of_words(make_responses(1, 4, tell=0.4))


def test_a_reward_made_of_words_is_predicted_from_them() -> None:
    responses = make_responses(60, 6, tell=0.0)
    worth = np.random.default_rng(1).normal(size=40)
    scores = np.array([worth[list(r.completion_ids)].mean() for r in responses])
    questions = np.repeat(np.arange(60), 6)
    scores += 5 * np.random.default_rng(2).normal(size=60)[questions]
    within = scores - np.bincount(questions, scores)[questions] / 6
    assert np.corrcoef(reward_from_words(responses, scores), within)[0, 1] > 0.99


def test_a_reward_that_is_not_made_of_words_is_not() -> None:
    responses = make_responses(60, 6, tell=0.4)
    noise = np.random.default_rng(1).normal(size=360)
    assert abs(np.corrcoef(reward_from_words(responses, noise), noise)[0, 1]) < 0.15
    with pytest.raises(InputError, match="they answer 1 question"):
        reward_from_words(responses[:6], noise[:6])
