"""The page of a study: the numbers Gate 2 works out, a chart an arm, crashes and Gate 3, and no run's sections."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mechreward.errors import InputError
from mechreward.gates import crossed_interval, median_steps, steps_to
from mechreward.report import write_report
from mechreward.report.charts import REFERENCE
from mechreward.report.study import Study, arms_table, read_study, study_facts, study_figures, study_headline

QUESTIONS = [f"q{index}" for index in range(12)]


def write_study(folder: Path, gain: float = 0.5, seeds: int = 5, **more: object) -> Path:
    """Arms `outcome`, `sae` and `random`: from .25 at step 0 to .25 + gain (of `sae`; .35 of the others) at step 10."""
    rng = np.random.default_rng(0)
    runs = []
    for arm in ("sae", "outcome", "random"):
        for seed in range(seeds):
            end = 0.25 + (gain if arm == "sae" else 0.1)
            curve = [
                {"step": step, "correct": {q: float(rng.integers(0, 3) / 8 + level - 0.125) for q in QUESTIONS}}
                for step, level in ((0, 0.25), (5, (0.25 + end) / 2), (10, end))
            ]
            runs.append({"arm": arm, "seed": seed, "evaluations": curve})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"judged": "sae", "runs": runs} | more))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = read_study(write_study(tmp_path_factory.mktemp("study") / "s"))
    assert found is not None
    return found


def finals(study: Study, arm: str) -> np.ndarray:
    return np.array([list(run.evaluations[-1].correct.values()) for run in study.runs(arm)])


def test_arms_table_holds_means_intervals_and_paired_differences(study: Study) -> None:
    table = arms_table(study)
    assert [(row.cells[0], row.strong) for row in table.rows] == [
        ("outcome only", False), ("sae", True), ("random", False),
    ]  # fmt: skip
    ends_S = finals(study, "sae").mean(1)
    low, high = stats.t.interval(0.95, 4, ends_S.mean(), stats.sem(ends_S))
    sae = table.rows[1].cells
    assert sae[1] == "5" and sae[3:5] == (f"{100 * ends_S.mean():.1f}%", f"{100 * low:.1f} to {100 * high:.1f}%")
    against = crossed_interval(finals(study, "sae") - finals(study, "outcome"))
    assert (
        sae[5] == f"+{100 * against.value:.1f}" and sae[6] == f"+{100 * against.low:.1f} to +{100 * against.high:.1f}"
    )
    over_random = crossed_interval(finals(study, "sae") - finals(study, "random"))
    assert table.rows[2].cells[7] == f"+{100 * over_random.value:.1f}"
    assert table.rows[0].cells[5:7] == ("–", "–") == sae[7:9]


def test_steps_are_a_median_in_which_never_comes_last(study: Study) -> None:
    runs = study.runs("sae")
    curves = [dict(run.curve) for run in runs]
    at_five = sorted(curve[5] for curve in curves)
    assert median_steps([steps_to(run, at_five[2]) for run in runs]) == 5
    beyond = max(max(curve.values()) for curve in curves) + 0.01
    assert median_steps([steps_to(run, beyond) for run in runs]) is None


def test_steps_to_where_outcome_only_ends(study: Study) -> None:
    target = finals(study, "outcome").mean()
    for row, arm in zip(arms_table(study).rows, ("outcome", "sae", "random"), strict=True):
        first = sorted(min([s for s, value in run.curve if value >= target], default=99) for run in study.runs(arm))
        assert row.cells[9] == {0: "0", 5: "5", 10: "10", 99: "never"}[first[2]]
    assert arms_table(study).rows[1].cells[9] == "5"
    assert arms_table(study).note.endswith(f"at least {100 * target:.1f}%, outcome-only's mean end.")


def test_a_chart_an_arm_with_the_judged_seeds_and_means(study: Study) -> None:
    figures = study_figures(study)
    assert [figure.title for figure in figures] == ["outcome only", "sae", "random"]
    values = [list(data) for data in figures[1].spec["datasets"].values()]
    sizes = sorted(len(rows) for rows in values)
    assert sizes == [3, 3, 15], "outcome-only's mean, the arm's mean, and five seeds at three steps"
    means = {row["step"]: row["accuracy"] for rows in values if len(rows) == 3 for row in rows if row["step"] == 10}
    assert means[10] in (pytest.approx(finals(study, "sae").mean()), pytest.approx(finals(study, "outcome").mean()))


@pytest.mark.parametrize(("gain", "seeds", "tone"), [(0.5, 5, "good"), (-0.1, 5, "bad"), (0.5, 3, "neutral")])
def test_the_headline_is_gate_2s_verdict(tmp_path: Path, gain: float, seeds: int, tone: str) -> None:
    study = read_study(write_study(tmp_path / "s", gain, seeds))
    assert study is not None
    found = study_headline(study)
    assert found.tone == tone and "against outcome" in found.detail.lower()


def test_the_page(tmp_path: Path) -> None:
    crash = {"arm": "random", "seed": 9, "error": "ValueError: <script>alert(1)</script>"}
    folder = write_study(tmp_path / "s", crashed=[crash])
    plain = write_report(folder).read_text()
    assert "ValueError: &lt;script&gt;alert(1)" in plain and "<script>alert(1)" not in plain
    assert "1 crashed" in plain and "Gate 3:" not in plain and 'id="rollouts"' not in plain
    criterion = {"name": "drift", "state": "broken", "words": "share .61 of the rise"}
    gate3 = {"verdict": "fail", "reason": "the reward drifted", "criteria": [criterion]}
    (folder / "gate3.json").write_text(json.dumps(gate3))
    page = write_report(folder).read_text()
    assert all(words in page for words in ("Gate 3:", "the reward drifted", "share .61 of the rise"))


def test_a_study_that_has_not_ended_has_no_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    (folder / "results.json").unlink()
    (folder / "runs").mkdir()
    for name in ("sae-0.json", "sae-0.log", "outcome-0.json"):
        (folder / "runs" / name).write_text("")
    (folder / "config.yaml").write_text("stage: 2\njudged: sae\n")
    with pytest.raises(InputError, match=r"holds a study that has not ended \(2 runs so far\); go on .* --resume"):
        write_report(folder)


def test_ends_are_shares_and_tuned_rates_are_shown(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", 0.5, 2)
    record = json.loads((folder / "results.json").read_text())
    for place, run in enumerate(r for r in record["runs"] if r["arm"] == "sae"):
        last = run["evaluations"][-1]
        last["correct"] = dict.fromkeys(last["correct"], float(place))
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "tuning.json").write_text(json.dumps({a: {"learning_rate": r} for a, r in (("sae", 3e-4), ("b", 1e-5))}))
    study = read_study(folder)
    assert study is not None
    row = next(row for row in arms_table(study).rows if row.strong)
    assert row.cells[3:5] == ("50.0%", "0.0 to 100.0%")
    assert dict(study_facts(study))["Learning rate"] == "1e\u221205, 0.0003"
    for name in ("config.yaml", "tuning.json"):
        (folder / name).unlink(missing_ok=True)
    alone = read_study(folder)
    assert alone is not None
    assert [name for name, _ in study_facts(alone)] == ["UNKNOWN questions", "Arms", "Runs", "Steps"]


def test_results_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", judged="probe")
    with pytest.raises(InputError, match="no finished run of arm 'probe'"):
        write_report(folder)


def test_starts_facts_and_one_scale_for_all_charts(study: Study) -> None:
    for row, arm in zip(arms_table(study).rows, ("outcome", "sae", "random"), strict=True):
        starts = np.array([list(run.evaluations[0].correct.values()) for run in study.runs(arm)])
        assert row.cells[2] == f"{100 * starts.mean():.1f}%" and row.cells[2] != row.cells[3]
    found = dict(study_facts(study))
    assert (found["UNKNOWN questions"], found["Steps"], found["Arms"]) == ("12", "10", "3")
    assert found["Runs"] == "15 finished, 0 crashed"
    curves = [value for run in study.results.runs for _, value in run.curve]
    for figure in study_figures(study):
        domains = [layer["encoding"]["y"]["scale"]["domain"] for layer in figure.spec["layer"]]
        assert domains == [pytest.approx([min(curves), max(curves)])] * len(domains)


def test_outcome_only_s_mean_is_the_grey_line_of_every_chart(study: Study) -> None:
    for figure, arm in zip(study_figures(study), ("outcome", "sae", "random"), strict=True):
        lines = [layer for layer in figure.spec["layer"] if layer["mark"]["type"] == "line"]
        drawn = [figure.spec["datasets"][layer["data"]["name"]] for layer in lines]
        assert lines[1]["mark"]["color"] == REFERENCE and [len(rows) for rows in drawn] == [15, 3, 3]
        for rows, name in ((drawn[1], "outcome"), (drawn[2], arm)):
            assert rows[-1]["accuracy"] == pytest.approx(finals(study, name).mean())
