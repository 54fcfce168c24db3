"""The command line: `mechreward demo`, `improve`, `report`, `sae`, `pack`, `info`.

Exit codes: 0 done, 1 a gate did not pass, 2 bad input (one sentence on what to change).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mechreward.config import ImproveConfig, first_error, load_config
from mechreward.errors import InputError

if TYPE_CHECKING:
    from mechreward.pipeline import Outcome

DEMO = {
    "questions": "tiny:easy",
    "limit": 160,
    "arms": ("outcome", "dense"),
}

console = Console(highlight=False)
app = tyro.extras.SubcommandApp()
sae_app = tyro.extras.SubcommandApp()
pack_app = tyro.extras.SubcommandApp()


class RichProgress:
    """A bar a stage on a terminal; a plain line a stage elsewhere."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(title, total=total)
            yield lambda n: bar.advance(task, n)
        console.print(f"  {title} [dim]{time.perf_counter() - started:.1f} s[/dim]")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _dispatch(arguments)
    except InputError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error[/bold red] {error}", soft_wrap=True)
        code = 2
    sys.exit(code)
