"""`mechreward improve` and `mechreward demo`: the main job."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import field, make_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mechreward.cli.terminal import RichProgress, console
from mechreward.config import ImproveConfig, load_config, make_config

if TYPE_CHECKING:
    from mechreward.pipeline import Outcome

DEMO: dict[str, Any] = {
    "questions": "tiny:easy",
    "limit": 160,
    "known": 0.7,
    "max_new_tokens": 80,
    "arms": ("outcome", "dense"),
    "steps": 12,
    "learning_rate": 1e-3,
    "eval_every": 4,
    "save_every": 12,
    "out": Path("runs/demo"),
}


def improve(arguments: list[str], preset: dict[str, Any], prog: str) -> int:
    """Parses the flags of the main job over its `--config` file and runs it."""
    # Nothing the user can act on: other libraries' deprecations and weight-loading bars.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    from mechreward.pipeline import improve as run

    logging.disable_progress_bar()
    options = _options_type()
    start = options(**preset | _config_file(arguments))
    parsed = tyro.cli(options, default=start, args=arguments, prog=prog, description=ImproveConfig.__doc__)
    config = make_config(**{name: getattr(parsed, name) for name in ImproveConfig.model_fields})
    console.print(f"[bold]mechreward[/] {config.model} on {config.questions} [dim]-> {config.out}[/]")
    return _tell(run(config, RichProgress()))


def _options_type() -> type:
    """`ImproveConfig` as tyro reads it: the same fields, defaults and help, with the checks left to `make_config`."""
    help_config = tyro.conf.arg(help="YAML file of these fields; flags go on top of it.")
    fields: list[Any] = [("config", Annotated[Path | None, help_config], field(default=None))]
    for name, info in ImproveConfig.model_fields.items():
        value = tyro.MISSING if info.is_required() else info.get_default(call_default_factory=True)
        annotation = Annotated[info.annotation, tyro.conf.arg(help=info.description)]  # type: ignore[name-defined]
        fields.append((name, annotation, field(default_factory=partial(deepcopy, value))))
    return make_dataclass("Options", fields, frozen=True)


def _config_file(arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of the file given by `--config`, which have to be known before the flags are parsed on top of them."""
    for at, argument in enumerate(arguments):
        if argument == "--config" and at + 1 < len(arguments):
            return load_config(arguments[at + 1])
        if argument.startswith("--config="):
            return load_config(argument.removeprefix("--config="))
    return {}


def _tell(outcome: Outcome) -> int:
    console.print(outcome.verdict, soft_wrap=True)
    console.print(f"report: [bold]{outcome.report}[/]", soft_wrap=True)
    return 0 if outcome.passed else 1
