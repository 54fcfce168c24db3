"""Which features differ between right and wrong answers *to the same question*, in one pass and O(F) memory.

For every feature, on x = log(1 + pooled activation) and with each question's mean taken off both x and the label (the
"within" or fixed-effects estimator), because GRPO's group baseline removes whatever tells only questions apart:

- difference: slope of x on the label, i.e. right minus wrong, questions weighted by right * wrong / answers;
- effect: Cohen's d, the difference over the standard deviation within question and class;
- p_value: the larger of two tests' of the slope (`slopes`), t with standard errors clustered by question and the slope
  against its spread over label shuffles, and never below the least p that the answers allow (`floors`). A plain Welch
  test on the centred values would count the centring's lost degrees of freedom as data: with two answers a question its
  t is sqrt(2) too large. q_value: Benjamini and Hochberg (1995) over the tested features;
- auroc, rank_z, rank_p_value, rank_q_value: Mann-Whitney within questions (`ranks`), with the same least p, and its q
  values the same way;
- family_p_value: chance that, with labels shuffled within questions, any feature has so large an |effect| (`shuffles`);
- welch_t, welch_p_value: the plain test over all answers, for comparison (`classes`);
- stability: share of half-samples of questions in which the feature is among the `top_k` of largest |effect| of the
  same sign (`halves`);
- support, support_correct, support_wrong: share of answers in which the feature fires at all; scale: standard deviation
  within a question of the pooled activation, so that activation / scale is in comparable units for every feature.

Held in memory: some twenty F-vectors, two [halves, F] sums and one [permutations, F] sum; never all answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from statsmodels.stats.multitest import multipletests

from mechreward.errors import InputError
from mechreward.features.classes import ClassSums
from mechreward.features.floors import LeastP
from mechreward.features.halves import HalfSums
from mechreward.features.mixed import Array, Block, Bools, MixedQuestions
from mechreward.features.pooling import PooledBatch
from mechreward.features.ranks import RankSums
from mechreward.features.shuffles import LabelShuffles, family_p_values
from mechreward.features.slopes import SlopeSums, within
from mechreward.files import atomic_path

CONTRAST = "contrast"
"""The method whose `effect` is Cohen's d."""
FAMILY_LEVEL = 0.05
"""Share of shuffles in which some feature exceeds `ContrastTable.chance_effect`."""
SINCE = {"pooling", "prompts"}
"""What tables that were saved before it was kept do not say."""


@dataclass(frozen=True)
class ContrastTable:
    """One row a feature, largest |effect| first.

    Columns: id, effect, difference, p_value, q_value, auroc, rank_z, rank_p_value, rank_q_value, family_p_value,
    welch_t, welch_p_value, stability, support, support_correct, support_wrong, scale. Features below the minimum
    support are not tested: q, rank q and family-wise p are 1. A feature that is constant within every question has
    effect 0, auroc .5, p 1 and scale 0.
    """

    frame: pd.DataFrame
    n_questions: int
    n_mixed: int
    n_responses: int
    """Responses to mixed questions: the ones the statistics rest on."""
    method: str = CONTRAST
    """What `effect` and `stability` are: `contrast`, or another discoverer's."""
    chance_effect: float = nan
    """|d| that the largest of all tested features exceeds in 5 % of label shuffles; NaN without shuffles."""
    pooling: str | None = None
    """How activations were pooled, for the tests and for `scale`; None if whoever made the table did not say."""
    prompts: tuple[str, ...] = ()
    """`prompt_hashes` of the questions it was made from; empty if whoever made it did not say."""


def contrast(
    batches: Iterable[PooledBatch],
    *,
    min_support: float = 0.05,
    min_each: int = 0,
    top_k: int = 50,
    halves: int = 50,
    permutations: int = 200,
    seed: int = 0,
) -> ContrastTable:
    """Streams batches of whole questions; see the module's docstring for the statistics.

    Args:
        min_support: least share of answers (right and wrong together, so that the label has no say) in which a feature
            must fire to be tested.
        min_each: least number of right and also of wrong answers in which it must fire. 0 lets in features that fire in
            one class alone, which can be the best there are.
        top_k: how many features of a half-sample count as found.
        halves: number of half-samples, even.
        permutations: label shuffles; 0 leaves them out.
        seed: of the half-samples and the shuffles.

    Raises:
        InputError: if a question comes in two batches, an activation is not finite, there is nothing to contrast, or an
            argument is out of its range.
    """
    _check_arguments(min_support, min_each, top_k)
    mixed, sums = MixedQuestions(), _Sums(halves, permutations, seed)
    for block in mixed.blocks(batches):
        sums.add(block)
    mixed.check()
    slopes, classes = sums.slopes, sums.classes
    tested_F = (classes.support_F >= min_support) & (classes.fires_2F.min(0) >= min_each)
    largest_P = sums.shuffles.largest(slopes, tested_F)
    frame = _frame(sums, tested_F, top_k, family_p_values(slopes.effect_F, largest_P, tested_F))
    chance = float(np.quantile(largest_P, 1 - FAMILY_LEVEL, method="higher")) if len(largest_P) else nan
    return ContrastTable(frame, len(mixed.questions), mixed.n_mixed, slopes.n_answers, chance_effect=chance)


