"""What a feature is said to mean, always with who says so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from mechreward.errors import InputError
from mechreward.features.contexts import FeatureContexts
from mechreward.features.lens import LensReading

Source = Literal["neuronpedia", "logit lens", "top contexts", "examiner", "user"]


@dataclass(frozen=True)
class Label:
    """A feature's meaning in words.

    Raises:
        InputError: if the text is empty or there is no such source.
    """

    feature_id: int
    text: str
    source: Source

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise InputError(f"source: {self.source!r} is not one of {', '.join(get_args(Source))}")
        if not self.text.strip():
            raise InputError(f"text: the label of feature {self.feature_id} is empty; leave it out")

    def __str__(self) -> str:
        return f"{self.text} ({self.source})"


def lens_label(reading: LensReading, n: int = 3) -> Label:
    """The first `n` tokens it promotes."""
    words = ", ".join(repr(token) for token, _ in reading.promoted[:n])
    return Label(reading.feature_id, f"promotes {words}", "logit lens")


def contexts_label(found: FeatureContexts, n: int = 3) -> Label | None:
    """The `n` tokens it fires highest on most often; None if it fires nowhere."""
    peaks = Counter(context.tokens[_peak(context.acts)] for context in found.contexts)
    if not peaks:
        return None
    words = ", ".join(f"{token!r} ({count} of {len(found.contexts)})" for token, count in peaks.most_common(n))
    return Label(found.feature_id, f"highest on {words}", "top contexts")


def _peak(acts: tuple[float, ...]) -> int:
    return max(range(len(acts)), key=acts.__getitem__)
