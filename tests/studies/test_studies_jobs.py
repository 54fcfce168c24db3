"""Jobs in processes of their own: what is there is skipped, what crashes or is killed takes no other with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mechreward.studies import jobs as room
from mechreward.studies.jobs import Job, run_jobs


def test_a_crash_takes_no_other_run_with_it(tmp_path: Path) -> None:
    path = {name: tmp_path / "runs" / f"{name}.json" for name in "abcde"}
    jobs = [
        Job("a", path["a"], Path.touch, (path["a"],)),
        Job("b", path["b"], json.loads, ("{no",)),
        Job("c", path["c"], os.abort, ()),
        Job("d", path["d"], len, ("",)),
        Job("e", path["e"], Path.write_text, (path["e"], "new")),
    ]
    path["e"].parent.mkdir()
    path["e"].write_text("kept")
    done: list[str] = []
    errors = run_jobs(jobs, 2, lambda job: done.append(job.name))
    assert errors.keys() == {"b", "c", "d"}
    assert errors["b"].startswith("json.decoder.JSONDecodeError: Expecting property name")
    assert errors["c"] == "killed by signal 6" and errors["d"] == "ended with exit code 0 and no result"
    assert sorted(done) == ["a", "b", "c", "d"] and path["e"].read_text() == "kept" and path["a"].exists()
    assert "Traceback" in jobs[1].log.read_text()
    assert run_jobs(jobs[:1], 1) == {}


def sleep_long(path: Path) -> None:
    """A run that says who it is, and does not end by itself within the test."""
    path.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(300)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_who_started_it(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import sys; from pathlib import Path; from mechreward.studies.jobs import Job, run_jobs\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_studies_jobs import sleep_long\n"
        "path = Path(sys.argv[1])\n"
        "if __name__ == '__main__': run_jobs([Job('a', path, sleep_long, (path,))], 1)\n"
    )
    starter = subprocess.Popen([sys.executable, str(script), str(tmp_path / "a.json")])
    until = time.monotonic() + 60
    pid = tmp_path / "a.pid"
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < until and starter.poll() is None
        time.sleep(0.05)
    run = int(pid.read_text())
    assert is_running(run)
    starter.send_signal(number)
    assert starter.wait(timeout=60) == -number
    while is_running(run):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """An orphan that has ended may wait for whoever adopted it: that is not running."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def unready(path: Path) -> None:
    """Never called: what is pickled with it cannot be made anew in the child."""


class Unready:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return __import__, ("no_such_module_anywhere",)


def test_a_child_that_does_not_come_up_takes_no_other_run_with_it(tmp_path: Path) -> None:
    dead, path = tmp_path / "dead.json", tmp_path / "a.json"
    dead.with_suffix(".log").write_text("ValueError: of an earlier try")
    jobs = [Job("dead", dead, unready, (Unready(),)), Job("a", path, Path.touch, (path,))]
    assert run_jobs(jobs, 1) == {"dead": "ended with exit code 1 and no result"} and path.exists()


class Ended:
    """A process that has ended well by the time anyone waits for it."""

    exitcode = 0

    def __init__(self, sentinel: int) -> None:
        self.sentinel = sentinel

    def join(self) -> None:
        pass


@pytest.mark.parametrize(("workers", "running"), [(1, [1, 1, 1, 1, 1]), (3, [3, 3, 3, 2, 1]), (9, [5, 4, 3, 2, 1])])
def test_no_more_run_at_a_time_than_workers_and_the_first_begin_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, running: list[int]
) -> None:
    started, seen = [], []

    def start(job: Job) -> tuple[Ended, Job]:
        started.append(job.name)
        job.path.touch()
        return Ended(len(started)), job

    def wait(sentinels: list[int]) -> list[int]:
        seen.append(len(sentinels))
        return sentinels[:1]

    monkeypatch.setattr(room, "_start", start)
    monkeypatch.setattr(room, "wait", wait)
    jobs = [Job(name, tmp_path / name, len, ("",)) for name in "abcde"]
    assert run_jobs(jobs, workers) == {}
    assert started == list("abcde") and seen == running


def test_of_a_traceback_the_last_line_is_the_error(tmp_path: Path) -> None:
    job = Job("a", tmp_path / "a.json", len, ("",))
    job.log.write_text("Traceback (most recent call last):\n  File x\nValueError: no \n\n")
    assert [room._error(job, code) for code in (1, 0, None, -9)] == [
        "ValueError: no", "ended with exit code 0 and no result", "ended with exit code None and no result",
        "killed by signal 9",
    ]  # fmt: skip
