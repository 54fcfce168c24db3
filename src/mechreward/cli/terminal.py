"""What the command line writes to: one console, and progress bars."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console(highlight=False)


def print_heading(what: str, out: Path) -> None:
    """What is being done, and the folder that it fills."""
    console.print(f"[bold]mechreward[/] {escape(what)} [dim]-> {escape(str(out))}[/]", soft_wrap=True)


def print_path(what: str, path: Path) -> None:
    """Where a result lies, on one line that can be copied."""
    console.print(f"{what} [bold]{escape(str(path))}[/]", soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Prints a warning as one sentence, without the file and the line of code that Python adds."""

    def sentence(message: Warning | str, *_: object, **__: object) -> str:
        return f"warning {message}\n"

    before = warnings.formatwarning
    warnings.formatwarning = sentence
    try:
        yield
    finally:
        warnings.formatwarning = before


class RichProgress:
    """A bar a stage on a terminal; a plain line a stage elsewhere."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        with _progress() as bar:
            task = bar.add_task(title, total=total)
            yield lambda n: bar.advance(task, n)
        console.print(f"  {title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")


@contextmanager
def bars() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yields a function (title, done, total, note) that draws a bar a title; nothing is drawn off a terminal."""
    tasks: dict[str, TaskID] = {}
    with _progress() as progress:

        def draw(title: str, done: int, total: int, note: str = "") -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=total)
            progress.update(tasks[title], completed=done, description=f"{title} {note}")

        yield draw


def _progress() -> Progress:
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
