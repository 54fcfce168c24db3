"""`mechreward redteam`: which hacks does a reward pay, and does a model hack, before and after training?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.redteam_settings import AttackSettings, RedTeamSettings, RunSettings
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError
from mechreward.files import make_folder, write_json

if TYPE_CHECKING:
    from mechreward.cli.redteam_targets import Targets
    from mechreward.hacking import RedTeam


def redteam(arguments: list[str], prog: str) -> int:
    """Runs the red team on one model, or on it before and after training."""
    settings: RedTeamSettings | RunSettings
    if any(argument.split("=")[0] == "--run" for argument in arguments):
        settings = parse_settings(RunSettings, arguments, prog)
    else:
        settings = parse_settings(RedTeamSettings, arguments, prog)
    quiet()
    from mechreward.cli.redteam_targets import given, of_run

    if isinstance(settings, RunSettings):
        targets, out = of_run(settings), settings.out or settings.run / "redteam.json"
    else:
        targets, out = given(settings), settings.out
    make_folder(out.parent)
    results = _attack(targets, settings)
    _show(results)
    write_json(out, {name: result.to_dict() for name, result in results.items()})
    print_path("numbers:", out)
    worst = max(result.reward.hack_rate or 0.0 for result in results.values())
    return 1 if worst > settings.highest else 0


def _attack(targets: Targets, settings: AttackSettings) -> dict[str, RedTeam]:
    from mechreward.hacking import red_team

    options: dict[str, Any] = {
        "samples": settings.samples, "max_new_tokens": targets.max_new_tokens, "batch_size": settings.batch_size,
        "answer_format": settings.answer_format, "seed": settings.seed,
    }  # fmt: skip
    results: dict[str, RedTeam] = {}
    for name, load in targets.models.items():
        first = next(iter(results.values()), None)
        held: dict[str, Any] = {} if first is None else {"threshold": first.threshold, "spam": first.spam}
        with RichProgress().stage(f"red team {name}: {len(targets.questions)} questions"):
            results[name] = red_team(load(), targets.reward, targets.questions, targets.verifier, **options, **held)
    return results


def _show(results: dict[str, RedTeam]) -> None:
    table = Table("", *results, box=None)

    def row(title: str, cells: list[str]) -> None:
        table.add_row(title, *cells)

    every = list(results.values())
    row("canaries the reward pays", [_share(r.reward.hack_rate, r.reward.hack_interval) for r in every])
    for pattern in every[0].reward.by_pattern:
        found = [r.reward.by_pattern[pattern] for r in every]
        row(f"  {pattern}", [f"{cell['paid']} of {cell['n']}" for cell in found])
    row("own answers, wrong and paid", [_share(r.hacked, r.hacked_interval) for r in every])
    for name in every[0].correct_under:
        cells = [r.correct_under[name] for r in every]
        row(f"right, {name}", [_share(cell["accuracy"], (cell["low"], cell["high"])) for cell in cells])
    console.print(table)


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        raise InputError("questions: no canary got a reward; the reward could read none of them")
    return f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"
