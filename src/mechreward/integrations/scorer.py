"""Rows in, scores out: what a reward server does with its model, without the network.

Each row is read once: its token rewards and its trajectory reward are the same forward's. With a verifier the score is

    bounded   outcome + bounded(weight * features, 1)    no wrong answer outranks a right one (`reward.composite`)
    sum       outcome + weight * features

and `weight * features` without one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.integrations.protocol import Row, Score, Spec, tokenizer_hash
from mechreward.models.residuals import check_rows
from mechreward.reward import FeatureReward, NoopNormalization, OutcomeReward, pool
from mechreward.reward.batch import Text, check_text_only, token_ids
from mechreward.reward.composite import bounded
from mechreward.reward.feature_reward import read_tokens
from mechreward.verifiers import Verifier

MODES = ("bounded", "sum")


@dataclass(frozen=True)
class Reading:
    """A row that was checked: what the model reads and what the verifier is shown."""

    prompt_ids: list[int]
    completion_ids: list[int]
    prompt: Text
    completion: str
    answer: str | int | float | None


class Scorer:
    """A feature reward, the model that reads for it, and perhaps a verifier.

    Args:
        reward: its normalization has to be noop: a score may not depend on which rows came together.
        model: frozen; read in evaluation mode.
        tokenizer: the policy's.
        verifier: `(prompt, completion, answer) -> Verdict`; None scores features alone.
        mode: how outcome and features are combined.
        weight: of the features, over 0.
        batch_size: rows a forward.
        model_name: what `spec` calls the model.
        verifier_name: what `spec` calls the verifier.

    Raises:
        InputError: if model and reward do not belong together, or an option is not allowed.
    """

    def __init__(
        self,
        reward: FeatureReward,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        verifier: Verifier | None = None,
        mode: str = "bounded",
        weight: float = 1.0,
        batch_size: int = 32,
        model_name: str = "",
        verifier_name: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
        if not 0 < weight < math.inf:
            raise InputError(f"weight: {weight} is not allowed; it must be above 0")
        if not isinstance(reward.normalization, NoopNormalization):
            raise InputError("normalization: a score may not depend on which rows came together; a server takes noop")
        reward.bind(model, tokenizer)
        self.reward, self.batch_size = reward, batch_size
        self._model, self._tokenizer = model, tokenizer
        self._outcome = None if verifier is None else OutcomeReward(verifier)
        self._mode, self._weight = mode, weight
        self._names = model_name or reward.pack.model_name or "", verifier_name
        self.tokenizer_hash = tokenizer_hash(tokenizer)

    def spec(self, max_rows: int) -> Spec:
        """What it scores with, for clients to look at."""
        return Spec(
            name=self.reward.pack.name,
            model=self._names[0],
            layer=self.reward.layer,
            feature_ids=self.reward.feature_ids(),
            aggregation=self.reward.aggregation,
            spec_hash=self.reward.spec_hash,
            tokenizer_hash=self.tokenizer_hash,
            gate_passed=self.reward.gate_passed,
            verifier=None if self._outcome is None else self._names[1] or "verifier",
            mode=self._mode,
            weight=self._weight,
            max_rows=max_rows,
        )

    def read(self, rows: Sequence[Row]) -> list[Reading]:
        """Ids and texts of rows, checked before they join others in a forward.

        Raises:
            InputError: naming the first row that is too long, holds ids that the model does not know, has no gold
                answer though there is a verifier, or is no text.
        """
        readings = [self._reading(row) for row in rows]
        filled = [reading for reading in readings if reading.completion_ids]
        if filled:
            check_rows(self._model, [r.prompt_ids for r in filled], [r.completion_ids for r in filled], self.batch_size)
        missing = [place for place, row in enumerate(rows) if row.answer is None]
        if self._outcome is not None and missing:
            raise InputError(f"answer: row {missing[0]} has none, and the server verifies answers")
        return readings

    def score(self, readings: Sequence[Reading]) -> list[Score]:
        """Scores in the readings' order; one forward for every `batch_size` of them."""
        prompt_ids, completion_ids = [r.prompt_ids for r in readings], [r.completion_ids for r in readings]
        [(reward_BT, readable_BT)] = read_tokens(
            [self.reward], self._model, prompt_ids, completion_ids, self.batch_size
        )
        ends_BT = self.reward.step_ends(self._tokenizer, completion_ids)
        pooled = pool(reward_BT, readable_BT, self.reward.aggregation, ends_BT).tolist()
        features = [None if math.isnan(value) else value for value in pooled]
        outcomes = self._outcomes(readings)
        return [
            Score(
                score=self._combined(outcome, feature),
                outcome=outcome,
                features=feature,
                token_rewards=[
                    value if readable else None for value, readable, _ in zip(values, readables, ids, strict=False)
                ],
            )
            for outcome, feature, values, readables, ids in zip(
                outcomes, features, reward_BT.tolist(), readable_BT.tolist(), completion_ids, strict=True
            )
        ]

    def _reading(self, row: Row) -> Reading:
        if row.prompt_ids is not None and row.completion_ids is not None:
            prompt = row.prompt if row.prompt is not None else self._decode(row.prompt_ids)
            return Reading(row.prompt_ids, row.completion_ids, prompt, self._decode(row.completion_ids), row.answer)
        assert row.prompt is not None and row.completion is not None
        check_text_only([row.prompt])
        [prompt_ids], [completion_ids] = token_ids(self._tokenizer, [row.prompt], [row.completion], None)
        return Reading(prompt_ids, completion_ids, row.prompt, row.completion, row.answer)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _outcomes(self, readings: Sequence[Reading]) -> list[float | None]:
        if self._outcome is None:
            return [None] * len(readings)
        answers: list[Any] = [r.answer for r in readings]
        return self._outcome([r.prompt for r in readings], [r.completion for r in readings], answer=answers)

    def _combined(self, outcome: float | None, feature: float | None) -> float | None:
        if feature is None or (outcome is None and self._outcome is not None):
            return None
        dense = self._weight * feature
        if outcome is None:
            return dense
        return outcome + (bounded(dense, 1.0) if self._mode == "bounded" else dense)
