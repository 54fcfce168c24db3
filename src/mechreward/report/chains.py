"""The chain view: chains of thought before and after, step by step, from a run's `chains.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechreward.report import formats as f
from mechreward.report.rollouts import outcome_word

MAX_FIRED = 4
WORDS = {
    "repair": ("As it was sampled", "Written on with steering"),
    "": ("Before training", "After training"),
}
"""What stands above a chain and its counterpart, of a repair and of an arm."""


@dataclass(frozen=True)
class Chip:
    """A feature that fires in a step."""

    text: str
    side: str
    """`right` or `wrong`: which chains it goes with."""
    title: str


@dataclass(frozen=True)
class ShownStep:
    """Parts of one mark (`kept`, `critical`, `new`) as (mark, text), and what fires."""

    parts: list[tuple[str, str]]
    chips: list[Chip]
    more: int
    """Features that fire and are not shown."""


@dataclass(frozen=True)
class Chain:
    """One side of a view."""

    words: str
    outcome: str
    steps: list[ShownStep]


@dataclass(frozen=True)
class View:
    """A question with a chain before and after."""

    kind: str
    label: str
    question_id: str
    prompt: str
    answer: str
    before: Chain
    after: Chain


def make_views(chains: Mapping[str, Any]) -> list[View]:
    """The views of chains.json, ready to print."""
    return [_view(row) for row in chains["views"]]


def _view(row: Mapping[str, Any]) -> View:
    kind = row["kind"]
    words = WORDS.get(kind, WORDS[""])
    before, after = (_chain(row[side], word) for side, word in zip(("before", "after"), words, strict=True))
    label = "repair" if kind == "repair" else f.arm_label(kind)
    return View(kind, label, row["question_id"], row["prompt"], row["answer"], before, after)


def _chain(chain: Mapping[str, Any], words: str) -> Chain:
    return Chain(words, outcome_word(float(chain["correct"])), [_step(row) for row in chain["steps"]])


def _step(row: Mapping[str, Any]) -> ShownStep:
    fired: Sequence[Mapping[str, Any]] = row["fired"]
    parts = [part for mark, text in row["parts"] for part in _apart(mark, text)]
    if parts and not parts[0][1].strip():
        parts = parts[1:]  # A step's number stands where the white space before it was.
    return ShownStep(parts, [_chip(one) for one in fired[:MAX_FIRED]], max(0, len(fired) - MAX_FIRED))


def _apart(mark: str, text: str) -> list[tuple[str, str]]:
    """White space before a part by itself, without a mark."""
    bare = text.lstrip()
    return [part for part in (("kept", text[: len(text) - len(bare)]), (mark, bare)) if part[1]]


def _chip(one: Mapping[str, Any]) -> Chip:
    name = f" {one['name']}" if one["name"] else ""
    title = f"feature {one['feature']}{name}, {f.number(one['value'], 3)} of its size; goes with {one['side']} chains"
    return Chip(f"{one['feature']} {f.number(one['value'], 2)}", one["side"], title)
