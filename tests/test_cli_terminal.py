"""What the command line says is what it was given: a folder's name is no markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechreward.cli import main
from mechreward.cli.terminal import print_heading, print_path

ODD = Path("runs/[bold]a[/]") / ("b" * 200)


def test_paths_and_sources_are_printed_as_they_are_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_heading("tiny on [red]q.jsonl[/red]", ODD)
    print_path("wrote", ODD)
    heading, wrote = capsys.readouterr().out.splitlines()
    assert heading == f"mechreward tiny on [red]q.jsonl[/red] -> {ODD}"
    assert wrote == f"wrote {ODD}"


@pytest.mark.parametrize("verb", [("improve",), ("eval",), ("gate",), ("steer", "sweep")])
def test_help_keeps_no_line_breaks_of_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    said = capsys.readouterr().out
    # Options that span two lines of their docstrings, and a verb whose own does.
    texts = {
        "improve": "the largest effects are all penalties, and a pack of penalties",
        "eval": "how far answers to one family agree, and with --pack",
        "gate": "`--stage 3 --help` those of its aftermath",
        "steer": "or of answers that hold a text.",
    }
    assert texts[verb[0]] in said
