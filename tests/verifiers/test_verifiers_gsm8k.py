"""GSM8K's exact match: tables of completions with their exact verdicts, and agreement with the official rule."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.verifiers import Verdict, gsm8k_exact_match


def official(completion: str, gold: str) -> bool:
    """The rule of openai/grade-school-math as it is documented: first match, commas dropped, strings compared."""

    def extract(text: str) -> str | None:
        found = re.search(r"#### (\-?[0-9\.\,]+)", text)
        return found[1].replace(",", "") if found else None

    return extract(completion) is not None and extract(completion) == extract(f"#### {gold}")


@pytest.mark.parametrize(
    ("completion", "gold", "extracted"),
    [
        ("9 * 2 = 18\n#### 18", "18", "18"),
        ("####18", "18", "18"),
        ("#### 1,234", "1234", "1234"),
        ("#### 1234", "1,234", "1234"),
        ("#### $18", "18", "18"),
        ("#### 18.00", "18", "18.00"),
        ("#### 18.", "18", "18"),
        ("#### -7", "-7", "-7"),
        ("#### −7", "-7", "-7"),
        ("#### +7", "7", "7"),
        ("#### 0.5", ".50", "0.5"),
        ("#### 20%", "20", "20"),
        ("#### **18**", "18", "18"),
        ("#### 18 dollars", "18", "18"),
        ("#### 18\n\n#### 18", "18", "18"),
        ("#### the answer: \n#### 18", "18", "18"),
        ("#### 18", "9*2=<<9*2=18>>18\n#### 18", "18"),
    ],
)
def test_right_answers(completion: str, gold: str, extracted: str) -> None:
    assert gsm8k_exact_match("Q", completion, gold) == Verdict(True, extracted, "match", True)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("#### 19", Verdict(False, "19", "different number", False)),
        ("#### -18", Verdict(False, "-18", "different number", False)),
        ("#### 18.01", Verdict(False, "18.01", "different number", False)),
        ("#### 180", Verdict(False, "180", "different number", False)),
        ("#### 17 and not #### 18", Verdict(False, "17", "different number", True)),
        ("#### 17\nNo:\n#### 18", Verdict(False, "17", "different number", True)),
        ("The answer is 18.", Verdict(False, None, "no answer marker", True)),
        ("The answer is 18 of 20.", Verdict(False, None, "no answer marker", False)),
        ("#### eighteen", Verdict(False, None, "no number after ####", False)),
        ("####\n18", Verdict(False, None, "no number after ####", True)),
        ("#### 1,8", Verdict(False, "1,8", "not a plain number", False)),
        ("#### 18/2", Verdict(False, "18", "not a plain number", False)),
        ("#### 18 + 2 = 20", Verdict(False, "18", "not a plain number", False)),
        ("#### 18e3", Verdict(False, "18", "not a plain number", False)),
        ("#### 9:18", Verdict(False, "9", "not a plain number", True)),
        ("#### 18, 20", Verdict(False, "18,", "not a plain number", False)),
        ("", Verdict(False, None, "no answer marker", False)),
    ],
)
def test_wrong_answers(completion: str, verdict: Verdict) -> None:
    assert gsm8k_exact_match("Q", completion, "18") == verdict


@pytest.mark.parametrize(
    ("goes_on", "lenient"),
    [
        (words, True)
        for words in ("k", " million", " thousand dollars", " dozen eggs", "²", "½", " and a half", " squared")
    ]
    + [
        (words, False) for words in (" x 2", r" \times 2", " · 2", "–20", " or 20", "; 20", " 000", "\u202f000", "'000")
    ],
)
def test_a_number_that_goes_on_is_not_the_answer(goes_on: str, lenient: bool) -> None:
    assert gsm8k_exact_match("Q", f"#### 18{goes_on}", "18") == Verdict(False, "18", "not a plain number", lenient)


@pytest.mark.parametrize(
    "goes_on",
    ["**2", " ** 2", "//5", " % 5", "x2", r"\times2", "⁄2", " ± 2", " -> 20", " → 20", "π", r"\sqrt{2}", " ,20"]
    + ["{,}000", r"\,000"],
)
def test_powers_remainders_arrows_and_digits_grouped_by_latex_go_on_too(goes_on: str) -> None:
    assert gsm8k_exact_match("Q", f"#### 18{goes_on}", "18").reason == "not a plain number"


@pytest.mark.parametrize("space", ["\u00a0", "\u202f", " \t"])
def test_any_space_may_stand_after_the_marker(space: str) -> None:
    assert gsm8k_exact_match("Q", f"####{space}18", "18") == Verdict(True, "18", "match", True)


@pytest.mark.parametrize(
    "words", [" (in all)", " to the bus", " and no more", " x", " min", " boxes", " Kilos", "** (each)"]
)
def test_words_behind_the_number_are_passed_over(words: str) -> None:
    assert gsm8k_exact_match("Q", f"#### 18{words}", "18") == Verdict(True, "18", "match", True)


def test_strict_and_lenient_are_judged_apart() -> None:
    assert gsm8k_exact_match("Q", "#### 18 for 2 days", "18") == Verdict(True, "18", "match", False)


def test_another_question_is_cut_before_both_extractions() -> None:
    run_on = "It is 18.\nQ: And 3 + 4?\nA: 7\n#### 7"
    assert gsm8k_exact_match("Q", run_on, "7") == Verdict(False, None, "no answer marker", False)
    assert gsm8k_exact_match("Q", run_on, "18") == Verdict(False, None, "no answer marker", True)


def test_a_verdict_is_true_only_under_strict_extraction() -> None:
    assert gsm8k_exact_match("Q", "#### 18", "18")
    assert not gsm8k_exact_match("Q", "18", "18")


def test_two_arguments_read_the_gold_from_the_prompt() -> None:
    assert gsm8k_exact_match("What is 9 * 2?\n#### 18", "#### 18.0") == Verdict(True, "18.0", "match", True)
    assert not gsm8k_exact_match("What is 9 * 2?\n#### 18", "#### 19")


def test_the_given_answer_goes_before_the_prompt() -> None:
    assert gsm8k_exact_match("#### 5", "#### 6", "6")


def test_a_number_column_is_an_answer() -> None:
    assert gsm8k_exact_match("Q", "#### 18", 18)
    assert gsm8k_exact_match("Q", "#### 18", 18.0)


def test_chat_prompts_and_completions() -> None:
    prompt = [{"role": "system", "content": "Think."}, {"role": "user", "content": "9 * 2?\n#### 18"}]
    right = [{"role": "assistant", "content": "#### 18"}]
    tool_only = [{"role": "assistant", "content": "calculating"}, {"role": "tool", "content": "#### 18"}]
    assert gsm8k_exact_match(prompt, right)
    assert gsm8k_exact_match(prompt, tool_only) == Verdict(False, None, "no answer marker", False)


@pytest.mark.parametrize("answer", ["abc", "1/2", "1,2", "#### many"])
def test_a_gold_answer_that_is_no_number_is_refused(answer: str) -> None:
    with pytest.raises(InputError, match=r"^answer: .* is not a number; allowed are numbers like 18"):
        gsm8k_exact_match("Q", "#### 18", answer)


@pytest.mark.parametrize("answer", ["", "  ", "worked out\n####"])
def test_an_empty_gold_answer_is_refused(answer: str) -> None:
    with pytest.raises(InputError, match="^answer: .* is empty"):
        gsm8k_exact_match("Q #### 18", "#### 18", answer)


def test_no_gold_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="^answer: none was given and the prompt has none after ####"):
        gsm8k_exact_match("What is 9 * 2?", "#### 18")


def test_worked_examples_in_the_prompt_are_not_mistaken_for_gold() -> None:
    with pytest.raises(InputError, match="^answer: the prompt has 2 different ones after ####"):
        gsm8k_exact_match("1 + 1?\n#### 2\n2 + 2?\n#### 4\n9 * 2?", "#### 18")


@settings(deadline=None, derandomize=True)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_agrees_with_the_official_rule_on_plain_integers(written: int, gold: int) -> None:
    completion = f"thinking\n#### {written:,}"
    assert gsm8k_exact_match("Q", completion, str(gold)).correct == official(completion, str(gold)) == (written == gold)


_DRESSES = ("{:,}", "${:,}", "{}.00", "{:,}.", "${}.", "**{}**", "{} dollars", "{}%")


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.sampled_from(_DRESSES))
def test_dress_never_changes_the_verdict(value: int, dress: str) -> None:
    completion = "#### " + dress.format(value)
    assert gsm8k_exact_match("Q", completion, str(value)) == Verdict(
        True, f"{value}.00" if dress == "{}.00" else str(value), "match", True
    )
    assert not gsm8k_exact_match("Q", completion, str(value + 1))
