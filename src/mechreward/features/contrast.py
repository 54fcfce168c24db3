"""Which features differ between right and wrong answers *to the same question*, in one pass and O(F) memory.

For every feature, on x = log(1 + pooled activation) and with each question's mean taken off both x and the label (the
"within" or fixed-effects estimator), because GRPO's group baseline removes whatever tells only questions apart:

- difference: slope of x on the label, i.e. right minus wrong, questions weighted by right * wrong / answers;
- effect: Cohen's d, the difference over the standard deviation within question and class;
- p: t test of the slope with standard errors clustered by question (Liang and Zeger 1986; n_mixed - 1 degrees of
  freedom). A plain Welch test on the centred values would count the centring's lost degrees of freedom as data: with
  two answers a question its t is sqrt(2) too large. q: Benjamini and Hochberg (1995) over features with enough support;
- stability: share of half-samples *of questions* in which the feature is among the `top_k` of largest |effect| with the
  same sign (Meinshausen and Buhlmann 2010, with the complementary pairs of Shah and Samworth 2013);
- support: share of answers in which the feature fires at all; scale: standard deviation within a question of the pooled
  activation, so that activation / scale is in comparable units for every feature.

Held in memory: a dozen F-vectors and two [halves, F] sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mechreward.errors import InputError
from mechreward.features.pack import Pooling
from mechreward.features.pooling import PooledBatch, check_responses, pooled_activations
from mechreward.files import atomic_path
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.sae import SAE

Array = NDArray[np.float64]
SPREAD_FLOOR = 0.01
"""Least spread Cohen's d divides by, as a share of the spread within questions: keeps a perfect separator finite."""


@dataclass(frozen=True)
class ContrastTable:
    """One row a feature, largest |effect| first.

    Columns: id, effect, difference, p_value, q_value (1 for features below the minimum support, which are not tested),
    stability, support, support_correct, support_wrong, scale (0 for a feature that is constant within every question).
    """

    frame: pd.DataFrame
    n_questions: int
    n_mixed: int
    n_responses: int
    """Responses to mixed questions: the ones the statistics rest on."""


def discover(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    *,
    pooling: Pooling = "mean",
    min_support: float = 0.05,
    top_k: int = 50,
    halves: int = 50,
    seed: int = 0,
    batch_size: int = 32,
) -> ContrastTable:
    """Contrast over a model's verified responses; only questions with right and wrong answers are read at all.

    Raises:
        InputError: if the answers are all right or all wrong, fewer than two questions have both, a completion has no
            tokens, or a residual is not finite.
    """
    check_responses(responses)
    seen: dict[str, set[bool | None]] = {}
    for response in responses:
        seen.setdefault(response.question_id, set()).add(response.correct)
    mixed = {question for question, labels in seen.items() if len(labels) == 2}
    _check_mixed(len(mixed), len(seen), len(responses), {label is True for s in seen.values() for label in s})
    kept = [response for response in responses if response.question_id in mixed]
    batches = pooled_activations(loaded, sae, kept, pooling, batch_size=batch_size)
    table = contrast(batches, min_support=min_support, top_k=top_k, halves=halves, seed=seed)
    return replace(table, n_questions=len(seen))


def contrast(
    batches: Iterable[PooledBatch], *, min_support: float = 0.05, top_k: int = 50, halves: int = 50, seed: int = 0
) -> ContrastTable:
    """Streams batches of whole questions; see the module's docstring for the statistics.

    Args:
        min_support: least share of answers (right and wrong together, so that the label has no say) in which a feature
            must fire to be tested.
        top_k: how many features of a half-sample count as found.
        halves: number of half-samples, even.
        seed: of the half-samples.

    Raises:
        InputError: if a question comes in two batches, an activation is not finite, or there is nothing to contrast.
    """
    if halves < 2 or halves % 2:
        raise InputError(f"halves: {halves} is not allowed, it must be an even number of at least 2")
    sums = _Sums(halves=halves, rng=np.random.default_rng(seed))
    for batch in batches:
        sums.add(batch)
    _check_mixed(sums.n_mixed, len(sums.questions), sums.n_seen, sums.classes)
    return ContrastTable(_frame(sums, min_support, top_k), len(sums.questions), sums.n_mixed, int(sums.n_class.sum()))


def save_contrast(table: ContrastTable, path: str | Path) -> None:
    """Writes the table as Parquet, atomically; the counts travel in the file's metadata."""
    frame = table.frame.copy()
    frame.attrs = {"n_questions": table.n_questions, "n_mixed": table.n_mixed, "n_responses": table.n_responses}
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary)


