"""What the command line writes to: one console, and a progress bar a stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
