"""Numbers as the page prints them: one function a kind, so that a value looks the same in text, table and tooltip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Number = float | int
MISSING = "–"
SURE = 0.05
"""Highest p at which a change is called one."""
ARM_LABELS = {
    "outcome": "outcome only",
    "dense": "outcome + dense",
    "rejection_sft": "SFT on sampled right answers",
    "repair_sft": "SFT on repairs",
    "repair_dpo": "DPO on repairs",
    "repair_cdpo": "DPO on critical tokens",
}


def number(value: Number | None, digits: int = 3) -> str:
    """Fixed decimals: `0.842`. None and NaN are a dash."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: Number | None, digits: int = 3) -> str:
    """Fixed decimals with a sign: `+0.120`, `−0.031`."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:+.{digits}f}".replace("-", "−")


def general(value: Number | None) -> str:
    """Four significant digits, for numbers of unknown size: `1e-05`, `12.35`."""
    return MISSING if value is None or math.isnan(value) else f"{value:.4g}".replace("-", "−")


def count(value: Number | None) -> str:
    """A whole number with thousands apart: `12,800`."""
    return MISSING if value is None or math.isnan(value) else f"{int(value):,}"


def interval(low: Number | None, high: Number | None, digits: int = 3) -> str:
    """`[0.790, 0.886]`; a dash if either end is missing."""
    ends = number(low, digits), number(high, digits)
    return MISSING if MISSING in ends else f"[{ends[0]}, {ends[1]}]"


def percent(share: Number | None) -> str:
    """A share as `51.5%`."""
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.1f}%"


def percent_interval(low: Number | None, high: Number | None) -> str:
    """Ends of an interval of shares: `47.8 to 55.2%`."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return MISSING
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def points(difference: Number | None) -> str:
    """A difference of shares in percentage points: `+4.2`."""
    return signed(None if difference is None else 100 * difference, 1)


def points_interval(low: Number | None, high: Number | None) -> str:
    """Ends of an interval of differences, in percentage points: `+0.4 to +8.1`."""
    ends = points(low), points(high)
    return MISSING if MISSING in ends else f"{ends[0]} to {ends[1]}"


def p_value(value: Number | None) -> str:
    """`p = 0.032`, `p < 0.001`."""
    if value is None or math.isnan(value):
        return f"p {MISSING}"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def duration(seconds: Number | None) -> str:
    """`48 s`, `2 min 31 s`, `3 h 05 min`."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def arm_label(arm: str) -> str:
    """The arm in words; a name of the user's own stays as it is."""
    return ARM_LABELS.get(arm, arm)


def scalar(value: Any) -> str:
    """Any value of a config or manifest on one line: nested values as `key: value, ...`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {scalar(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(scalar, value)) or "none"
    return "none" if value is None else str(value)


def paired_tone(paired: Mapping[str, Any]) -> str:
    """`good` for a rise and `bad` for a fall that the interval and the test of a paired difference both show, else
    `neutral`: with few questions that all moved alike, the bootstrap's interval leaves out 0 whatever the test says."""
    low, high, p = paired.get("low"), paired.get("high"), paired.get("p_value")
    if low is None or high is None or p is None or not p < SURE:
        return "neutral"
    return "good" if low > 0 else "bad" if high < 0 else "neutral"
