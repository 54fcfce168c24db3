"""Experiments 01, 02, 03 and 07 run on the tiny model with `--smoke`; the report reads what they leave."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from mechreward.errors import InputError
from mechreward.report import read_run, write_report

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arm"),
    # 07 runs the whole of 03, as the test below shows.
    [("01_baseline", "outcome"), ("02_feature_reward", "dense"), ("07_capability", "dense")],
)
def test_smoke(name: str, arm: str, tmp_path: Path) -> None:
    [trained] = import_module(name).main(["--smoke", "--seeds", "4", "--out", str(tmp_path)])
    assert trained.folder == tmp_path / "seed-4" and trained.inputs.config.seed == 4
    results = json.loads((trained.folder / "results.json").read_text())
    assert list(results["arms"]) == [arm] and results["arms"][arm]["paired"]["n_questions"] == 6
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"]["4"] == results["arms"][arm]
    assert read_run(trained.folder).train is not None
    assert (trained.folder / "report.html").stat().st_size > 1000, "written by `write_report` when the run was there"
    assert ("panel" in results) == (name == "07_capability")
    if "panel" in results:
        assert write_report(trained.folder).stat().st_size > 1000
        assert results["panel"]["tiny:easy"].keys() == {"before", "before_error", "after", "after_error"}


def test_03_is_what_07_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hybrid, capability = import_module("03_hybrid"), import_module("07_capability")
    arguments, asked = ["--smoke", "--out", str(tmp_path)], []
    for module in (hybrid, capability):
        fake = create_autospec(module.run, side_effect=lambda _, *given: asked.append(given) or [])
        monkeypatch.setattr(module, "run", fake)
        assert module.main(arguments) == []
    assert asked == [("dense", hybrid.rewards, arguments)] * 2
    assert hybrid.run.call_args.args[0] == hybrid.__doc__


def test_settings_are_those_of_improve(tmp_path: Path) -> None:
    common = import_module("common")
    (tmp_path / "c.yaml").write_text("questions: tiny:easy\nsteps: 7\n")
    given = common.Options(out=tmp_path, config=tmp_path / "c.yaml", seeds=(3, 5))
    made = common.configs(given)
    assert [(c.seed, c.steps, c.out.name, c.ungated) for c in made] == [
        (3, 7, "seed-3", False),
        (5, 7, "seed-5", False),
    ]
    with pytest.raises(InputError, match="questions: is needed"):
        common.configs(common.Options(out=tmp_path))
    (tmp_path / "c.yaml").write_text("magic: 1\n")
    with pytest.raises(InputError, match="magic: there is no such field"):
        common.configs(given)
