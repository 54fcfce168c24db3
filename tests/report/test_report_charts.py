"""Axes of the charts: whole steps, and no zoom into rounding noise."""

from __future__ import annotations

import re

import altair as alt
import pandas as pd
import pytest

from mechreward.report.charts import _scale, _step_axis, train_figures


@pytest.mark.parametrize(
    ("steps", "most", "ticks"),
    [
        ([1, 2, 3], 5, [1, 2, 3]),
        ([4], 5, [4]),
        ([0, 5], 5, [0, 2, 4]),
        ([1, 12], 5, [5, 10]),
        ([0, 20], 8, [0, 5, 10, 15, 20]),
        ([0, 1000], 8, [0, 200, 400, 600, 800, 1000]),
        ([7, 168], 5, [50, 100, 150]),
    ],
)
def test_ticks_are_whole_round_steps(steps: list[int], most: int, ticks: list[int]) -> None:
    axis = _step_axis(pd.Series(steps), most).to_dict()
    assert axis == {"values": ticks, "format": "d"}


def test_noise_is_drawn_flat() -> None:
    domain = _scale(pd.Series([0.5, 0.501])).to_dict()["domain"]
    assert domain == pytest.approx([0.5005 - 0.00501, 0.5005 + 0.00501])
    assert _scale(pd.Series([-2.0, -2.0])).to_dict()["domain"] == pytest.approx([-2.02, -1.98])
    for values in ([0.5, 0.6], [0.0, 0.0], [-1.0, 1.0], [float("nan")]):
        assert _scale(pd.Series(values)).domain is alt.Undefined


def test_ticks_of_a_drawn_chart() -> None:
    train = pd.DataFrame({"arm": ["dense"] * 3, "step": [1, 2, 3], "dense/advantage_rms": [0.1, 0.2, 0.4]})
    (figure,), _ = train_figures(train, ["dense"])
    assert [text for text in re.findall(r">([^<>]+)</text>", figure.svg) if "." not in text] == ["1", "2", "3"]
