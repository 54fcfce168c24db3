"""Runs in parallel processes, each by itself: one that crashes or is killed takes no other with it.

A run is skipped where its file is already there, so a study that was killed goes on with the runs that are missing. A
run that crashed has no file: its traceback stands in its log, and it is tried again when the study goes on. Runs end
with the process that started them, however that ends: left over, they would meet the same runs of a study that goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mechreward.files import make_folder


@dataclass(frozen=True)
class Job:
    """One run: `function(*arguments)`, of which `path` is what it leaves."""

    name: str
    path: Path
    function: Callable[..., object]
    arguments: tuple[Any, ...]
    """Picklable, as the function is."""

    @property
    def log(self) -> Path:
        """What the run wrote to its error stream."""
        return self.path.with_suffix(".log")


def run_jobs(jobs: Sequence[Job], workers: int, on_done: Callable[[Job], None] = lambda _: None) -> dict[str, str]:
    """Runs those without a file, `workers` at a time, and returns the error of each that crashed, by its name."""
    waiting = [job for job in jobs if not job.path.exists()]
    running: list[tuple[BaseProcess, Job]] = []
    errors: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_start(waiting.pop(0)))
        ended = wait([process.sentinel for process, _ in running])
        for process, job in [pair for pair in running if pair[0].sentinel in ended]:
            running.remove((process, job))
            process.join()
            if not job.path.exists():
                errors[job.name] = _error(job, process.exitcode)
            on_done(job)
    return errors


def _start(job: Job) -> tuple[BaseProcess, Job]:
    make_folder(job.path.parent)
    job.log.write_text("")  # a child that fails before it opens it leaves an empty one, not that of an earlier try
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(job,), name=job.name)
    process.start()
    return process, job


def _child(job: Job) -> None:
    # Left open: the traceback of a crash is printed after this function.
    sys.stderr = job.log.open("w", buffering=1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.function(*job.arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _error(job: Job, exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by signal {-exit_code}"
    lines = [line for line in job.log.read_text().splitlines() if line.strip()]
    return lines[-1].strip() if exit_code and lines else f"ended with exit code {exit_code} and no result"