def load_contrast(path: str | Path) -> ContrastTable:
    """Reads what `save_contrast` wrote.

    Raises:
        InputError: if there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"features: there is no file {path}")
    frame = pd.read_parquet(path)
    counts = {name: int(frame.attrs[name]) for name in ("n_questions", "n_mixed", "n_responses")}
    return ContrastTable(frame, **counts)


@dataclass
class _Sums:
    """Running sums over mixed questions. With y the label and x the log activation, both centred within the question,
    u = sum of y x and w = sum of y y over a question."""

    halves: int
    rng: np.random.Generator
    questions: set[str] = field(default_factory=set)
    classes: set[bool] = field(default_factory=set)
    n_seen: int = 0
    n_mixed: int = 0
    n_class: Array = field(default_factory=lambda: np.zeros(2))
    """Answers to mixed questions: wrong, right."""
    fires_2F: Array = field(default_factory=lambda: np.zeros((2, 1)))
    raw_F: Array = field(default_factory=lambda: np.zeros(1))
    """Sum of squares of the centred raw activation."""
    square_F: Array = field(default_factory=lambda: np.zeros(1))
    u_F: Array = field(default_factory=lambda: np.zeros(1))
    uu_F: Array = field(default_factory=lambda: np.zeros(1))
    uw_F: Array = field(default_factory=lambda: np.zeros(1))
    w: float = 0.0
    ww: float = 0.0
    half_u_SF: Array = field(default_factory=lambda: np.zeros((1, 1)))
    half_square_SF: Array = field(default_factory=lambda: np.zeros((1, 1)))
    half_w_S: Array = field(default_factory=lambda: np.zeros(1))
    half_free_S: Array = field(default_factory=lambda: np.zeros(1))
    """Answers minus questions in each half."""
    _odd_S: NDArray[np.bool_] | None = None

    def add(self, batch: PooledBatch) -> None:
        acts_BF = batch.acts_BF.numpy().astype(np.float64)
        right_B = batch.correct_B.numpy()
        if not np.isfinite(acts_BF).all():
            raise InputError("activations: NaN or infinite values cannot be contrasted")
        # In order of appearance, so that the half-samples do not depend on how questions are batched.
        ids = list(dict.fromkeys(batch.question_ids))
        code_B = np.array([ids.index(question) for question in batch.question_ids])
        twice = self.questions.intersection(ids)
        if twice:
            raise InputError(f"batches: question {min(twice)} comes in two batches, its answers must come in one")
        self.questions.update(ids)
        self.classes.update(right_B.tolist())
        self.n_seen += len(right_B)
        for code in range(len(ids)):
            rows = code_B == code
            if right_B[rows].any() and not right_B[rows].all():
                self._add_question(acts_BF[rows], right_B[rows])

    def _add_question(self, acts_GF: Array, right_G: NDArray[np.bool_]) -> None:
        x_GF, raw_GF = _centred(np.log1p(acts_GF)), _centred(acts_GF)
        y_G = right_G - right_G.mean()
        u_F, square_F, w = y_G @ x_GF, (x_GF**2).sum(0), float(y_G @ y_G)
        fires_GF = acts_GF > 0
        self.n_mixed += 1
        self.n_class += [(~right_G).sum(), right_G.sum()]
        self.fires_2F = self.fires_2F + np.stack([fires_GF[~right_G].sum(0), fires_GF[right_G].sum(0)])
        self.raw_F = self.raw_F + (raw_GF**2).sum(0)
        self.square_F = self.square_F + square_F
        self.u_F, self.uu_F, self.uw_F = self.u_F + u_F, self.uu_F + u_F**2, self.uw_F + u_F * w
        self.w, self.ww = self.w + w, self.ww + w * w
        self._add_halves(u_F, square_F, w, len(y_G) - 1)

    def _add_halves(self, u_F: Array, square_F: Array, w: float, free: int) -> None:
        if self.n_mixed == 1:
            self.half_u_SF = np.zeros((self.halves, len(u_F)))
            self.half_square_SF = np.zeros((self.halves, len(u_F)))
            self.half_w_S, self.half_free_S = np.zeros(self.halves), np.zeros(self.halves)
        in_S = self._draw()
        self.half_u_SF[in_S] += u_F
        self.half_square_SF[in_S] += square_F
        self.half_w_S[in_S] += w
        self.half_free_S[in_S] += free

    def _draw(self) -> NDArray[np.bool_]:
        """Which halves the next question is in: of two questions in a row each half takes exactly one."""
        if self._odd_S is not None:
            in_S, self._odd_S = ~self._odd_S, None
            return in_S
        first = self.rng.random(self.halves // 2) < 0.5
        self._odd_S = np.concatenate([first, ~first])
        return self._odd_S


def _centred(values_GF: Array) -> Array:
    # The first row is taken off first: what is constant becomes exactly 0, not a rounding error.
    rest_GF = values_GF - values_GF[0]
    return rest_GF - rest_GF.mean(0)


def _frame(sums: _Sums, min_support: float, top_k: int) -> pd.DataFrame:
    n_wrong, n_right = sums.n_class
    support_F = sums.fires_2F.sum(0) / (n_wrong + n_right)
    free = n_wrong + n_right - sums.n_mixed
    effect_F = _effect(sums.u_F, sums.square_F, sums.w, free)
    tested_F = support_F >= min_support
    p_F = _p_values(sums)
    q_F = np.ones_like(p_F)
    if tested_F.any():
        q_F[tested_F] = multipletests(p_F[tested_F], method="fdr_bh")[1]
    frame = pd.DataFrame(
        {
            "id": np.arange(len(p_F)),
            "effect": effect_F,
            "difference": sums.u_F / sums.w,
            "p_value": p_F,
            "q_value": q_F,
            "stability": _stability(sums, effect_F, tested_F, top_k),
            "support": support_F,
            "support_correct": sums.fires_2F[1] / n_right,
            "support_wrong": sums.fires_2F[0] / n_wrong,
            "scale": np.sqrt(sums.raw_F / free),
        }
    )
    order = np.lexsort((frame["id"], -np.abs(effect_F)))
    return frame.iloc[order].reset_index(drop=True)


def _effect(u_F: Array, square_F: Array, w: float, free: float) -> Array:
    """Cohen's d from sums; 0 for a feature that is constant within every question."""
    total_F = square_F / max(free, 1)
    rest_F = np.maximum(square_F - u_F**2 / w, 0) / max(free - 1, 1)
    spread_F = np.sqrt(np.maximum(rest_F, SPREAD_FLOOR**2 * total_F))
    return np.divide(u_F / w, spread_F, out=np.zeros_like(u_F), where=spread_F > 0)


