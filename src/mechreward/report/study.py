"""The page of a study: Gate 2's verdict, every arm over its seeds, accuracy by step, and Gate 3 where it was judged.

Verdict and differences are worked out from `results.json` by Gate 2 itself, with its own bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import altair as alt
import pandas as pd

from mechreward.errors import InputError
from mechreward.files import read_json
from mechreward.gates import (
    ArmRun,
    Comparison,
    Gate2Result,
    StudyResults,
    gate2,
    median_steps,
    steps_to,
    student_interval,
)
from mechreward.gates.gate2 import BASE
from mechreward.report import formats as f
from mechreward.report.charts import PALETTE, REFERENCE, Figure, still_and_live
from mechreward.report.data import read_object, read_yaml
from mechreward.report.tables import Column, Row, Table
from mechreward.report.verdict import Headline, sentence
from mechreward.settings import make_settings

TONES = {"pass": "good", "futile": "bad", "fail": "bad", "inconclusive": "neutral"}


@dataclass(frozen=True)
class Study:
    """A study's folder, read once."""

    folder: Path
    results: StudyResults
    gate: Gate2Result
    config: dict[str, Any] | None
    manifest: dict[str, Any] | None
    survival: dict[str, Any] | None
    """gate3.json."""
    tuning: dict[str, Any] | None
    """tuning.json."""

    @property
    def arms(self) -> list[str]:
        """In the order of the results, outcome-only first."""
        names = dict.fromkeys(run.arm for run in self.results.runs)
        return sorted(names, key=lambda arm: arm != BASE)

    def runs(self, arm: str) -> list[ArmRun]:
        """The arm's runs."""
        return [run for run in self.results.runs if run.arm == arm]


def read_study(folder: Path) -> Study | None:
    """Reads a study and judges it by Gate 2; None for a folder without a study's results.

    Raises:
        InputError: if results.json does not hold a study's results that fit together, or is not there yet.
    """
    path = folder / "results.json"
    config = read_yaml(folder / "config.yaml")
    if config is not None and "judged" in config and not path.is_file():
        n = len(list((folder / "runs").glob("*.json")))
        raise InputError(
            f"run_dir: {folder} holds a study that has not ended ({n} runs so far); go on with it by mechreward gate "
            f"--config {folder / 'config.yaml'} --out {folder} --resume"
        )
    record = read_json(path) if path.is_file() else None
    if not isinstance(record, dict) or "judged" not in record:
        return None
    results = make_settings(StudyResults, record)
    return Study(
        folder,
        results,
        gate2(results),
        config,
        read_object(folder / "manifest.json"),
        read_object(folder / "gate3.json"),
        read_object(folder / "tuning.json"),
    )


def study_headline(study: Study) -> Headline:
    """The verdict."""
    found = study.gate
    words = {
        "pass": f"Gate 2: {found.judged} is better than outcome only, and than random features.",
        "futile": f"Gate 2: {found.judged} gains too little to pay for.",
        "inconclusive": f"Gate 2: whether {found.judged} helps is undecided.",
    }
    return Headline(words[found.verdict], sentence(found.reason), TONES[found.verdict])


def study_facts(study: Study) -> list[tuple[str, str]]:
    """The study's size, for the top of the page; without its configuration's fields where results alone are there."""
    last = study.results.runs[0].evaluations[-1]
    config = study.config or {}
    facts = [
        ("Questions", str(config.get("questions", f.MISSING))),
        ("UNKNOWN questions", f.count(len(last.correct))),
        ("Arms", f.count(len(study.arms))),
        ("Runs", f"{len(study.results.runs)} finished, {len(study.results.crashed)} crashed"),
        ("Steps", f.count(last.step)),
        ("Learning rate", _rates(study)),
    ]
    return [(name, value) for name, value in facts if value != f.MISSING]


def _rates(study: Study) -> str:
    """Those that the arms trained with: tuning may have chosen several."""
    tuned = {candidate["learning_rate"] for candidate in (study.tuning or {}).values()}
    return ", ".join(map(f.general, sorted(tuned))) or f.general((study.config or {}).get("learning_rate"))


