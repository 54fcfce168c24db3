"""Mathematical equality through the helper process, also outside the main thread and when it is killed."""

from __future__ import annotations

import threading

import pytest

from mechreward.errors import InputError
from mechreward.verifiers import Verdict, math, maths


@pytest.mark.parametrize(
    ("completion", "gold", "extracted"),
    [
        (r"so \boxed{0.5}", r"\frac{1}{2}", "0.5"),
        (r"\boxed{\frac12}", "0.5", r"\frac12"),
        (r"\boxed{\sqrt{2}}", "2^{1/2}", r"\sqrt{2}"),
        (r"\boxed{(1,2)}", "(1, 2)", "(1,2)"),
        (r"\boxed{\$18}", "18", r"\$18"),
        ("The answer is $x^2+1$.", "1+x^2", "$x^2+1$"),
        (r"The answer is \(\frac{1}{2}\).", "1/2", r"\(\frac{1}{2}\)"),
        ("The answer is x = 18.", "18", "x = 18"),
        ("The answer is 18 dollars per day.", "$18$", "18 dollars per day"),
        ("#### 1,234", "1234", "1,234"),
        ("The final answer is:\n\n$$18$$", "18", "$$18$$"),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", r"\{2,1\}"),
    ],
)
def test_right_answers(completion: str, gold: str, extracted: str) -> None:
    assert math("Q", completion, gold) == Verdict(True, extracted, "match", True)


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        (r"\boxed{0.333}", r"\frac{1}{3}", Verdict(False, "0.333", "different answer", False)),
        (r"\boxed{19}", "18", Verdict(False, "19", "different answer", False)),
        (r"\boxed{2x}", "2", Verdict(False, "2x", "different answer", False)),
        ("The answer is 18 thousand", "18", Verdict(False, "18 thousand", "different answer", True)),
        ("It is 18", "18", Verdict(False, None, "no answer marker", True)),
        ("It is 18 then 19", "18", Verdict(False, None, "no answer marker", False)),
        (r"\boxed{}", "18", Verdict(False, None, "nothing at the marker", False)),
        ("", "18", Verdict(False, None, "no answer marker", False)),
        ("no\nQ: 9 * 2?\nA: \\boxed{18}", "18", Verdict(False, None, "no answer marker", False)),
    ],
)
def test_wrong_answers(completion: str, gold: str, verdict: Verdict) -> None:
    assert math("Q", completion, gold) == verdict


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{18 \text{ million}}",
        r"\boxed{\$18\,\text{thousand}}",
        r"\boxed{18\text{k}}",
        r"\boxed{18 \text{ hours } 20 \text{ minutes}}",
        r"\boxed{\ge 18}",
        r"\boxed{> 18}",
        r"\boxed{18²}",
        r"\boxed{18½}",
        r"\boxed{18–20}",
        r"\boxed{18|20}",
        r"\boxed{18\_000}",
        r"\boxed{$20$ $18$}",
        "The answer is $18M.",
        "The answer is 18 squared.",
        "The answer is 18 hundreds.",
        "The answer is 18 is wrong.",
        "The answer is ≥ 18.",
        "The answer is 18~20.",
        "The answer is $20$, not $18$.",
        r"The answer is \(20\), although \(18\) seems right.",
        "The answer is 20 since 38 - 20 = 18.",
        "The answer is 20 because 20 - 2 = 18.",
        "The answer is $20$, which is more than $18$.",
    ],
)
def test_what_math_verify_passes_over_is_no_match(completion: str) -> None:
    verdict = math("Q", completion, "18")
    assert (verdict.correct, verdict.reason) == (False, "different answer")


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        (r"\boxed{18½}", "18.5"),
        (r"\boxed{3²}", "9"),
        (r"\boxed{3 \text{ million}}", r"3\text{ million}"),
        (r"\boxed{x \ge 2}", r"x \geq 2"),
        (r"\boxed{\ge 2}", r"\geq 2"),
        (r"\boxed{18 \text{ cm}^2}", "18"),
        ("The answer is 18 m².", "18"),
        ("The answer is $18$, not $20$.", "18"),
        (r"\boxed{10\,000}", "10000"),
        ("The answer is 1,234,567.", r"1\,234\,567"),
        ("The answer is 18 dollars.", "18 dollars"),
        ("#### 18 cm", r"18\text{ cm}"),
        ("The answer is 18, which is even.", "18"),
        ("The answer is 18, so he has 18 apples.", "18"),
        ("The answer is therefore 18.", "18"),
        ("The answer is approximately 3.14.", "3.14"),
    ],
)
def test_what_only_looks_like_it_is_a_match(completion: str, gold: str) -> None:
    assert math("Q", completion, gold).correct


def test_outside_the_main_thread() -> None:
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(math(r"Halve one. #### \frac{1}{2}", r"\boxed{0.5}")))
    thread.start()
    thread.join()
    assert verdicts == [Verdict(True, "0.5", "match", True)]


def test_a_comparison_without_end_is_stopped_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maths, "TIME_LIMIT", 0.3)
    endless = r"\boxed{9^{9^9}}"
    assert math("Q", endless, "18") == Verdict(False, "9^{9^9}", "took too long to compare", False)
    assert math("Q", r"\boxed{0.5}", "1/2")


def test_an_answer_too_long_is_not_compared() -> None:
    completion = r"\boxed{" + "1+" * 600 + "1}"
    assert math("Q", completion, "601") == Verdict(False, ("1+" * 600)[: maths.LONGEST], "answer too long", False)


def test_no_gold_is_refused() -> None:
    with pytest.raises(InputError, match="^answer: none was given"):
        math("Halve one.", r"\boxed{0.5}")
