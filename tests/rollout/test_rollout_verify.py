"""Verdicts land on the right responses, and a further question in the text is never judged."""

from __future__ import annotations

import pytest

from mechreward.errors import InputError
from mechreward.rollout import Response, check_answers, verify_responses
from mechreward.tasks import Question
from mechreward.verifiers import Verdict, gsm8k_exact_match

QUESTIONS = [Question("a", "2 + 3?", "5"), Question("b", "4 + 4?", "8")]


def response(question_id: str, text: str) -> Response:
    return Response(question_id, 0, (0,), (1,), text, (-0.5,), "eos")


def test_each_response_is_judged_with_its_own_question() -> None:
    seen = []

    def verifier(prompt: str, completion: str, answer: str) -> Verdict:
        seen.append((prompt, completion, answer))
        return Verdict(completion == answer, completion, "said " + completion, True)

    given = [response("b", "8"), response("a", "8"), response("a", "5")]
    got = verify_responses(given, QUESTIONS, verifier)
    assert seen == [("4 + 4?", "8", "8"), ("2 + 3?", "8", "5"), ("2 + 3?", "5", "5")]
    assert [(r.correct, r.lenient, r.extracted, r.reason) for r in got] == [
        (True, True, "8", "said 8"), (False, True, "8", "said 8"), (True, True, "5", "said 5"),
    ]  # fmt: skip
    assert [r.question_id for r in got] == ["b", "a", "a"] and given[0].correct is None


def test_a_further_question_is_cut_off_before_the_verifier() -> None:
    run_on = response("a", "It is five.\n#### 5\nQ: 1 + 1?\nA: #### 2")
    stolen = response("a", "No idea.\nQ: 2 + 3?\nA: #### 5")
    first, second = verify_responses([run_on, stolen], QUESTIONS, gsm8k_exact_match)
    assert (first.correct, first.extracted) == (True, "5")
    assert (second.correct, second.lenient, second.extracted) == (False, False, None)
    assert first.text == run_on.text
    seen = []

    def own(_prompt: str, completion: str, _answer: str) -> Verdict:
        seen.append(completion)
        return Verdict(True, None, "", True)

    verify_responses([run_on], QUESTIONS, own)
    assert seen == ["It is five.\n#### 5"]


def test_an_unknown_question_and_a_shared_id_are_named() -> None:
    with pytest.raises(InputError, match="^responses: question c is not among the 2 questions given"):
        verify_responses([response("a", "5"), response("c", "5")], QUESTIONS, gsm8k_exact_match)
    with pytest.raises(InputError, match="^questions: 3 questions share 2 ids"):
        verify_responses([], [*QUESTIONS, Question("a", "?", "1")], gsm8k_exact_match)


def test_gold_answers_that_a_verifier_cannot_judge_by_are_named() -> None:
    check_answers(QUESTIONS, gsm8k_exact_match)
    with pytest.raises(InputError) as refused:
        check_answers([*QUESTIONS, Question("c", "Capital of France?", "Paris")], gsm8k_exact_match)
    assert str(refused.value) == (
        "answer: 'Paris' is not a number; allowed are numbers like 18, -3.5 and $1,234 (question c); another verifier "
        "may take it"
    )
