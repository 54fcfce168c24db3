"""Finds the command, runs it, and turns its outcome into an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro
from rich.console import Console
from rich.markup import escape

from mechreward import __version__
from mechreward.cli import features, look, pack, sae, sae_check, sae_layers, sae_train, steer, steer_repair
from mechreward.cli.discover import discover
from mechreward.cli.eval import evaluate
from mechreward.cli.gate import gate
from mechreward.cli.improve import DEMO, improve
from mechreward.cli.redteam import redteam
from mechreward.cli.serve import serve
from mechreward.cli.terminal import console, plain_warnings
from mechreward.cli.train import train
from mechreward.errors import InputError

VERBS = {
    "demo": "the main job on the bundled model, in a few minutes on a CPU",
    "improve": "the main job: questions and a model -> gated dense reward -> training -> report",
    "discover": "features that go with right answers to the same question -> table and pack",
    "gate": "does a pack tell right from wrong answers to held-out questions? Exit code 1 unless it passes",
    "train": "GRPO with a gated pack's reward -> policy, tested on other questions -> report",
    "eval": "accuracy on questions; with --fuzz, does it and a pack's signal survive another wording?",
    "redteam": "which hacks does a reward pay, and does a model hack, before and after training?",
    "serve": "a pack's rewards over HTTP, for verl and OpenRLHF",
    "report": "write the report of a run directory anew",
    "sae": "train, check, layers, info: sparse autoencoders",
    "pack": "list, show, validate, schema: feature packs",
    "features": "show: where features fire, and which tokens they speak for",
    "steer": "inspect, generate, sweep, repair: edits of features while the model runs",
    "info": "versions, device, extras",
}
USAGE = "usage: [bold]mechreward[/] COMMAND [--help]\n\n" + "\n".join(f"  {v:10}{what}" for v, what in VERBS.items())
COMMANDS: dict[str, Callable[..., int]] = {"report": look.report, "info": look.info}
GROUPS: dict[str, dict[str, Callable[..., int]]] = {
    "sae": {"train": sae_train.train, "check": sae_check.check, "layers": sae_layers.layers, "info": sae.info},
    "features": {"show": features.show},
    "steer": {
        "inspect": steer.inspect,
        "generate": steer.generate,
        "sweep": steer.sweep,
        "repair": steer_repair.repair,
    },
    "pack": {"list": pack.list_packs, "show": pack.show, "validate": pack.validate, "schema": pack.schema},
}

CONFIGURED = {
    features.show,
    sae_train.train,
    sae_check.check,
    sae_layers.layers,
    steer.generate,
    steer.sweep,
    steer_repair.repair,
}
"""Verbs of a group that read a settings file under their flags; they are given both unparsed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with plain_warnings():
            code = _dispatch(arguments)
    except InputError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/] {escape(str(error))}")
        code = 2
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if verb == "improve":
        return improve(rest, {}, "mechreward improve")
    if verb == "demo":
        return improve(rest, DEMO, "mechreward demo")
    if verb == "discover":
        return discover(rest, "mechreward discover")
    if verb == "gate":
        return gate(rest, "mechreward gate")
    if verb == "train":
        return train(rest, "mechreward train")
    if verb == "eval":
        return evaluate(rest, "mechreward eval")
    if verb == "redteam":
        return redteam(rest, "mechreward redteam")
    if verb == "serve":
        return serve(rest, "mechreward serve")
    if verb in GROUPS:
        return _run(GROUPS[verb], rest, f"mechreward {verb}")
    if verb in COMMANDS:
        return _run(COMMANDS, arguments, "mechreward")
    if verb in ("", "-h", "--help"):
        console.print(USAGE, soft_wrap=True)
        return 0
    if verb == "--version":
        console.print(__version__, highlight=False)
        return 0
    raise InputError(f"command: {verb!r} is not one of {', '.join(VERBS)}")


def _run(commands: dict[str, Callable[..., int]], arguments: list[str], prog: str) -> int:
    chosen = commands.get(arguments[0]) if arguments else None
    if chosen in CONFIGURED:
        return chosen(arguments[1:], f"{prog} {arguments[0]}")
    code: int = tyro.extras.subcommand_cli_from_dict(commands, prog=prog, args=arguments)
    return code
