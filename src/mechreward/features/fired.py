"""Which of a few features fire in each step of a response, and how strongly: what a reader of chains looks at.

The residuals are read by one teacher-forced forward, unedited. A step's number for a feature is its largest activation
over the step's tokens, in units of the size given for the feature (a pack's scale, or a 99th percentile). No paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechreward.chains import Step, decompose
from mechreward.models import LoadedModel, iter_residuals
from mechreward.sae import SAE

FIRES = 0.1
"""A feature counts as firing above so much of its size."""


@dataclass(frozen=True)
class FiredStep:
    """A step, and its features above `FIRES`, strongest first: (feature, largest activation in units of its size)."""

    step: Step
    fired: tuple[tuple[int, float], ...]


def fired_steps(
    loaded: LoadedModel,
    sae: SAE,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    sizes: Mapping[int, float],
) -> list[list[FiredStep]]:
    """Every response's steps with what fires in them.

    Args:
        prompt_ids, completion_ids: of each response, as sampled, EOS included.
        sizes: of each feature to read, in the SAE's own units.

    Raises:
        InputError: for a response without text, or as `iter_residuals` and `SAE.read`.
    """
    features = list(sizes)
    found: dict[int, list[FiredStep]] = {}
    for batch in iter_residuals(loaded.model, prompt_ids, completion_ids, sae.meta.layer):
        for row, h_TD in zip(batch.rows, batch.h_BTD, strict=True):
            acts_TK = sae.read(h_TD[: len(completion_ids[row])], features)
            steps = decompose(loaded.tokenizer, completion_ids[row])
            peaks = [acts_TK[step.token_start : step.token_end].amax(0).tolist() for step in steps]
            found[row] = [
                FiredStep(step, _strongest({f: peak / sizes[f] for f, peak in zip(features, row_K, strict=True)}))
                for step, row_K in zip(steps, peaks, strict=True)
            ]
    return [found[row] for row in range(len(completion_ids))]


def _strongest(values: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    firing = [(feature, value) for feature, value in values.items() if value > FIRES]
    return tuple(sorted(firing, key=lambda one: (-one[1], one[0])))