def arms_table(study: Study) -> Table:
    """Each arm over its seeds: accuracy, differences, and how soon it was as good as outcome-only at its end."""
    columns = (
        Column("Arm", numeric=False),
        Column("Seeds"),
        Column("Start"),
        Column("End"),
        Column("95% interval"),
        Column("Less outcome only, points"),
        Column("95% interval"),
        Column(f"{study.gate.judged} less it, points"),
        Column("95% interval"),
        Column("Steps to outcome's end"),
    )
    base = mean(run.curve[-1][1] for run in study.runs(BASE))
    differences = {(one.arm, one.against): one for one in study.gate.comparisons}
    rows = []
    for arm in study.arms:
        runs = study.runs(arm)
        end = student_interval([run.curve[-1][1] for run in runs])
        steps = median_steps([steps_to(run, base) for run in runs])
        cells = (
            f.arm_label(arm),
            f.count(len(runs)),
            f.percent(mean(run.curve[0][1] for run in runs)),
            f.percent(end.value),
            f.percent_interval(max(end.low, 0.0), min(end.high, 1.0)),
            *_difference(differences.get((arm, BASE))),
            *_difference(differences.get((study.gate.judged, arm))),
            "never" if steps is None else f.general(steps),
        )
        rows.append(Row(cells, strong=arm == study.gate.judged))
    note = (
        "End: mean over seeds with Student's interval, cut at 0 and 100%. Differences are paired by seed and question, "
        "with the interval of a two-way analysis of variance. Steps: median over seeds to the first evaluation with at "
        f"least {f.percent(base)}, outcome-only's mean end."
    )
    return Table(columns, rows, note)


def _difference(one: Comparison | None) -> tuple[str, str]:
    if one is None or one.found is None:
        return f.MISSING, f.MISSING
    return f.points(one.found.value), f.points_interval(one.found.low, one.found.high)


def survival_table(survival: dict[str, Any]) -> Table:
    """Gate 3's criteria."""
    columns = (Column("Criterion", numeric=False), Column("State", numeric=False), Column("Measured", numeric=False))
    rows = [Row((one["name"], one["state"], one["words"])) for one in survival["criteria"]]
    return Table(columns, rows)


def study_figures(study: Study) -> list[Figure]:
    """A small chart an arm: each seed's accuracy by step, their mean, and outcome-only's mean in grey."""
    frames = {arm: _curves(study.runs(arm)) for arm in study.arms}
    values = pd.concat(frames.values())["accuracy"]
    domain = [float(values.min()), float(values.max())]
    return [_arm_figure(arm, frames[arm], frames[BASE], domain) for arm in study.arms]


def _curves(runs: Sequence[ArmRun]) -> pd.DataFrame:
    rows = [(run.seed, step, accuracy) for run in runs for step, accuracy in run.curve]
    return pd.DataFrame(rows, columns=["seed", "step", "accuracy"])


def _arm_figure(arm: str, frame: pd.DataFrame, base: pd.DataFrame, domain: list[float]) -> Figure:
    x = alt.X("step:Q", title=None, axis=alt.Axis(tickCount=5, tickMinStep=1))
    axis = alt.Axis(format=".0%", tickCount=4)
    y = alt.Y("accuracy:Q", title=None, axis=axis, scale=alt.Scale(domain=domain, nice=True))
    tooltip = [alt.Tooltip("seed:N"), alt.Tooltip("step:Q"), alt.Tooltip("accuracy:Q", format=".1%")]
    colour = PALETTE[1] if arm == BASE else PALETTE[0]
    seeds = alt.Chart(frame).encode(x=x, y=y, detail="seed:N", tooltip=tooltip)
    layers = [seeds.mark_line(strokeWidth=1, opacity=0.4, color=colour)]
    for rows, shade, width in ((base, REFERENCE, 1.5), (frame, colour, 2.5)):
        middle = rows.groupby("step", as_index=False)["accuracy"].mean()
        layers.append(alt.Chart(middle).mark_line(strokeWidth=width, color=shade).encode(x=x, y=y))
    layers.append(seeds.mark_point(size=60, opacity=0.001, filled=True))
    note = "Thin: seeds; thick: their mean" + ("." if arm == BASE else "; grey: outcome only.")
    return still_and_live(alt.layer(*layers), f.arm_label(arm), note, 280, 130)
