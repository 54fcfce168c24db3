"""The tiny reasoner's model card, written from its measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def model_card(measurements: dict[str, Any]) -> str:
    """Markdown with the numbers of `build`'s measurements filled in."""
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.filters["three"] = lambda number: f"{number:.3f}"
    return environment.from_string(TEMPLATE.read_text()).render(**measurements)
