"""The page's charts, built with Altair. Each is kept twice: as a specification that the inlined Vega bundle draws
(hover, any width) and as a still SVG that stands in its place without JavaScript and until it runs.

Arms keep one colour and one point shape through the page (Okabe-Ito-like blue and orange: apart for every colour
vision, 3:1 against white and against the dark background). Axis and text colours come from the page's CSS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from mechreward.report.formats import arm_label
from mechreward.report.metrics import Metric, thinned, train_metrics

PALETTE = ("#3079cf", "#d9730d", "#8a5aa8", "#5f7f2e", "#b0483c", "#557a8c")
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
REFERENCE = "#8a8f98"
NUMBERS = {"within_auroc": float, "low": float, "high": float}
CONFIG = {
    "font": "system-ui, sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11,
        "labelColor": "#5a6470",
        "labelLimit": 260,
        "titleFontSize": 11,
        "titleFontWeight": 500,
        "titleColor": "#5a6470",
        "gridColor": "#dfe3e8",
        "domainColor": "#aab2bd",
        "tickColor": "#aab2bd",
    },
    "axisX": {"grid": False},
    "axisY": {"domain": False, "ticks": False},
}


@dataclass(frozen=True)
class Figure:
    """One chart of the page."""

    title: str
    note: str
    svg: str
    """The still version."""
    spec: dict[str, Any]
    """Vega-Lite, as wide as its place on the page."""


def colours(arms: Sequence[str]) -> dict[str, str]:
    """Each arm's colour; arms beyond the palette start it again."""
    return {arm: PALETTE[index % len(PALETTE)] for index, arm in enumerate(arms)}


def accuracy_figure(evals: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Accuracy on UNKNOWN questions over training steps, one line an arm, with its 95 % interval as a band."""
    columns = ["arm", "step", "accuracy", "low", "high", "n_questions", "n_responses"]
    frame = evals[columns + ["seed"] * ("seed" in evals)].assign(label=evals["arm"].map(arm_label))
    base = alt.Chart(frame).encode(
        x=alt.X("step:Q", title="training step", axis=_step_axis(frame["step"], 8)),
        color=_arm_colour(arms),
        detail="seed:N" if "seed" in frame else alt.Undefined,
    )
    value = alt.Y("accuracy:Q", title="accuracy", axis=alt.Axis(format=".0%", tickCount=5), scale=alt.Scale(zero=False))
    shape = alt.Shape("arm:N", legend=None, scale=alt.Scale(domain=list(arms), range=_cycle(SHAPES, arms)))
    tooltip = [
        alt.Tooltip("label:N", title="arm"), alt.Tooltip("step:Q"), alt.Tooltip("accuracy:Q", format=".1%"),
        alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%"),
        alt.Tooltip("n_questions:Q", title="questions"), alt.Tooltip("n_responses:Q", title="responses"),
    ]  # fmt: skip
    chart = alt.layer(
        base.mark_area(opacity=0.14).encode(y=alt.Y("low:Q", title="accuracy"), y2="high:Q"),
        base.mark_rule(opacity=0.55, strokeWidth=1.5).encode(y="low:Q", y2="high:Q"),
        base.mark_line(strokeWidth=2.25).encode(y=value),
        base.mark_point(filled=True, size=70, opacity=1).encode(y=value, shape=shape, tooltip=tooltip),
    )
    note = "Share of right answers to the UNKNOWN questions; whiskers and band: 95% interval."
    return still_and_live(chart, "Accuracy over training", note, 900, 280)


def gate_figure(gate: dict[str, Any]) -> Figure:
    """Within-question AUROC of every score with its interval; dashed: chance and the gate's AUROC thresholds."""
    thresholds = [value for name, value in gate.get("thresholds", {}).items() if "auroc" in name and 0.5 < value < 1]
    frame = pd.DataFrame(gate["rows"])[["name", "within_auroc", "low", "high"]].astype(NUMBERS)
    frame["judged"] = frame.index == 0
    order = alt.Y("name:N", sort=frame["name"].tolist(), title=None, axis=alt.Axis(labelPadding=8))
    colour = alt.Color("judged:N", legend=None, scale=alt.Scale(domain=[True, False], range=[PALETTE[0], "#7d8692"]))
    axis = alt.Axis(format=".2f", tickCount=8)
    domain = [min(0.4, float(frame["low"].min())), max(0.8, float(frame["high"].max()))]
    x = alt.X(
        "low:Q", title="AUROC within a question", axis=axis, scale=alt.Scale(domain=domain, zero=False, nice=True)
    )
    base = alt.Chart(frame).encode(y=order, color=colour)
    lines = alt.Chart(pd.DataFrame({"at": [0.5, *thresholds]})).mark_rule(color=REFERENCE, strokeDash=[4, 3])
    tooltip = [alt.Tooltip("name:N", title="score")] + [
        alt.Tooltip(f"{name}:Q", format=".3f") for name in ("within_auroc", "low", "high")
    ]
    chart = alt.layer(
        lines.encode(x="at:Q"),
        base.mark_rule(strokeWidth=2.5).encode(x=x, x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.X("within_auroc:Q"), tooltip=tooltip),
    )
    marks = "chance" + "".join(f" and the threshold {value:g}" for value in thresholds)
    note = f"Dot: estimate; whiskers: 95% interval over questions; dashed: {marks}."
    return still_and_live(chart, "Right against wrong answers to the same question", note, 900, 34 * len(frame))


def train_figures(train: pd.DataFrame, arms: Sequence[str]) -> tuple[list[Figure], list[Figure]]:
    """One small chart a number that the training rows hold: those with a name of ours, then all others."""
    main: list[Figure] = []
    other: list[Figure] = []
    for metric in train_metrics(train):
        figure = _train_figure(thinned(train, metric.column), metric, arms)
        (main if metric.main else other).append(figure)
    return main, other


def _train_figure(frame: pd.DataFrame, metric: Metric, arms: Sequence[str]) -> Figure:
    frame = frame.assign(label=frame["arm"].map(arm_label))
    base = alt.Chart(frame).encode(
        x=alt.X("step:Q", title=None, axis=_step_axis(frame["step"], 5)),
        color=_arm_colour(arms),
        detail="seed:N" if "seed" in frame else alt.Undefined,
    )
    y = alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=4, format="~g"), scale=_scale(frame["value"]))
    tooltip = [alt.Tooltip("label:N", title="arm"), "step:Q", alt.Tooltip("value:Q", format=".4g")]
    trend = base.mark_line(strokeWidth=2).encode(y=alt.Y("trend:Q", title=None))
    chart = alt.layer(
        base.mark_line(strokeWidth=1, opacity=0.4).encode(y=y),
        trend,
        base.mark_point(size=60, opacity=0.001, filled=True).encode(y=y, tooltip=tooltip),
    )
    return still_and_live(chart, metric.title, metric.note, 280, 110)


