"""`mechreward gate --stage 2` and `--stage 3`: runs a study, or takes the results of one, and judges its reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from rich.markup import escape
from rich.table import Table

from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, console, print_heading, print_path
from mechreward.errors import InputError, named
from mechreward.files import make_folder, read_json, write_json
from mechreward.settings import Settings, Share, make_settings

if TYPE_CHECKING:
    from mechreward.gates import Crossed, Gate2Result, StudyResults


class ResultsSettings(Settings):
    """Judges the results of a study by Gate 2: exit code 0 if the arm on trial passes, else 1."""

    stage: Literal[2] = 2
    """Which gate."""
    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    """A study's results.json; those of several studies of the same settings and other seeds are judged as one."""
    futile: Share = 0.02
    """An upper bound of the gain under it is too little."""
    min_seeds: Annotated[int, Field(ge=2)] = 5
    """Fewest paired seeds for any verdict but inconclusive."""
    out: Path = Path("runs/gate2")
    """Folder for gate2.json; of several studies also their results.json, for `mechreward report`."""


class SurvivalSettings(Settings):
    """Judges by Gate 3 whether a study's reward survived being optimised: exit code 0 if it did, else 1."""

    stage: Literal[3] = 3
    """Which gate."""
    study: Path
    """Folder of a study that ran with `survival`: its results.json and its survival folder are read."""
    out: Path | None = None
    """Folder for gate3.json; the study's own if left out."""


def gate_survival(arguments: list[str], prog: str) -> int:
    """Judges the policies of a study's judged arm, prints the criteria, writes gate3.json; 1 unless it passes."""
    settings = parse_settings(SurvivalSettings, arguments, prog)
    quiet()
    from mechreward.gates import StudyResults, Survival, gate3

    results = make_settings(StudyResults, read_record(settings.study / "results.json", "study"))
    files = sorted((settings.study / "survival").glob("*.json"))
    found = gate3(results, [make_settings(Survival, read_record(path, "study")) for path in files])
    table = Table("criterion", "state", "measured", box=None)
    for criterion in found.criteria:
        table.add_row(criterion.name, criterion.state, escape(criterion.words))
    console.print(table)
    console.print(f"[bold]Gate 3 of {found.judged}: {found.verdict}[/] {escape(found.reason)}", soft_wrap=True)
    path = make_folder(settings.out or settings.study) / "gate3.json"
    write_json(path, found.to_dict())
    print_path("wrote", path)
    return 0 if found.passed else 1


def gate_study(arguments: list[str], prog: str) -> int:
    """Runs or reads a study, prints the tables, writes gate2.json; 1 unless the judged arm passes."""
    of_results = any(argument.split("=")[0] == "--results" for argument in arguments)
    settings = parse_settings(ResultsSettings, arguments, prog) if of_results else None
    quiet()
    from mechreward.gates import Gate2Bars, StudyResults, gate2, pooled

    bars = Gate2Bars()
    if settings is None:
        results, out = _run(arguments, prog)
    else:
        studies = [make_settings(StudyResults, read_record(path, "results")) for path in settings.results]
        results, out = pooled(studies), make_folder(settings.out)
        bars = Gate2Bars(futile=settings.futile, min_seeds=settings.min_seeds)
    verdict = gate2(results, bars)
    _show(verdict)
    if settings is not None and len(settings.results) > 1:
        write_json(out / "results.json", results.model_dump(mode="json"))
        print_path("wrote", out / "results.json")
    write_json(out / "gate2.json", verdict.to_dict())
    print_path("wrote", out / "gate2.json")
    return 0 if verdict.passed else 1


def read_record(path: Path, option: str) -> dict[str, object]:
    """A JSON object's fields.

    Raises:
        InputError: naming the option that led to it, if the file is missing, or holds no JSON object.
    """
    with named(path=option):
        record = read_json(path)
    if not isinstance(record, dict):
        raise InputError(f"{option}: {path} holds {type(record).__name__}, where a JSON object is needed")
    return record


def _run(arguments: Sequence[str], prog: str) -> tuple[StudyResults, Path]:
    from mechreward.studies.config import StudyConfig
    from mechreward.studies.study import run_study

    config = parse_settings(StudyConfig, list(arguments), prog)
    many = f"{len(config.arms)} arms x {len(config.seeds)} seeds"
    print_heading(f"study of {many} on {config.questions}", config.out)
    results = run_study(config, RichProgress())
    print_path("wrote", config.out / "results.json")
    return results, config.out


def _show(found: Gate2Result) -> None:
    table = Table("arm", "seeds", "start", "final", "steps to target", "less outcome", "judged arm less it", box=None)
    by = {(c.arm, c.against): c.found for c in found.comparisons}
    for arm in found.arms:
        table.add_row(
            arm.arm,
            str(len(arm.seeds)),
            f"{arm.start:.3f}",
            f"{arm.final:.3f}",
            "never" if arm.median_steps is None else f"{arm.median_steps:g}",
            _words(by, arm.arm, "outcome"),
            _words(by, found.judged, arm.arm),
        )
    console.print(table)
    console.print(f"target: accuracy {found.target:.3f}, 90 % of outcome-only's final one", soft_wrap=True)
    for crash in found.crashed:
        console.print(f"crashed: {crash.arm} seed {crash.seed}: {escape(crash.error)}", soft_wrap=True)
    console.print(f"[bold]Gate 2 of {found.judged}: {found.verdict}[/] {escape(found.reason)}", soft_wrap=True)


def _words(by: dict[tuple[str, str], Crossed | None], arm: str, against: str) -> str:
    from mechreward.gates.gate2 import words

    found = by.get((arm, against))
    return "" if found is None else escape(words(found))
