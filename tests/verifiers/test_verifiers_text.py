"""Chat joined, questions cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.verifiers import as_text, cut_at_next_question


@pytest.mark.parametrize(
    "opening",
    [
        "Q:",
        "Question:",
        "QUESTION:",
        "Problem:",
        "Question 2:",
        "Q2:",
        "Problem 3.",
        "Question #4)",
        "  Q:",
        "**Question:**",
        "## Problem 2:",
        "Exercise 1.",
        "User:",
        "Human:",
    ],
)
def test_a_line_that_opens_a_question_is_cut(opening: str) -> None:
    assert cut_at_next_question(f"It is 4.\n{opening} next") == "It is 4."
    assert cut_at_next_question(f"\n{opening} next") == ""


@pytest.mark.parametrize(
    "text",
    [
        "It is 4.\nA: 4",
        "Q: what is asked is 4",
        "It is 4. Q: none",
        "It is 4.\nQuietly: 4",
        "It is 4.\nThe question: 4",
        "It is 4.\nQ. E. D.",
        "It is 4.\nProblem solved.",
        "It is 4.\nquestions: 2",
        "",
    ],
)
def test_other_text_is_left_whole(text: str) -> None:
    assert cut_at_next_question(text) == text


def test_cut_is_at_the_first_question() -> None:
    assert cut_at_next_question("4\nQ: a\nA: 5\nQ: b") == "4"


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="Qq:\n 12Problem", max_size=40))
def test_cutting_twice_is_cutting_once(text: str) -> None:
    once = cut_at_next_question(text)
    assert text.startswith(once)
    assert cut_at_next_question(once) == once


def test_as_text_of_strings_and_chats() -> None:
    chat = [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "image"}]},
    ]
    assert as_text("plain") == "plain"
    assert as_text(chat) == "two\n\n4"
    assert as_text(chat, roles=("assistant",)) == "\n4"
    assert as_text([]) == ""


@pytest.mark.parametrize(
    ("value", "kind"), [(5, "int"), (None, "NoneType"), (["text"], "list"), ([{"role": "user"}], "list")]
)
def test_as_text_refuses_anything_else(value: object, kind: str) -> None:
    with pytest.raises(InputError, match=f"^text: a {kind} is neither a string nor a chat"):
        as_text(value)
