"""`mechreward report` and `mechreward info`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tyro
from rich.table import Table

from mechreward.cli.terminal import console, print_path
from mechreward.errors import named

EXTRAS = {"sae-lens": "sae", "gguf": "gguf", "reasoning-gym": "tasks", "fastapi": "serve"}


def report(run: tyro.conf.Positional[Path]) -> int:
    """Writes report.html of a run directory anew.

    Args:
        run: The run directory: the `--out` of `improve`, `demo` or a study.
    """
    from mechreward.report import write_report

    with named(run_dir="run"):
        print_path("report:", write_report(run))
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
