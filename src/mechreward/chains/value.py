"""Critical tokens at the price of one reading: where a probe of the residual stream expects less than a token before.

A logistic probe of the state after block L, V(h_t), is trained to tell at every token whether the response will be
right; outcomes are its only labels. The fall of a token is V(h_(t-1)) - V(h_t), for the first token from the state
after the prompt, and the token with the largest fall is the critical one. No paper: it is the value function of RL with
the policy's own frozen states as its features. It sees what the probe can read: a mistake whose trace the states lose
is forgotten, and V rises again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_residuals
from mechreward.rollout import Response

MAX_TOKENS = 50_000
"""Tokens the probe is fitted on, at most; drawn evenly from all."""


@dataclass(frozen=True)
class ValueProbe:
    """A fitted probe and the block it reads."""

    layer: int
    classifier: Any

    def falls(self, loaded: LoadedModel, responses: Sequence[Response], batch_size: int = 32) -> list[list[float]]:
        """How far the expected chance of a right answer falls at each completion token; one list a response.

        Raises:
            InputError: as `iter_residuals`, or for an empty prompt.
        """
        states = _read_states(loaded, responses, self.layer, batch_size)
        return [(-np.diff(self.classifier.predict_proba(h_TD)[:, 1])).tolist() for h_TD in states]


def fit_value(
    loaded: LoadedModel,
    responses: Sequence[Response],
    layer: int,
    *,
    penalty: float = 20.0,
    batch_size: int = 32,
    seed: int = 0,
) -> ValueProbe:
    """Fits V on verified responses; give others to `falls`.

    Args:
        layer: block whose output is read, from 0.
        penalty: 1 / C of the logistic regression, on standardised states.

    Raises:
        InputError: if a response is not verified, all are right or all wrong, or the penalty is no positive number; as
            `iter_residuals`.
    """
    if not 0 < penalty < inf:
        raise InputError(f"penalty: {penalty} is not allowed; it must be above 0, and finite")
    judged = {r.correct for r in responses}
    if judged != {True, False}:
        kinds = ", ".join(sorted(map(str, judged))) or "nothing"
        raise InputError(f"responses: their verdicts are {kinds}; a value needs right and wrong ones, all verified")
    states = _read_states(loaded, responses, layer, batch_size)
    h_ND = np.concatenate(states)
    right_N = np.concatenate([np.full(len(h_TD), r.correct) for h_TD, r in zip(states, responses, strict=True)])
    if len(h_ND) > MAX_TOKENS:
        kept = np.random.default_rng(seed).choice(len(h_ND), MAX_TOKENS, replace=False)
        h_ND, right_N = h_ND[kept], right_N[kept]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=500))
    return ValueProbe(layer, classifier.fit(h_ND, right_N))


def _read_states(
    loaded: LoadedModel, responses: Sequence[Response], layer: int, batch_size: int
) -> list[NDArray[np.float32]]:
    """States after the prompt and after each completion token, [1 + T, D] a response."""
    bare = next((r.question_id for r in responses if not r.prompt_ids), None)
    if bare is not None:
        raise InputError(f"responses: one to {bare} has an empty prompt; its first token would have no state before it")
    # The prompt's last token is read as if the completion began with it.
    prompts = [list(r.prompt_ids[:-1]) for r in responses]
    completions = [[r.prompt_ids[-1], *r.completion_ids] for r in responses]
    states: list[Any] = [None] * len(responses)
    for batch in iter_residuals(loaded.model, prompts, completions, layer, batch_size):
        for row, h_TD, mask_T in zip(batch.rows, batch.h_BTD, batch.mask_BT, strict=True):
            states[row] = h_TD[mask_T].cpu().numpy()
    return states
