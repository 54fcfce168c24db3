"""Discovery over a model's verified responses: one pass, a ranked table, and what dense readings make of them.

Only questions with right and wrong answers are read at all. `explore` puts three scores beside the table, each of
answers to questions that had no say in it: the features, chosen and weighted anew in every fold by the very procedure
that made the table; the difference-of-means direction; and a logistic probe of the residual (`crossfit`). What their
within-question AUROCs are, with intervals, `gates.equivalents` says. For these and for the probe the pooled activations
are kept, sparse; `discover` by contrast keeps sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mechreward.errors import InputError
from mechreward.features.aggregation import build_aggregation, pooling_spec
from mechreward.features.contrast import ContrastTable, contrast
from mechreward.features.crossfit import Array, Places, cross_fitted, dense_probe_scores, direction_scores
from mechreward.features.mixed import Bools, check_mixed
from mechreward.features.pack import Pooling
from mechreward.features.pooling import PooledBatch, check_responses, pooled_activations
from mechreward.features.probe import probe
from mechreward.features.rows import PooledRows, RowCollector
from mechreward.features.selection import NoFeatures, Signs, select
from mechreward.models import LoadedModel
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE

METHODS = ("contrast", "probe")
CROSS_FIT = 3
"""Fewest mixed questions to cross-fit a contrast on: one held out, and two to contrast."""
FEATURES, DIRECTION, DENSE_PROBE = "SAE features", "difference of means", "logistic probe"


@dataclass(frozen=True, kw_only=True)
class Search:
    """How features are looked for.

    Raises:
        InputError: if there is no such method.
    """

    method: str = "contrast"
    pooling: Pooling = "mean"
    min_support: float = 0.05
    """Least share of answers in which a feature must fire to be tested."""
    min_each: int = 0
    """Least number of right and also of wrong answers in which it must fire."""
    top_k: int = 50
    """How many features of a half-sample count as found (contrast)."""
    halves: int = 50
    """Half-samples of questions, even."""
    permutations: int = 200
    """Label shuffles; 0 leaves them out."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method: {self.method!r} is not one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of answers to mixed questions by fits that had not seen their question, by name."""

    questions: list[str]
    right_N: Bools
    scores: dict[str, Array] = field(default_factory=dict)
    n_empty: int = 0
    """Answers in folds in which no feature passed the selection; their score by features is 0."""


def discover(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    *,
    method: str = "contrast",
    pooling: Pooling = "mean",
    positions: Sequence[Sequence[int]] | None = None,
    min_support: float = 0.05,
    min_each: int = 0,
    top_k: int = 50,
    halves: int = 50,
    permutations: int = 200,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], object] = lambda _: None,
) -> ContrastTable:
    """The ranked table of all features; arguments as `Search` and `pooled_activations` explain them.

    Raises:
        InputError: if the answers are all right or all wrong, fewer than two questions have both, a completion has no
            tokens, a residual is not finite, or an argument is out of its range.
    """
    search = Search(
        method=method,
        pooling=pooling,
        min_support=min_support,
        min_each=min_each,
        top_k=top_k,
        halves=halves,
        permutations=permutations,
        seed=seed,
    )
    batches, n_questions = read_mixed(loaded, sae, responses, search, positions, False, batch_size, on_batch)
    if method == "contrast":
        return _told(_contrast(batches, search), responses, n_questions)
    collector = RowCollector()
    table = _contrast(collector.through(batches), search)
    return _told(_probe(collector.rows(), table, search), responses, n_questions)


def explore(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    search: Search,
    *,
    positions: Sequence[Sequence[int]] | None = None,
    n_features: int = 20,
    q_max: float = 0.05,
    min_stability: float = 0.8,
    signs: Signs = "any",
    batch_size: int = 32,
    on_batch: Callable[[int], object] = lambda _: None,
) -> tuple[ContrastTable, HeldOutScores]:
    """As `discover`, with cross-fitted scores of the same answers by features and by dense readings.

    Args:
        n_features, q_max, min_stability, signs: the selection, as in `build_pack`.

    Raises:
        InputError: as `discover`, and if fewer than `CROSS_FIT` questions have right and wrong answers.
    """
    collector = RowCollector()
    batches, n_questions = read_mixed(loaded, sae, responses, search, positions, True, batch_size, on_batch)
    table = _contrast(collector.through(batches), search)
    rows = collector.rows()
    if search.method == "probe":
        table = _probe(rows, table, search)
    held_out = held_out_scores(
        rows, search, n_features=n_features, q_max=q_max, min_stability=min_stability, signs=signs
    )
    return _told(table, responses, n_questions), held_out


