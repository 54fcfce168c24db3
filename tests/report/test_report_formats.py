"""How numbers are printed."""

from __future__ import annotations

import pytest

from mechreward.report import formats as f


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (f.number(0.8416), "0.842"),
        (f.number(-0.5, 1), "−0.5"),
        (f.number(None), "–"),
        (f.number(float("nan")), "–"),
        (f.signed(0.12), "+0.120"),
        (f.signed(-0.0314), "−0.031"),
        (f.general(1e-5), "1e−05"),
        (f.general(12.3456), "12.35"),
        (f.count(12800), "12,800"),
        (f.count(None), "–"),
        (f.interval(0.79, 0.886), "[0.790, 0.886]"),
        (f.interval(0.79, None), "–"),
        (f.percent(0.515), "51.5%"),
        (f.percent_interval(0.478, 0.552), "47.8 to 55.2%"),
        (f.points(-0.042), "−4.2"),
        (f.points_interval(-0.004, 0.081), "−0.4 to +8.1"),
        (f.p_value(0.0324), "p = 0.032"),
        (f.p_value(0.0009), "p < 0.001"),
        (f.p_value(None), "p –"),
        (f.duration(48.2), "48 s"),
        (f.duration(59.7), "1 min 00 s"),
        (f.duration(151.4), "2 min 31 s"),
        (f.duration(11100), "3 h 05 min"),
        (f.arm_label("dense"), "outcome + dense"),
        (f.arm_label("random"), "random"),
        (f.scalar({"a": [1, 2], "b": None}), "a: 1, 2, b: none"),
        (f.scalar([]), "none"),
    ],
)
def test_printed(printed: str, expected: str) -> None:
    assert printed == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(59, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"), (None, "–")],
)
def test_durations_change_their_unit_where_one_is_full(seconds: float | None, expected: str) -> None:
    assert f.duration(seconds) == expected


def test_a_p_of_one_in_a_thousand_is_printed() -> None:
    assert (f.p_value(0.001), f.p_value(0.00099)) == ("p = 0.001", "p < 0.001")


@pytest.mark.parametrize(
    ("low", "high", "p", "tone"),
    [
        (0.01, 0.2, 0.04, "good"),
        (-0.2, -0.01, 0.04, "bad"),
        (0.0, 0.2, 0.04, "neutral"),
        (-0.2, 0.0, 0.04, "neutral"),
        (0.01, 0.2, 0.05, "neutral"),
        (0.01, 0.2, None, "neutral"),
        (None, 0.2, 0.04, "neutral"),
    ],
)
def test_a_change_is_one_where_interval_and_test_say_so(
    low: float | None, high: float, p: float | None, tone: str
) -> None:
    assert f.paired_tone({"low": low, "high": high, "p_value": p}) == tone
