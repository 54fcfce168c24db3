"""What the command line says is what it was given: a folder's name is no markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechreward.cli.terminal import print_heading, print_path

ODD = Path("runs/[bold]a[/]") / ("b" * 200)


def test_paths_and_sources_are_printed_as_they_are_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_heading("tiny on [red]q.jsonl[/red]", ODD)
    print_path("wrote", ODD)
    heading, wrote = capsys.readouterr().out.splitlines()
    assert heading == f"mechreward tiny on [red]q.jsonl[/red] -> {ODD}"
    assert wrote == f"wrote {ODD}"
