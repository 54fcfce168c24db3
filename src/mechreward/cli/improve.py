"""`mechreward improve` and `mechreward demo`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, console, print_heading, print_path
from mechreward.config import ImproveConfig

if TYPE_CHECKING:
    from mechreward.stages import Outcome

DEMO: dict[str, Any] = {
    "questions": "tiny:easy",
    "limit": 160,
    "known": 0.7,
    "max_new_tokens": 80,
    "arms": ("outcome", "dense"),
    "steps": 12,
    "learning_rate": 5e-4,
    "eval_every": 4,
    "save_every": 12,
    "out": Path("runs/demo"),
}


def improve(arguments: list[str], preset: dict[str, Any], prog: str) -> int:
    """Parses the flags of the main job over its `--config` file and runs it."""
    config = parse_settings(ImproveConfig, arguments, prog, preset)
    quiet()
    from mechreward.pipeline import improve as run

    print_heading(f"{config.model} on {config.questions}", config.out)
    outcome = run(config, RichProgress())
    tell(outcome)
    return 0 if outcome.passed else 1


def tell(outcome: Outcome) -> None:
    """What a run came to, and where it lies."""
    console.print(outcome.verdict, markup=False, soft_wrap=True)
    for arm, path in outcome.results["policies"].items():
        print_path(f"policy ({arm}):", outcome.folder / path)
    print_path("report:", outcome.report)
