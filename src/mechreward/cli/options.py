"""A verb's settings from its flags, on top of the YAML file that `--config` names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from mechreward.settings import Settings, SettingsT, make_settings, read_fields


def parse_settings(
    kind: type[SettingsT], arguments: list[str], prog: str, preset: dict[str, Any] | None = None
) -> SettingsT:
    """The settings of a verb: `preset`, under the fields of the `--config` file, under the flags.

    Raises:
        InputError: naming the first bad field, its value and what is allowed.
    """
    options = _options_type(kind)
    given = (preset or {}) | _config_file(kind, arguments)
    parsed = tyro.cli(options, default=options(**given), args=arguments, prog=prog, description=_flowing(kind.__doc__))
    return make_settings(kind, {name: getattr(parsed, name) for name in kind.model_fields})


def quiet() -> None:
    """Silences what a user cannot act on: other libraries' deprecations and weight-loading bars."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()


def _options_type(kind: type[Settings]) -> type:
    """A record as tyro reads it: the same fields, defaults and help, with the checks left to `make_settings`."""
    help_config = tyro.conf.arg(help="YAML file of these fields; flags go on top of it.")
    fields: list[Any] = [("config", Annotated[Path | None, help_config], field(default=None))]
    for name, info in kind.model_fields.items():
        value = tyro.MISSING if info.is_required() else info.get_default(call_default_factory=True)
        annotation = Annotated[info.annotation, tyro.conf.arg(help=_flowing(info.description))]  # type: ignore[name-defined]
        fields.append((name, annotation, field(default_factory=partial(deepcopy, value))))
    return make_dataclass("Options", fields, frozen=True)


def _flowing(text: str | None) -> str:
    """A docstring without the line breaks of its source, for a terminal to break where it likes."""
    return " ".join((text or "").split())


def _config_file(kind: type[Settings], arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of the file given by `--config`, which have to be known before the flags are parsed on top of them."""
    for at, argument in enumerate(arguments):
        if argument == "--config" and at + 1 < len(arguments):
            return read_fields(kind, arguments[at + 1])
        if argument.startswith("--config="):
            return read_fields(kind, argument.removeprefix("--config="))
    return {}