def held_out_scores(
    rows: PooledRows,
    search: Search,
    *,
    n_features: int = 20,
    q_max: float = 0.05,
    min_stability: float = 0.8,
    signs: Signs = "any",
) -> HeldOutScores:
    """Cross-fitted by question: the features that `search` and the selection choose, and the dense readings.

    The weighted sum is a pack's: each feature's pooled activation over its scale, times its weight.
    """
    n_empty = 0

    def score(train: Places, test: Places) -> Array:
        nonlocal n_empty
        table = _contrast(rows.batches(train), replace(search, permutations=0))
        if search.method == "probe":
            table = _probe(rows.part(train), table, search)
        try:
            chosen = select(table, n_features=n_features, q_max=q_max, min_stability=min_stability, signs=signs)
        except NoFeatures:
            n_empty += len(test)
            return np.zeros(len(test))
        acts_NK = rows.acts_NF[test][:, [feature.id for feature in chosen]]
        return np.asarray(acts_NK @ np.array([feature.weight / feature.scale for feature in chosen]))

    scores = {FEATURES: cross_fitted(score, rows.questions, seed=search.seed)}
    if rows.states_ND is not None:
        for name, read in ((DIRECTION, direction_scores), (DENSE_PROBE, dense_probe_scores)):
            scores[name] = read(rows.states_ND, rows.right_N, rows.questions, seed=search.seed)
    return HeldOutScores(rows.questions, rows.right_N, scores, n_empty)


def read_mixed(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    search: Search,
    positions: Sequence[Sequence[int]] | None,
    with_states: bool,
    batch_size: int,
    on_batch: Callable[[int], object],
) -> tuple[Iterator[PooledBatch], int]:
    """A stream of the answers to mixed questions, and how many questions there are in all."""
    check_responses(responses)
    seen: dict[str, set[bool | None]] = {}
    for response in responses:
        seen.setdefault(response.question_id, set()).add(response.correct)
    mixed = {question for question, labels in seen.items() if len(labels) == 2}
    classes = {label is True for labels in seen.values() for label in labels}
    check_mixed(len(mixed), len(seen), len(responses), classes, least=CROSS_FIT if with_states else 2)
    if positions is not None and len(positions) != len(responses):
        raise InputError(f"positions: {len(positions)} lists for {len(responses)} responses; give one each")
    kept = [place for place, response in enumerate(responses) if response.question_id in mixed]
    batches = pooled_activations(
        loaded,
        sae,
        [responses[place] for place in kept],
        search.pooling,
        positions=None if positions is None else [positions[place] for place in kept],
        with_states=with_states,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    return batches, len(seen)


def _told(table: ContrastTable, responses: Sequence[Response], n_questions: int) -> ContrastTable:
    """With the questions it was made from, those that are not mixed too."""
    return replace(table, n_questions=n_questions, prompts=prompt_hashes(r.prompt_ids for r in responses))


def _contrast(batches: Iterator[PooledBatch], search: Search) -> ContrastTable:
    table = contrast(
        batches,
        min_support=search.min_support,
        min_each=search.min_each,
        top_k=search.top_k,
        halves=search.halves,
        permutations=search.permutations,
        seed=search.seed,
    )
    return replace(table, pooling=pooling_spec(build_aggregation(search.pooling)))


def _probe(rows: PooledRows, table: ContrastTable, search: Search) -> ContrastTable:
    return probe(
        rows,
        table,
        min_support=search.min_support,
        min_each=search.min_each,
        halves=search.halves,
        seed=search.seed,
    )