def save_contrast(table: ContrastTable, path: str | Path) -> None:
    """Writes the table as Parquet, atomically; what it says besides travels in the file's metadata."""
    frame = table.frame.copy()
    frame.attrs = {name: value for name, value in vars(table).items() if name != "frame"}
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary)


def load_contrast(path: str | Path) -> ContrastTable:
    """Reads what `save_contrast` wrote.

    Raises:
        InputError: if there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise InputError(f"features: there is no file {path}")
    try:
        frame = pd.read_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"features: {path} is not a whole Parquet file; write it with save_contrast") from error
    said = {str(name): value for name, value in frame.attrs.items()}
    known = ContrastTable.__dataclass_fields__.keys() - {"frame"}
    if not known - SINCE <= said.keys() <= known:
        raise InputError(f"features: {path} is not a table as save_contrast writes it; discover anew")
    return ContrastTable(frame, **said | {"prompts": tuple(said.get("prompts", ()))})


class _Sums:
    """All running sums; made when the first block tells how many features there are."""

    def __init__(self, halves: int, permutations: int, seed: int) -> None:
        self._options = (halves, permutations, seed)
        self._make(0)

    def _make(self, n_features: int) -> None:
        halves, permutations, seed = self._options
        self.slopes, self.ranks = SlopeSums(n_features), RankSums(n_features)
        self.classes, self.floors = ClassSums(n_features), LeastP(n_features)
        self.halves = HalfSums(n_features, halves, seed)
        self.shuffles = LabelShuffles(n_features, permutations, seed)

    def add(self, block: Block) -> None:
        if not self.slopes.n_questions:
            self._make(block.n_features)
        x_BL, *sums = within(block)
        self.slopes.add(block, *sums)
        self.halves.add(block, *sums)
        self.ranks.add(block)
        self.floors.add(block)
        self.classes.add(block)
        self.shuffles.add(block, x_BL)


def _frame(sums: _Sums, tested_F: Bools, top_k: int, family_p_F: Array) -> pd.DataFrame:
    slopes, ranks, classes = sums.slopes, sums.ranks, sums.classes
    least_F, effect_F = sums.floors.least_F, slopes.effect_F
    p_F, rank_p_F = np.maximum(slopes.p_values(), least_F), np.maximum(ranks.p_values(), least_F)
    welch_t_F, welch_p_F = classes.welch()
    wrong_F, right_F = classes.support_2F
    frame = pd.DataFrame(
        {
            "id": np.arange(len(p_F)),
            "effect": effect_F,
            "difference": slopes.difference_F,
            "p_value": p_F,
            "q_value": q_values(p_F, tested_F),
            "auroc": ranks.auroc_F,
            "rank_z": ranks.z_F,
            "rank_p_value": rank_p_F,
            "rank_q_value": q_values(rank_p_F, tested_F),
            "family_p_value": family_p_F,
            "welch_t": welch_t_F,
            "welch_p_value": welch_p_F,
            "stability": sums.halves.stability(effect_F, tested_F, top_k),
            "support": classes.support_F,
            "support_correct": right_F,
            "support_wrong": wrong_F,
            "scale": slopes.scale_F,
        }
    )
    return ranked(frame)


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by |effect|, largest first; of equal ones the lowest id."""
    return frame.iloc[np.lexsort((frame["id"], -frame["effect"].abs()))].reset_index(drop=True)


def q_values(p_F: Array, tested_F: Bools) -> Array:
    """Benjamini and Hochberg's over the tested features; 1 for the others."""
    q_F = np.ones_like(p_F)
    if tested_F.any():
        q_F[tested_F] = multipletests(p_F[tested_F], method="fdr_bh")[1]
    return q_F


def _check_arguments(min_support: float, min_each: int, top_k: int) -> None:
    if not 0 <= min_support <= 1:
        raise InputError(f"min_support: {min_support} is not allowed, it must be a share from 0 to 1")
    if min_each < 0:
        raise InputError(f"min_each: {min_each} is not allowed, it must be at least 0")
    if top_k < 1:
        raise InputError(f"top_k: {top_k} is not allowed, it must be at least 1")
