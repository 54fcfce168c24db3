"""What the command line says is what it was given: a folder's name is no markup."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mechreward.cli.main import COMMANDS, main
from mechreward.cli.terminal import console, plain_warnings, print_heading, print_path

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


def test_a_warning_is_one_line_and_only_while_a_command_runs() -> None:
    before = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("sae: fits badly", UserWarning, "pipeline.py", 189) == "warning sae: fits badly\n"
    assert warnings.formatwarning is before


def test_commands_run_with_plain_warnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> int:
        # Not `warnings.warn`: pytest keeps those to itself.
        console.print(warnings.formatwarning("odd", UserWarning, "a.py", 1), end="")
        return 0

    monkeypatch.setitem(COMMANDS, "info", warn)
    with pytest.raises(SystemExit):
        main(["info"])
    assert capsys.readouterr().out == "warning odd\n"
