"""`mechreward gate --stage 2` and `--stage 3` on results files: exit codes, what is printed and written, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechreward.cli import main
from mechreward.gates import Answer, ArmRun, Canaries, Crash, Evaluation, PanelTask, StudyResults, Survival
from mechreward.report.study import read_study
from mechreward.settings import read_fields
from mechreward.studies.config import StudyConfig, credit_of, kind_of, make_study


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["gate", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out.replace("\n", " "), captured.err


def study(folder: Path, sae: float = 0.75, crashed: tuple[Crash, ...] = ()) -> Path:
    finals = {"outcome": 0.5, "sae": sae, "random": 0.5}
    runs = [
        ArmRun(
            arm=arm,
            seed=seed,
            evaluations=tuple(
                Evaluation(step=step, correct={f"q{i}": min(value + 0.01 * ((i + seed) % 3), 1.0) for i in range(12)})
                for step, value in ((0, 0.25), (4, final))
            ),
        )
        for arm, final in finals.items()
        for seed in range(5)
    ]
    path = folder / "results.json"
    path.write_text(StudyResults(judged="sae", runs=tuple(runs), crashed=crashed).model_dump_json())
    return path


def survive(folder: Path, live: float = 2.0) -> None:
    task = PanelTask(before=0.5, before_error=0.001, after=0.5, after_error=0.001)

    def answers(level: float, probe: float) -> tuple[Answer, ...]:
        rows = [(f"q{i}", right) for i in range(12) for right in (True, False)]
        return tuple(
            Answer(question=q, correct=right, live=level + right, frozen=level + right, probe=probe)
            for q, right in rows
        )

    (folder / "survival").mkdir()
    none = Canaries(paid={f"q{i}": 0.0 for i in range(12)}, n=300)
    for seed in range(5):
        found = Survival(
            arm="sae", seed=seed, before=answers(1.0, 0.5), after=answers(live, 0.6), gate1_low=0.6,
            canaries_before=none, canaries_after=none, panel={"sums": task},
        )  # fmt: skip
        (folder / "survival" / f"sae-{seed}.json").write_text(found.model_dump_json())


def test_stage_2_on_a_results_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = study(tmp_path, crashed=(Crash(arm="length", seed=3, error="ValueError: no [x]"),))
    code, said, _ = run(capsys, "--stage", "2", "--results", str(path), "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "gate2.json").read_text())
    assert code == 0 and record["verdict"] == "pass"
    assert "Gate 2 of sae: pass" in said and "crashed: length seed 3: ValueError: no [x]" in said
    assert "target: accuracy 0.459" in said and "+0.250" in said
    code, said, _ = run(capsys, "--stage=2", "--results", str(study(tmp_path, sae=0.5)), "--out", str(tmp_path / "out"))
    assert code == 1 and "Gate 2 of sae: futile" in said
    more = ("--min-seeds", "6", "--out", str(tmp_path / "out"))
    code, said, _ = run(capsys, "--stage", "2", "--results", str(study(tmp_path)), *more)
    assert code == 1 and "5 paired seeds, 6 are needed" in said


def test_stage_3_on_a_study(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study(tmp_path)
    survive(tmp_path)
    code, said, _ = run(capsys, "--stage", "3", "--study", str(tmp_path))
    record = json.loads((tmp_path / "gate3.json").read_text())
    assert code == 0 and record["verdict"] == "pass", record["reason"]
    assert [c["name"] for c in record["criteria"]] == ["accuracy", "capability", "canaries", "drift", "scorer", "probe"]
    assert "Gate 3 of sae: pass" in said and "drift" in said


def test_stage_3_that_was_not_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study(tmp_path)
    code, _, error = run(capsys, "--stage", "3", "--study", str(tmp_path))
    assert code == 2 and "measured: there is nothing" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--stage", "4"), "stage: '4' is not one of 1, 2, 3"),
        (("--stage", "2", "--results", "none.json"), "results: there is no file none.json"),
        (("--stage", "2", "--results", "list.json"), "results: list.json holds list, where a JSON object is needed"),
        (("--stage", "2", "--results", "odd.json"), "runs: is needed and was not given"),
        (("--stage", "2", "--questions", "tiny:nope"), "error questions: 'tiny:nope' is no setting"),
        (
            ("--stage", "2", "--questions", "tiny:easy", "--signs", "balanced", "--n-features", "1"),
            "n_features: 1 is not allowed, it must be at least 2 with signs balanced",
        ),
        (("--stage", "2", "--questions", "tiny:easy", "--arms", "sae"), "outcome has to be among them"),
        (
            ("--stage", "2", "--questions", "tiny:easy", "--judged", "random"),
            "judged: 'random' must be one of the arms",
        ),
        (("--stage", "3", "--study", "none"), "study: there is no file none/results.json"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("odd.json").write_text('{"judged": "sae"}')
    code, _, error = run(capsys, *arguments)
    assert code == 2 and sentence in " ".join(error.split())


def test_several_studies_are_judged_as_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    paths = []
    for place, folder in enumerate(folders):
        folder.mkdir()
        record = json.loads(study(folder).read_text())
        # Three seeds each, none in common; the first has an arm that the other lacks.
        seeds = range(3)
        record["runs"] = [run | {"seed": run["seed"] + 10 * place} for run in record["runs"] if run["seed"] in seeds]
        record["runs"] += [run | {"arm": "length"} for run in record["runs"] if run["arm"] == "sae"] * (1 - place)
        record["crashed"] = [{"arm": "sae", "seed": 4 + 10 * place, "error": "y"}]
        record["crashed"] += [{"arm": "length", "seed": 3, "error": "x"}] * (1 - place)
        paths.append(folder / "results.json")
        paths[-1].write_text(json.dumps(record))
    out = tmp_path / "both"
    code, said, _ = run(capsys, "--stage", "2", "--results", *map(str, paths), "--out", str(out))
    found = json.loads((out / "gate2.json").read_text())
    assert code == 0 and "Gate 2 of sae: pass" in said
    assert {arm["arm"]: arm["seeds"] for arm in found["arms"]} == dict.fromkeys(
        ("outcome", "sae", "random"), [0, 1, 2, 10, 11, 12]
    )
    assert [(crash["arm"], crash["seed"]) for crash in found["crashed"]] == [("sae", 4), ("sae", 14)]
    assert read_study(out) is not None
    alone = ("--stage", "2", "--results", str(paths[0]), "--out", str(tmp_path / "alone"))
    code, said, _ = run(capsys, *alone)
    assert code == 1 and "3 paired seeds, 5 are needed" in said and not (tmp_path / "alone" / "results.json").exists()
    code, _, error = run(capsys, "--stage", "2", "--results", str(paths[0]), str(paths[0]), "--out", str(out))
    assert code == 2 and "outcome seed 0 is there twice" in " ".join(error.split())
    paths[1].write_text(paths[1].read_text().replace('"judged": "sae"', '"judged": "length"'))
    code, _, error = run(capsys, "--stage", "2", "--results", *map(str, paths), "--out", str(out))
    assert code == 2 and "judged: the studies judge sae and length" in " ".join(error.split())


@pytest.mark.parametrize("name", ["tiny-gate2", "tiny-credit", "tiny-potential", "tiny-default"])
def test_committed_studies_are_studies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    config = make_study(**read_fields(StudyConfig, f"studies/{name}/study.yaml"))
    rivals = {credit_of(arm, config.credit) for arm in config.arms if kind_of(arm) == "random"}
    assert len(config.seeds) >= 5 and {"outcome", config.judged} < set(config.arms)
    assert credit_of(config.judged, config.credit) in rivals


@pytest.mark.parametrize(
    ("names", "verdict", "numbers"),
    [
        (["tiny-potential"], "pass", [0.144, 0.034, 0.255, 0.304, 0.056, 0.553]),
        (["tiny-default"], "inconclusive", [0.085, -0.009, 0.180, 0.196, -0.132, 0.524]),
        (["tiny-potential", "tiny-default"], "pass", [0.115, 0.052, 0.178, 0.250, 0.078, 0.423]),
    ],
)
def test_the_committed_results_are_judged_as_the_docs_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], verdict: str, numbers: list[float]
) -> None:
    studies = [Path(__file__).parents[1] / "studies" / name for name in names]
    results = [str(study / "results.json") for study in studies]
    code, said, _ = run(capsys, "--stage", "2", "--results", *results, "--out", str(tmp_path / "g"))
    found = json.loads((tmp_path / "g" / "gate2.json").read_text())
    assert (code, found["verdict"]) == (int(verdict != "pass"), verdict) and f"sae/potential: {verdict}" in said
    differences = {(one["arm"], one["against"]): one["found"] for one in found["comparisons"]}
    deciding = [differences["sae/potential", rival] for rival in ("outcome", "random/potential")]
    assert [round(one[key], 3) for one in deciding for key in ("value", "low", "high")] == numbers
    if len(studies) == 1:
        kept = json.loads((studies[0] / "gate2.json").read_text())
        assert kept["verdict"] == verdict
        assert [one["found"] for one in kept["comparisons"]] == [pytest.approx(f) for f in differences.values()]


def test_the_committed_survival_is_judged_as_the_docs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Path(__file__).parents[1] / "studies" / "tiny-default"
    code, said, _ = run(capsys, "--stage", "3", "--study", str(study), "--out", str(tmp_path / "g"))
    assert code == 1 and "Gate 3 of sae/potential: fail" in said and "scorer: 0.924 [0.886, 0.957]" in said
    found, kept = (json.loads((folder / "gate3.json").read_text()) for folder in (tmp_path / "g", study))
    assert [c["state"] for c in found["criteria"]] == [c["state"] for c in kept["criteria"]]
    assert found["verdict"] == kept["verdict"] == "fail"
