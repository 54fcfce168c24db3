"""Statistics over seeds, and over seeds x questions: what a paired difference of two training methods is worth.

Two arms share seeds (the same starting model, question order and sampling seed) and test questions, so a study leaves
one difference per seed s and question q, d_sq = m + a_s + b_q + e_sq: a seed's luck, a question's own reaction, the
rest. Both seeds and questions are samples, and crossed. The variance of the mean follows from the two-way analysis of
variance without replication (Cornfield and Tukey 1956),

    V = (MS_seed + MS_question - MS_rest) / (S Q),   at least each of MS_seed and MS_question alone / (S Q)

and the interval is Student's t with Satterthwaite's (1946) degrees of freedom, few where seeds decide.

The hierarchical bootstrap (seeds and questions redrawn independently: Owen 2007, "The pigeonhole bootstrap") is
reported beside it and decides nothing. With five seeds its percentiles are too narrow for the seeds (4/5 of their
variance, no Student correction) and too wide for the rest (three times its variance); `benchmarks/gate2_error_rates.py`
shows what each of the two does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from mechreward.errors import InputError
from mechreward.gates.statistics import Interval

Array = NDArray[np.float64]
POWER = 0.8
"""Of the study that `seeds_needed` plans."""
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Crossed:
    """Mean difference over seeds and questions with its interval, and the components that its variance is made of."""

    value: float
    low: float
    high: float
    error: float
    """Standard error of `value`."""
    freedom: float
    """Satterthwaite's degrees of freedom."""
    n_seeds: int
    n_questions: int
    seed_variance: float
    question_variance: float
    rest_variance: float


def crossed_interval(difference_SQ: ArrayLike, level: float = 0.95) -> Crossed:
    """Mean of paired differences over crossed seeds and questions, two-sided interval.

    Args:
        difference_SQ: one difference a seed and question, [S, Q].

    Raises:
        InputError: fewer than two seeds or questions, or a difference that is not finite.
    """
    d_SQ = _checked(difference_SQ)
    n_seeds, n_questions = d_SQ.shape
    mean, seed_S, question_Q = d_SQ.mean(), d_SQ.mean(1), d_SQ.mean(0)
    rest_SQ = d_SQ - seed_S[:, None] - question_Q + mean
    df_S, df_Q = n_seeds - 1, n_questions - 1
    ms_seed = n_questions * seed_S.var(ddof=1)
    ms_question = n_seeds * question_Q.var(ddof=1)
    ms_rest = (rest_SQ**2).sum() / (df_S * df_Q)
    squares = max(ms_seed + ms_question - ms_rest, ms_seed, ms_question)
    error = float(np.sqrt(squares / (n_seeds * n_questions)))
    spread = ms_seed**2 / df_S + ms_question**2 / df_Q + ms_rest**2 / (df_S * df_Q)
    freedom = float(max(squares**2 / spread, 1.0)) if spread > 0 else float(df_S)
    half = float(t.ppf((1 + level) / 2, freedom)) * error
    return Crossed(
        float(mean), float(mean - half), float(mean + half), error, freedom, n_seeds, n_questions,
        seed_variance=float(max(ms_seed - ms_rest, 0) / n_questions),
        question_variance=float(max(ms_question - ms_rest, 0) / n_seeds),
        rest_variance=float(ms_rest),
    )  # fmt: skip


def student_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent numbers, one a seed, with Student's two-sided interval; of a single one the mean alone (NaN
    for the rest).

    Raises:
        InputError: if there is none.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise InputError("values: there are none to take a mean of")
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, np.nan, np.nan, np.nan)
    error = float(found.std(ddof=1) / len(found) ** 0.5)
    half = float(t.ppf((1 + level) / 2, len(found) - 1)) * error
    return Interval(mean, mean - half, mean + half, error)


def hierarchical_bootstrap(
    difference_SQ: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, seeds and questions redrawn with replacement and independently.

    Raises:
        InputError: as `crossed_interval`.
    """
    d_SQ = _checked(difference_SQ)
    n_seeds, n_questions = d_SQ.shape
    rng = np.random.default_rng(seed)
    seeds_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws) / n_seeds
    questions_RQ = rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=draws) / n_questions
    means_R = ((seeds_RS @ d_SQ) * questions_RQ).sum(1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seeds_needed(found: Crossed, gap: float, level: float = 0.95) -> int | None:
    """Fewest seeds at which a true difference of `gap` from the bound would be told from it in 4 of 5 studies.

    By the components found, with the same questions; None if no number up to `MOST_SEEDS` does it (then more questions
    are needed) or the gap is not positive.
    """
    counts = np.arange(2, MOST_SEEDS + 1)
    rest = found.rest_variance / found.n_questions
    errors = np.sqrt((found.seed_variance + rest) / counts + found.question_variance / found.n_questions)
    enough = (t.ppf((1 + level) / 2, counts - 1) + norm.ppf(POWER)) * errors < gap
    return int(counts[enough][0]) if enough.any() else None


def _checked(difference_SQ: ArrayLike) -> Array:
    d_SQ = np.asarray(difference_SQ, dtype=np.float64)
    if d_SQ.ndim != 2 or min(d_SQ.shape) < 2:
        raise InputError(f"differences: shape {d_SQ.shape}; at least 2 seeds and 2 questions are needed")
    if not np.isfinite(d_SQ).all():
        raise InputError(f"differences: {int((~np.isfinite(d_SQ)).sum())} are NaN or infinite; all must be finite")
    return d_SQ
