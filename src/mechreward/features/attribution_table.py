"""Discovery by attribution: features ranked by what they do for a target, on average over questions.

A feature's attributions (`attribution`) are averaged over the answers to a question, then over questions. One pass over
the answers with a target, and a forward to the SAE's block over all for the scale; in memory are [batch_size, F]
and [halves, F] numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mechreward.errors import InputError
from mechreward.features.attribution import STEPS, AttributionBatch, Method, iter_attributions
from mechreward.features.contrast import ContrastTable, q_values, ranked
from mechreward.features.means import QuestionMeans, varies
from mechreward.features.mixed import Array, Bools
from mechreward.features.nodes import Places
from mechreward.features.pooling import pooled_activations
from mechreward.features.targets import Target
from mechreward.models import LoadedModel
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE


def attribution_table(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target | None],
    *,
    method: Method = "gradient",
    steps: int = STEPS,
    places: Places = "completion",
    min_support: float = 0.05,
    top_k: int = 50,
    halves: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    on_batch: Callable[[int], object] = lambda _: None,
) -> ContrastTable:
    """One row a feature, largest |effect| first; `n_questions` counts those with a target.

    Columns: id; effect, the mean attribution in the units of the target (nats or logits: positive features push it up);
    d, the mean over questions divided by its standard deviation over them; p_value, one-sample t of question means;
    q_value (Benjamini and Hochberg); stability as in `contrast`; support, share of answers in which the feature fires;
    scale, standard deviation within a question of its mean activation, over all responses, those
    without a target too: a reward tells answers to a question apart, and right ones alone can be all the same.

    Args:
        targets: one a response; a response whose target is None is left out.
        min_support: features that fire in a smaller share of answers, or as much in every answer to a question, are not
            tested: q is 1, stability 0.

    Raises:
        InputError: as `iter_attributions`, if fewer than two questions are left, or none with two answers.
    """
    if len(responses) != len(targets):
        raise InputError(f"targets: {len(targets)} for {len(responses)} responses; give one each")
    kept = [(response, target) for response, target in zip(responses, targets, strict=True) if target is not None]
    place: dict[str, int] = {}
    for response, _ in kept:
        place.setdefault(response.question_id, len(place))
    kept.sort(key=lambda pair: place[pair[0].question_id])
    if len(place) < 2 or len(kept) == len(place):
        raise InputError(
            f"targets: {len(kept)} answers to {len(place)} questions have one; there must be at least 2 questions, and "
            "one of them with 2 answers"
        )
    sums = _Sums(sae.d_sae, halves, seed)
    stream = iter_attributions(
        loaded, sae, [response for response, _ in kept], [target for _, target in kept],
        method=method, steps=steps, places=places, batch_size=batch_size,
    )  # fmt: skip
    for batch in stream:
        sums.add(batch, [kept[row][0].question_id for row in batch.rows])
        on_batch(len(batch.rows))
    sums.close()
    frame = _frame(sums, *_scales(loaded, sae, responses), min_support, top_k)
    return ContrastTable(
        frame, len(place), len(place), len(kept), "attribution", pooling="mean",
        prompts=prompt_hashes(r.prompt_ids for r in responses),
    )  # fmt: skip


class _Sums:
    """Running sums over answers that come question by question."""

    def __init__(self, n_features: int, halves: int, seed: int) -> None:
        self.means = QuestionMeans(n_features, halves, seed)
        self.fires_F = np.zeros(n_features)
        self.n = 0
        self._open = ""
        self._attr: list[Array] = []

    def add(self, batch: AttributionBatch, questions: list[str]) -> None:
        self.fires_F += batch.fires_BF.sum(0).cpu().numpy()
        self.n += len(questions)
        for question, attr_F in zip(questions, batch.attr_BF.double().cpu().numpy(), strict=True):
            if question != self._open:
                self.close()
            self._open = question
            self._attr.append(attr_F)

    def close(self) -> None:
        """Adds the question whose answers have all come by."""
        if self._attr:
            self.means.add(np.mean(self._attr, axis=0))
        self._attr = []


def _scales(loaded: LoadedModel, sae: SAE, responses: Sequence[Response]) -> tuple[Array, Bools]:
    """Standard deviation within a question of each feature's mean activation, and whether it is more than rounding."""
    spread_F, total_F, n, n_questions = np.zeros(sae.d_sae), np.zeros(sae.d_sae), 0, 0
    for batch in pooled_activations(loaded, sae, responses, "mean"):
        acts_BF, questions = batch.acts_BF.double().numpy(), np.array(batch.question_ids)
        for question in dict.fromkeys(batch.question_ids):
            acts_GF = acts_BF[questions == question]
            spread_F += np.var(acts_GF, axis=0) * len(acts_GF)
            n_questions += 1
        total_F += acts_BF.sum(0)
        n += len(acts_BF)
    scale_F = np.sqrt(spread_F / (n - n_questions))
    return scale_F, varies(scale_F, total_F / n)


def _frame(sums: _Sums, scale_F: Array, varies_F: Bools, min_support: float, top_k: int) -> pd.DataFrame:
    means, support_F = sums.means, sums.fires_F / sums.n
    tested_F = (support_F >= min_support) & varies_F
    deviation_F = np.sqrt(means.square_F / (means.n - 1))
    p_F = means.p_values()
    return ranked(
        pd.DataFrame(
            {
                "id": np.arange(len(p_F)),
                "effect": means.mean_F,
                "d": np.divide(means.mean_F, deviation_F, out=np.zeros_like(p_F), where=deviation_F > 0),
                "p_value": p_F,
                "q_value": q_values(p_F, tested_F),
                "stability": means.stability(tested_F, top_k),
                "support": support_F,
                "scale": scale_F,
            }
        )
    )
