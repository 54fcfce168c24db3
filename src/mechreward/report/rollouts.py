"""Which rollouts a page shows, and how strongly each token is coloured.

A token's colour is proportional to its reward: teal above zero, magenta below, opacity `0.6 * |r| / scale`, where the
scale is the 99th percentile of |r| over the tokens shown (a few outliers would otherwise bleach the page) and larger
rewards are drawn at full strength. Opacity, not a mixed colour, so that both colour schemes keep the text readable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

POSITIVE, NEGATIVE, FULL = "0,128,108", "190,24,110", 0.6
MAX_ROLLOUTS, MAX_TOKENS, MAX_PROMPT = 24, 600, 2000


@dataclass(frozen=True)
class Token:
    """One token as the page shows it."""

    gap: str
    """White space of the completion that no token carries."""
    text: str
    colour: str
    """A CSS colour; empty for a reward of zero or none."""
    title: str
    """The reward, as hovering shows it."""


@dataclass(frozen=True)
class Rollout:
    """One sampled completion with its rewards."""

    arm: str
    step: int
    question_id: str
    prompt: str
    answer: str | None
    outcome: str
    """`right`, `wrong` or `unjudged`."""
    outcome_value: float | None
    feature_reward: float | None
    tokens: list[Token]
    left_out: int
    """Tokens beyond the longest shown."""


@dataclass(frozen=True)
class Gallery:
    """The rollouts of a page, the reward drawn at full strength, and how many there were to choose from."""

    rollouts: list[Rollout]
    scale: float
    total: int


def make_gallery(frame: pd.DataFrame, answers: dict[str, str], limit: int = MAX_ROLLOUTS) -> Gallery:
    """Builds the rollouts section from rollouts.parquet; `answers` maps question ids to gold answers."""
    chosen = choose(frame, limit)
    scale = colour_scale([np.asarray(values, float)[:MAX_TOKENS] for values in chosen["token_rewards"]])
    rows = [_rollout(row, answers, scale) for row in chosen.to_dict("records")]
    return Gallery(rows, scale, len(frame))


def choose(frame: pd.DataFrame, limit: int) -> pd.DataFrame:
    """At most `limit` rows: arms and outcomes in turn, each spread evenly over the steps; in order of step."""
    ordered = frame.sort_values(["step", "arm", "question_id"], kind="stable")
    groups = [ordered.index[rows] for _, rows in sorted(_groups(ordered).items())]
    quotas = _quotas([len(group) for group in groups], limit)
    keep: set[int] = set()
    for group, quota in zip(groups, quotas, strict=True):
        keep.update(group[np.linspace(0, len(group) - 1, quota).round().astype(int)] if quota else ())
    return ordered[ordered.index.isin(keep)]


def _groups(frame: pd.DataFrame) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for position, (arm, outcome) in enumerate(zip(frame["arm"], frame["outcome"], strict=True)):
        groups.setdefault((str(arm), outcome_word(_finite(outcome))), []).append(position)
    return groups


def _quotas(sizes: Sequence[int], limit: int) -> list[int]:
    quotas = [0] * len(sizes)
    while sum(quotas) < min(limit, sum(sizes)):
        for index, size in enumerate(sizes):
            if quotas[index] < size and sum(quotas) < limit:
                quotas[index] += 1
    return quotas


def colour_scale(rewards: Sequence[np.ndarray]) -> float:
    """The 99th percentile of |reward| over all tokens that have one, or 1 if there is none but zero."""
    values = np.abs(np.concatenate([*rewards, np.zeros(0)]))
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.quantile(values, 0.99, method="higher")) if values.size else 1.0


def token_colour(reward: float, scale: float) -> str:
    """The CSS colour of one token: `rgba(0,128,108,0.300)` for a reward of half the scale; empty for zero."""
    if not math.isfinite(reward) or reward == 0:
        return ""
    opacity = FULL * min(1.0, abs(reward) / scale)
    return f"rgba({POSITIVE if reward > 0 else NEGATIVE},{opacity:.3f})"


def make_tokens(tokens: Sequence[str], rewards: Sequence[float], completion: str, scale: float) -> list[Token]:
    """Tokens with colours. White space that the tokenizer keeps out of its tokens is taken from the completion."""
    shown, cursor = [], 0
    for text, reward in zip(tokens, rewards, strict=True):
        found = completion.find(text, cursor)
        gap = completion[cursor:found] if found >= 0 else ""
        if found >= 0 and not gap.strip():
            cursor = found + len(text)
        else:
            gap = ""
        title = f"{reward:+.6g}" if math.isfinite(reward) else "no reward"
        shown.append(Token(gap, text, token_colour(reward, scale), title))
    return shown


def outcome_word(outcome: float | None) -> str:
    """`right` above zero, `wrong` at or below, `unjudged` where the verifier gave none."""
    if outcome is None:
        return "unjudged"
    return "right" if outcome > 0 else "wrong"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _rollout(row: dict, answers: dict[str, str], scale: float) -> Rollout:
    tokens = list(row["tokens"])
    outcome = _finite(row["outcome"])
    prompt = row["prompt"]
    return Rollout(
        arm=str(row["arm"]),
        step=int(row["step"]),
        question_id=str(row["question_id"]),
        prompt=prompt if len(prompt) <= MAX_PROMPT else prompt[:MAX_PROMPT] + " …",
        answer=answers.get(str(row["question_id"])),
        outcome=outcome_word(outcome),
        outcome_value=outcome,
        feature_reward=_finite(row["feature_reward"]),
        tokens=make_tokens(tokens, list(row["token_rewards"]), row["completion"], scale)[:MAX_TOKENS],
        left_out=max(0, len(tokens) - MAX_TOKENS),
    )
