"""Putting verdicts on responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechreward.errors import InputError
from mechreward.rollout.response import Response
from mechreward.tasks import Question
from mechreward.verifiers import Verifier, cut_at_next_question


def verify_responses(
    responses: Sequence[Response], questions: Sequence[Question], verifier: Verifier
) -> list[Response]:
    """Copies of the responses with `correct`, `lenient`, `extracted` and `reason` from the verifier's verdict.

    The verifier is called as `(prompt, completion, answer)`. A text that runs into another question is cut before it,
    so that also a verifier of one's own never judges an answer to a question nobody asked.

    Raises:
        InputError: if a response belongs to none of the questions, or two questions share an id.
    """
    by_id = {question.id: question for question in questions}
    if len(by_id) < len(questions):
        raise InputError(f"questions: {len(questions)} questions share {len(by_id)} ids; each needs an id of its own")
    strangers = [response.question_id for response in responses if response.question_id not in by_id]
    if strangers:
        raise InputError(f"responses: question {strangers[0]} is not among the {len(by_id)} questions given")
    return [_verified(response, by_id[response.question_id], verifier) for response in responses]


def check_answers(questions: Sequence[Question], verifier: Verifier) -> None:
    """Has the verifier look at every gold answer, before anything is sampled.

    Raises:
        InputError: naming the first question whose gold answer it cannot judge by.
    """
    for question in questions:
        try:
            verifier(question.prompt, "", question.answer)
        except InputError as error:
            raise InputError(f"{error} (question {question.id}); another verifier may take it") from error


def _verified(response: Response, question: Question, verifier: Verifier) -> Response:
    verdict = verifier(question.prompt, cut_at_next_question(response.text), question.answer)
    return replace(
        response,
        correct=verdict.correct,
        lenient=verdict.lenient,
        extracted=verdict.extracted,
        reason=verdict.reason,
    )
