"""What trainers call a reward with: a batch of prompts and completions, strings or chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechreward.errors import InputError

Text = str | list[dict[str, Any]]


def check_lengths(prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    """Raises InputError if a batch does not hold one completion a prompt."""
    if len(prompts) != len(completions):
        raise InputError(f"completions: {len(completions)} for {len(prompts)} prompts; give one each")
