"""Where answers stand: boxes, phrases, hashes, in that order."""

from __future__ import annotations

import time

import pytest

from mechreward.verifiers.marked import Marked, find_marked, last_boxed


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        (r"\boxed{1} then \boxed{2}", Marked("2", "boxed")),
        (r"\boxed{\frac{1}{2}} is it", Marked(r"\frac{1}{2}", "boxed")),
        (r"\fbox{ 3 }", Marked("3", "boxed")),
        (r"\boxed{4} and \boxed{5", Marked("4", "boxed")),
        (r"\boxed{\left\{ x \right.} or \boxed{2}", Marked("2", "boxed")),
        (r"\boxed{\left\{ x \right.}", Marked(r"\left\{ x \right.", "boxed")),
        (r"\boxed{\{1, 2\}}", Marked(r"\{1, 2\}", "boxed")),
        (r"The answer is 7, boxed: \boxed{8} #### 9", Marked("8", "boxed")),
        ("The answer is 7.", Marked("7", "phrase")),
        ("The answer is 7.5. Thanks.", Marked("7.5", "phrase")),
        ("the final answer is: 7\nGoodbye", Marked("7", "phrase")),
        ("**Answer:** 7", Marked("7", "phrase")),
        ("Answer: **7**", Marked("7", "phrase")),
        ("answer = 7", Marked("7", "phrase")),
        ("The answer is 6. No, the answer is 7!", Marked("7", "phrase")),
        ("The answer is 6, but the answer is 7.", Marked("7", "phrase")),
        ("The answer is 6.\nNo: the answer is 7", Marked("7", "phrase")),
        ("The answer is 7\n#### 9", Marked("7", "phrase")),
        ("#### 8\n#### 9", Marked("9", "####")),
        ("####", Marked("", "####")),
        ("**Answer:**\n\n**18**\nGoodbye", Marked("18", "phrase")),
        ("The answer is:\r\n(B)", Marked("(B)", "phrase")),
        ("The answer is:\n\n$$18$$", Marked("$$18$$", "phrase")),
        ("The answer is:\n$$\nx + 1\n$$\nGoodbye", Marked("x + 1", "phrase")),
        ("The answer is \\[\nx + 1\n\\]", Marked("x + 1", "phrase")),
        ("So the answer is\n#### 18", Marked("18", "phrase")),
        ("The answer is\n", Marked("", "phrase")),
    ],
)
def test_find_marked(text: str, marked: Marked) -> None:
    assert find_marked(text) == marked


@pytest.mark.parametrize("text", ["", "18", "we answer 18", "the answers are 18", r"\boxed{1"])
def test_text_without_a_marker(text: str) -> None:
    assert find_marked(text) is None


def test_last_boxed_of_empty_box() -> None:
    assert last_boxed(r"\boxed{}") == ""


def test_the_last_box_is_the_one_that_opens_last() -> None:
    assert last_boxed(r"\boxed{1 \boxed{2} 3} } \boxed{4") == "2"


def test_boxes_and_phrases_without_end_are_read_in_one_pass() -> None:
    start = time.process_time()
    assert find_marked(r"\boxed{" * 20_000) is None
    assert find_marked("answer is " * 20_000) == Marked("", "phrase")
    assert time.process_time() - start < 2.0
