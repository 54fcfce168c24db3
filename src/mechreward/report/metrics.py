"""Which numbers of the training rows the page draws, under which name, and how long runs are thinned."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

MAX_POINTS = 300
NOT_METRICS = frozenset({"arm", "seed", "step", "kind", "epoch"})
NAMED = {
    "rewards/outcome_reward/mean": ("Outcome reward", "mean of a step's responses"),
    "rewards/feature_reward/mean": ("Feature reward", "mean of a step's responses"),
    "dense/outcome_advantage_rms": ("Outcome advantage", "RMS"),
    "dense/advantage_rms": ("Dense advantage", "RMS, as added to the outcome's"),
    "kl": ("KL to the starting model", "nats a token"),
    "entropy": ("Entropy", "nats a token"),
    "completions/mean_length": ("Response length", "mean, tokens"),
    "completions/clipped_ratio": ("Cut at the length limit", "share of responses"),
    "frac_reward_zero_std": ("Questions without contrast", "share whose responses all got one reward"),
    "dense/zero_variance_groups": ("Questions without dense contrast", "share"),
    "dense/reader_seconds": ("Reader time", "seconds a step"),
    "grad_norm": ("Gradient norm", "before clipping"),
}


@dataclass(frozen=True)
class Metric:
    """A column of the training rows and its name on the page."""

    column: str
    title: str
    note: str
    main: bool
    """Named by us, so shown first; the others follow under their own names."""


def train_metrics(train: pd.DataFrame) -> list[Metric]:
    """Numeric columns that hold at least one number: rewards, the named ones in order, then the rest by name."""
    held = [name for name in train.columns if name not in NOT_METRICS and _is_number(train[name])]
    named = [Metric(name, *NAMED[name], main=True) for name in NAMED if name in held]
    # Rewards under names of the user's own belong beside ours, not among the rest.
    own = sorted(name for name in held if name not in NAMED and re.fullmatch(r"rewards/.+/mean", name))
    rest = sorted(name for name in held if name not in NAMED and name not in own)
    rewards = [Metric(name, name.split("/")[1], "mean of a step's responses", main=True) for name in own]
    return rewards + named + [Metric(name, name, "", main=False) for name in rest]


def thinned(train: pd.DataFrame, column: str) -> pd.DataFrame:
    """Columns arm, [seed,] step, value, trend: at most 300 points a line (means of equal runs of steps), and their
    moving mean over a fifteenth of the line."""
    keys = ["arm"] + ["seed"] * ("seed" in train)
    frame = train[[*keys, "step", column]].rename(columns={column: "value"}).dropna(subset=["value"])
    # Rows that name no seed, beside some that do, are a line too.
    parts = [_thin_line(line) for _, line in frame.groupby(keys, sort=False, dropna=False)]
    return pd.concat(parts, ignore_index=True)


def _thin_line(line: pd.DataFrame) -> pd.DataFrame:
    line = line.sort_values("step")
    if len(line) > MAX_POINTS:
        bucket = [index * MAX_POINTS // len(line) for index in range(len(line))]
        first = {name: "first" for name in line.columns if name not in ("step", "value")}
        line = line.groupby(bucket).agg({**first, "step": "mean", "value": "mean"})
    window = max(1, len(line) // 15)
    return line.assign(trend=line["value"].rolling(window, center=True, min_periods=1).mean())


def _is_number(column: pd.Series) -> bool:
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    return numeric and bool(column.notna().any())