def _p_values(sums: _Sums) -> Array:
    """Two-sided, clustered by question; 1 for a feature that is constant within every question."""
    slope_F = sums.u_F / sums.w
    scores_F = np.maximum(sums.uu_F - 2 * slope_F * sums.uw_F + slope_F**2 * sums.ww, 0)
    n = sums.n_mixed
    error_F = np.sqrt(scores_F * n / (n - 1)) / sums.w
    with np.errstate(divide="ignore", invalid="ignore"):
        t_F = np.where(slope_F == 0, 0.0, np.abs(slope_F) / error_F)
    return np.asarray(2 * stats.t.sf(t_F, n - 1))


def _stability(sums: _Sums, effect_F: Array, tested_F: NDArray[np.bool_], top_k: int) -> Array:
    hits_F = np.zeros_like(effect_F)
    for s in range(sums.halves):
        if sums.half_w_S[s] == 0:
            continue
        half_F = _effect(sums.half_u_SF[s], sums.half_square_SF[s], sums.half_w_S[s], sums.half_free_S[s])
        rank_F = np.where(tested_F, np.abs(half_F), 0)
        top = np.argsort(-rank_F, kind="stable")[:top_k]
        hits_F[top] += (rank_F[top] > 0) & (np.sign(half_F[top]) == np.sign(effect_F[top]))
    return hits_F / sums.halves


def _check_mixed(n_mixed: int, n_questions: int, n_responses: int, classes: set[bool]) -> None:
    if n_responses == 0:
        raise InputError("responses: there are none to contrast")
    if len(classes) == 1:
        word = "right" if True in classes else "wrong"
        raise InputError(
            f"correct: all {n_responses} answers are {word}, a contrast needs right and wrong answers; "
            f"use {'harder' if word == 'right' else 'easier'} questions"
        )
    if n_mixed < 2:
        raise InputError(
            f"correct: only {n_mixed} of {n_questions} questions have both right and wrong answers, a contrast needs "
            "at least 2; use more questions, more answers a question or another difficulty"
        )
