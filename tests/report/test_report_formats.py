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
