"""Jobs in processes of their own: what is there is skipped, what crashes or is killed takes no other with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

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
