"""The command line: `mechreward demo`, `improve`, `report`, `sae`, `pack`, `info`.

Exit codes: 0 done, 1 a gate did not pass, 2 bad input (one sentence on what to change).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import field, make_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mechreward.config import ImproveConfig, load_config, make_config
from mechreward.errors import InputError

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

console = Console(highlight=False)


class RichProgress:
    """A bar a stage on a terminal; a plain line a stage elsewhere."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(title, total=total)
            yield lambda n: bar.advance(task, n)
        console.print(f"  {title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
    except InputError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/] {error}", markup=True)
        code = 2
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if verb == "improve":
        return improve(rest, {}, "mechreward improve")
    if verb == "demo":
        return improve(rest, DEMO, "mechreward demo")
    if verb in GROUPS:
        return _run(GROUPS[verb], rest, f"mechreward {verb}")
    if verb in COMMANDS:
        return _run(COMMANDS, arguments, "mechreward")
    if verb in ("", "-h", "--help"):
        console.print(USAGE, soft_wrap=True)
        return 0
    raise InputError(f"command: {verb!r} is not one of {', '.join(VERBS)}")


def _run(commands: dict[str, Callable[..., int]], arguments: list[str], prog: str) -> int:
    code: int = tyro.extras.subcommand_cli_from_dict(commands, prog=prog, args=arguments)
    return code


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


def report(run: tyro.conf.Positional[Path]) -> int:
    """Writes report.html of a run directory anew."""
    from mechreward.report import write_report

    console.print(f"report: [bold]{write_report(run)}[/]", soft_wrap=True)
    return 0


def info() -> int:
    """Versions, device and extras at hand."""
    table = Table("package", "version", box=None)
    for name in ("mechreward", "torch", "transformers", "trl", "peft", "accelerate", "datasets", *EXTRAS):
        table.add_row(name, _version(name))
    console.print(table)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    console.print(f"device: {device}")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f'not installed (pip install "mechreward[{EXTRAS[name]}]")'


def sae_info(sae: tyro.conf.Positional[str], sae_id: str | None = None) -> int:
    """Shape, layer and origin of an SAE (a folder or a SAE Lens release)."""
    from mechreward.sae import load_sae

    loaded = load_sae(sae, sae_id)
    meta = loaded.meta
    table = Table(box=None, show_header=False)
    for name, value in (
        ("architecture", f"{loaded.architecture}" + (f", k {loaded.k}" if loaded.k else "")),
        ("width", f"{loaded.d_model} -> {loaded.d_sae} features"),
        ("layer", f"output of block {meta.layer}"),
        ("model", meta.model_name or "not recorded"),
        ("hash", loaded.weights_hash),
    ):
        table.add_row(name, value)
    console.print(table)
    return 0


def pack_list() -> int:
    """Packs that came with mechreward."""
    from mechreward.features import catalog_names

    for name in catalog_names():
        console.print(name)
    return 0


def pack_show(pack: tyro.conf.Positional[str]) -> int:
    """Features and gate record of a pack (a file or a bundled pack's name)."""
    from mechreward.features import load_pack

    loaded = load_pack(pack)
    table = Table("feature", "weight", "effect", "q", "stability", title=f"{loaded.name} {loaded.version}", box=None)
    for feature in loaded.features:
        numbers = (feature.weight, feature.effect, feature.q_value, feature.stability)
        table.add_row(str(feature.id), *("" if number is None else f"{number:.3g}" for number in numbers))
    console.print(table)
    found = loaded.validation
    console.print(f"gate 1: {found.verdict}, {found.n_questions} questions" if found else "gate 1: not run")
    return 0


def pack_validate(pack: tyro.conf.Positional[str], sae: str | None = None) -> int:
    """Checks a pack's fields and, with `--sae`, that it belongs to that SAE."""
    from mechreward.features import check_pack, load_pack
    from mechreward.sae import load_sae

    loaded = load_pack(pack)
    if sae is not None:
        check_pack(loaded, load_sae(sae))
    console.print(f"{pack}: valid, {len(loaded.features)} features, spec {loaded.spec_hash[:12]}")
    return 0


VERBS = {
    "demo": "the main job on the bundled model, in a few minutes on a CPU",
    "improve": "the main job: questions and a model -> gated dense reward -> training -> report",
    "report": "write the report of a run directory anew",
    "sae": "info: look at a sparse autoencoder",
    "pack": "list, show, validate: feature packs",
    "info": "versions, device, extras",
}
USAGE = "usage: [bold]mechreward[/] COMMAND [--help]\n\n" + "\n".join(f"  {v:9}{what}" for v, what in VERBS.items())
EXTRAS = {"sae-lens": "sae", "gguf": "gguf", "reasoning-gym": "tasks"}
COMMANDS: dict[str, Callable[..., int]] = {"report": report, "info": info}
GROUPS: dict[str, dict[str, Callable[..., int]]] = {
    "sae": {"info": sae_info},
    "pack": {"list": pack_list, "show": pack_show, "validate": pack_validate},
}