def _step_axis(steps: pd.Series[Any], most: int) -> alt.Axis:
    """Ticks at whole numbers of steps, round ones: Vega's least tick step does not hold where its ticks are few."""
    low, high = int(steps.min()), int(steps.max())
    sizes = (digit * 10**power for power in count() for digit in (1, 2, 5))
    size = next(size for size in sizes if high - low < most * size)
    return alt.Axis(values=list(range(-(-low // size) * size, high + 1, size)), format="d")


def _scale(values: pd.Series[Any]) -> alt.Scale:
    """Over no less than a fiftieth of the values' size, so that rounding noise is drawn as the flat line it is."""
    low, high = float(values.min()), float(values.max())
    lacking = 0.02 * max(abs(low), abs(high)) - (high - low)
    return alt.Scale(zero=False, domain=[low - lacking / 2, high + lacking / 2] if lacking > 0 else alt.Undefined)


def _arm_colour(arms: Sequence[str]) -> alt.Color:
    return alt.Color("arm:N", legend=None, scale=alt.Scale(domain=list(arms), range=list(colours(arms).values())))


def _cycle(values: Sequence[str], arms: Sequence[str]) -> list[str]:
    return [values[index % len(values)] for index in range(len(arms))]


def still_and_live(chart: alt.LayerChart | alt.FacetChart, title: str, note: str, width: int, height: int) -> Figure:
    """A chart as the page holds it: drawn once, `width` x `height` pixels, and as a specification of any width."""
    spec = chart.properties(width=width, height=height).to_dict()
    spec["config"] = CONFIG
    svg = vl_convert.vegalite_to_svg(spec)
    spec["width"], spec["autosize"] = "container", {"type": "fit-x", "contains": "padding"}
    return Figure(title, note, svg, spec)
