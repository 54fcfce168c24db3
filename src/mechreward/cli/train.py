"""`mechreward train`: GRPO with a pack that is there."""

from __future__ import annotations

from mechreward.cli.improve import tell
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, print_heading
from mechreward.config import TrainRunConfig


def train(arguments: list[str], prog: str) -> int:
    """Parses the flags of such a run over its `--config` file and runs it."""
    config = parse_settings(TrainRunConfig, arguments, prog)
    quiet()
    from mechreward.pipeline import train as run

    print_heading(f"{config.model} on {config.questions} with {config.pack}", config.out)
    tell(run(config, RichProgress()))
    return 0
