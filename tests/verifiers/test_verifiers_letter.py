"""Multiple choice."""

from __future__ import annotations

import pytest

from mechreward.errors import InputError
from mechreward.verifiers import Verdict, choice


@pytest.mark.parametrize(
    "completion",
    [
        "B",
        " (B). ",
        "(b)",
        "**B**",
        "B)",
        "The answer is B.",
        "The answer is (B) 12 cm",
        "Answer: (b)",
        'The answer is "B".',
        "The answer is “B”.",
        "**Answer:**\n(B)",
        r"\boxed{B}",
        r"so $\boxed{\text{B}}$",
        r"\boxed{\textbf{(B) } 12}",
        "#### B",
        "the answer is option B",
        "A is wrong.\nThe answer is B because of it",
    ],
)
def test_right_letters(completion: str) -> None:
    verdict = choice("Which?", completion, "B")
    assert (verdict.correct, verdict.extracted, verdict.reason) == (True, "B", "match")


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("The answer is C.", Verdict(False, "C", "different letter", False)),
        ("The answer is C, not B.", Verdict(False, "C", "different letter", True)),
        ("I think B", Verdict(False, None, "no answer marker", True)),
        ("It is B. A dog barks.", Verdict(False, None, "no answer marker", True)),
        ("It is B. Or A.", Verdict(False, None, "no answer marker", False)),
        ("The answer is a bird.", Verdict(False, None, "no letter at the marker", False)),
        ("The answer is Both", Verdict(False, None, "no letter at the marker", False)),
        ("b", Verdict(False, None, "no answer marker", False)),
        ("", Verdict(False, None, "no answer marker", False)),
        ("ABBA", Verdict(False, None, "no answer marker", False)),
        ("no\nQ: next?\nA: the answer is B", Verdict(False, None, "no answer marker", False)),
    ],
)
def test_wrong_letters(completion: str, verdict: Verdict) -> None:
    assert choice("Which?", completion, "B") == verdict


@pytest.mark.parametrize(
    "letters",
    ["B or C", "B, C", "B and C", "B; C", "B/C", "B & C", "B+C", "(B) or (C)", "**B** and **C**", r"\boxed{B, C}"],
)
def test_several_letters_are_no_answer(letters: str) -> None:
    assert choice("Which?", f"The answer is {letters}.", "B") == Verdict(
        False, None, "several letters at the marker", False
    )


@pytest.mark.parametrize("words", ["B, not C", "B, as in A to D", "B and a dog", "B, A dog"])
def test_a_letter_with_words_behind_it_is_the_answer(words: str) -> None:
    verdict = choice("Which?", f"The answer is {words}.", "B")
    assert (verdict.correct, verdict.extracted) == (True, "B")


@pytest.mark.parametrize("gold", ["B", "b", "(B)", "B.", " B ", "Because so\n#### B"])
def test_gold_letters(gold: str) -> None:
    assert choice("Which?", "The answer is B", gold) == Verdict(True, "B", "match", True)
    assert choice(f"Which?\n#### {gold.split()[-1]}", "The answer is B")


@pytest.mark.parametrize("gold", ["F", "AB", "1", "A dog"])
def test_gold_that_is_no_letter_is_refused(gold: str) -> None:
    with pytest.raises(InputError, match=f"^answer: '{gold}' is not a choice; allowed are the letters A to E$"):
        choice("Which?", "B", gold)
