"""Verdicts from given numbers, each rule on both sides of its bar."""

from __future__ import annotations

import pytest

from mechreward.gates import Interval, Judgement, ScoreRow, Thresholds, judge

ANY = Interval(0.6, 0.5, 0.7, 0.05)


def row(value: float, low: float, high: float, error: float = 0.02, lead: Interval | None = None) -> ScoreRow:
    return ScoreRow("length", ANY, Interval(value, low, high, error), lead)


LEAD = Interval(0.1, 0.05, 0.15, 0.02)


def verdict(judged: ScoreRow, lead: Interval = LEAD, p_value: float = 0.001, n_mixed: int = 50) -> Judgement:
    return judge(judged, [row(0.5, 0.4, 0.6, lead=lead)], p_value, 60, n_mixed, Thresholds())


GOOD = row(0.62, 0.56, 0.68, 0.03)


def test_pass() -> None:
    found = verdict(GOOD)
    words = "AUROC within a question 0.62 [0.56, 0.68] on 50 mixed questions, above 0.55, better than length"
    assert found == Judgement("pass", words, None)


@pytest.mark.parametrize(
    "judged, lead, p_value, expected",
    [
        (row(0.62, 0.551, 0.68), Interval(0.1, 0.021, 0.2, 0.05), 0.0099, "pass"),
        (row(0.62, 0.550, 0.68), Interval(0.1, 0.021, 0.2, 0.05), 0.001, "inconclusive"),
        (GOOD, Interval(0.1, 0.02, 0.2, 0.05), 0.001, "inconclusive"),
        (GOOD, Interval(0.1, 0.021, 0.2, 0.05), 0.01, "inconclusive"),
        (row(0.52, 0.49, 0.549), Interval(0.1, 0.021, 0.2, 0.05), 0.001, "fail"),
        (row(0.52, 0.49, 0.551), Interval(0.1, 0.021, 0.2, 0.05), 0.04, "inconclusive"),
        (GOOD, Interval(-0.1, -0.2, 0.02, 0.05), 0.001, "fail"),
        (GOOD, Interval(-0.1, -0.2, 0.021, 0.05), 0.001, "inconclusive"),
        # Not told from chance: a fail only where .60 would have been seen (standard error at most .1 / 2.927).
        (row(0.52, 0.46, 0.58, 0.034), Interval(0.1, 0.021, 0.2, 0.05), 0.3, "fail"),
        (row(0.52, 0.45, 0.59, 0.035), Interval(0.1, 0.021, 0.2, 0.05), 0.3, "inconclusive"),
    ],
)
def test_each_bar(judged: ScoreRow, lead: Interval, p_value: float, expected: str) -> None:
    assert verdict(judged, lead, p_value).verdict == expected


def test_questions_needed() -> None:
    # Gap .06 to the bar at a standard error of .04 needs (2.8 * .04 / .06)^2 = 3.48 times 60 questions.
    found = verdict(row(0.61, 0.53, 0.69, 0.04))
    assert found.questions_needed == 210
    assert found.reason.endswith("the interval spans 0.55; about 210 such questions would decide")
    # The slowest of the open points decides, the margin of .02 off the lead: (2.8 * .05 / .02)^2 = 49.
    slow = verdict(row(0.61, 0.53, 0.69, 0.04), Interval(0.04, -0.06, 0.14, 0.05))
    assert slow.questions_needed == 2940
    on_the_bar = verdict(row(0.55, 0.47, 0.63, 0.04))
    assert on_the_bar.questions_needed is None
    assert "no practicable number of questions would decide" in on_the_bar.reason


def test_too_few_mixed_questions_overrule_everything() -> None:
    words = "only 19 of 60 questions have both right and wrong answers, 20 are needed"
    assert verdict(GOOD, n_mixed=19) == Judgement("inconclusive", words, None)
    assert verdict(GOOD, n_mixed=20).verdict == "pass"
    assert verdict(GOOD, n_mixed=1).reason.startswith("only 1 of 60 questions has both")


def test_every_reason_against_is_given() -> None:
    found = verdict(row(0.4, 0.3, 0.5), Interval(-0.1, -0.2, -0.05, 0.05), 1.0)
    assert found.verdict == "fail"
    assert "lies below 0.55" in found.reason and "length is as good (0.50 [0.40, 0.60]" in found.reason
