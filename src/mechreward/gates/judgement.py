"""From numbers to a verdict: pass, fail or inconclusive, with the reason in words.

The bar is on the within-question AUROC. The recommended second bar, on the AUROC over all answers, is left out (it is
reported): differences between questions move it in both directions and GRPO's group baseline removes them, so that it
could only fail a reward that trains well or flatter one that does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from mechreward.gates.statistics import Interval

Verdict = Literal["pass", "fail", "inconclusive"]
POWER_Z = 0.84
"""Standard normal quantile of 80 % power, for "how many questions would decide"."""
MOST_QUESTIONS = 1_000_000


@dataclass(frozen=True)
class Thresholds:
    """What decides; written into the result."""

    within_auroc: float = 0.55
    """The lower 95 % bound must lie above it."""
    margin: float = 0.02
    """The lower 95 % bound of the lead over each baseline must lie above it; an upper bound that does not, fails. Not
    0, because a fitted baseline is a little worse than the words it stands for."""
    permutation_p: float = 0.01
    """The permutation p must lie below it."""
    min_mixed: int = 20
    """Fewest questions with right and wrong answers for any verdict but inconclusive: over less a bootstrap is too
    narrow."""
    rephrased: bool = False
    """Whether the signal has to survive another wording (`gates.judge_signal`); a brittle pack then fails."""
    detectable: float = 0.60
    """A score that cannot be told from chance (p > .05) fails where the questions had 90 % power to show this much."""


@dataclass(frozen=True)
class ScoreRow:
    """One score on the gate's responses; `difference` is the judged reward's within-question AUROC minus this one's."""

    name: str
    auroc: Interval
    within: Interval
    difference: Interval | None = None
    required: bool = True
    """Whether the judged reward has to lead it to pass; else it is reported only."""


@dataclass(frozen=True)
class Judgement:
    """The verdict, why, and how many questions would decide an inconclusive one (None: not open, or past a million)."""

    verdict: Verdict
    reason: str
    questions_needed: int | None = None


def judge(
    judged: ScoreRow, baselines: Sequence[ScoreRow], p_value: float, n_questions: int, n_mixed: int, bars: Thresholds
) -> Judgement:
    """Fail if anything is settled against the reward, pass if nothing is open, else inconclusive."""
    baselines = [row for row in baselines if row.required]
    if n_mixed < bars.min_mixed:
        return Judgement("inconclusive", too_few(n_questions, n_mixed, bars))
    against = _against(judged, baselines, p_value, bars)
    if against:
        return Judgement("fail", "; ".join(against))
    undecided = _undecided(judged, baselines, p_value, bars)
    measured = f"AUROC within a question {words(judged.within)} on {n_mixed} mixed questions"
    if not undecided:
        beaten = ", ".join(row.name for row in baselines)
        better = f", better than {beaten}" if beaten else ""
        return Judgement("pass", f"{measured}, above {bars.within_auroc:.2f}{better}")
    needed = ceil(n_questions * max(factor for _, factor in undecided))
    known = needed <= MOST_QUESTIONS
    number = f"about {needed:,} such" if known else "no practicable number of"
    reasons = "; ".join(reason for reason, _ in undecided)
    reason = f"{measured}: {reasons}; {number} questions would decide"
    return Judgement("inconclusive", reason, needed if known else None)


def too_few(n_questions: int, n_mixed: int, bars: Thresholds, all_alike: str | None = None) -> str:
    """Words for too few mixed questions; `all_alike` is "right" or "wrong" where every answer is."""
    why = f"all answers are {all_alike}, so " if all_alike else ""
    count = f"only {n_mixed}" if n_mixed else "none"
    verb = "has" if n_mixed == 1 else "have"
    return f"{why}{count} of {n_questions} questions {verb} both right and wrong answers, {bars.min_mixed} are needed"


def words(interval: Interval) -> str:
    """As in "0.61 [0.55, 0.67]"."""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _against(judged: ScoreRow, baselines: Sequence[ScoreRow], p_value: float, bars: Thresholds) -> list[str]:
    reasons = []
    within = judged.within
    # One-sided 5 % level and 90 % power: 1.645 + 1.282 standard errors.
    powered = (bars.detectable - 0.5) / 2.927 >= within.error
    if within.high < bars.within_auroc:
        reasons.append(f"AUROC within a question {words(within)} lies below {bars.within_auroc:.2f}")
    elif p_value > 0.05 and powered:
        reasons.append(
            f"AUROC within a question {words(within)} cannot be told from chance (permutation p = {p_value:.2f}), "
            f"though these questions would have shown {bars.detectable:.2f}"
        )
    for row in baselines:
        if row.difference is not None and row.difference.high <= bars.margin:
            reasons.append(f"{row.name} is as good ({words(row.within)}, the reward {words(within)})")
    return reasons


def _undecided(
    judged: ScoreRow, baselines: Sequence[ScoreRow], p_value: float, bars: Thresholds
) -> list[tuple[str, float]]:
    """Reasons with the factor by which the questions would have to grow to decide each."""
    within = judged.within
    found = []
    if within.low <= bars.within_auroc:
        growth = _growth(within.value - bars.within_auroc, within.error, 1.96)
        found.append((f"the interval spans {bars.within_auroc:.2f}", growth))
    if p_value >= bars.permutation_p:
        growth = _growth(within.value - 0.5, within.error, 2.33)
        found.append((f"permutation p = {p_value:.3f} is not below {bars.permutation_p:g}", growth))
    for row in baselines:
        if row.difference is not None and row.difference.low <= bars.margin:
            growth = _growth(row.difference.value - bars.margin, row.difference.error, 1.96)
            found.append((f"{row.name} may be as good (difference {words(row.difference)})", growth))
    return found


def _growth(gap: float, error: float, z: float) -> float:
    """How many times more questions put the gap z + POWER_Z standard errors from 0; always more than there are."""
    if gap == 0:
        return float(MOST_QUESTIONS + 1)
    return min(max(((z + POWER_Z) * error / gap) ** 2, 1.01), float(MOST_QUESTIONS + 1))
