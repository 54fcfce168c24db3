"""How strong a feature fires: the units that strengths are given in, measured on a model's own responses.

One unit of a feature is the 99th percentile of its activation *on the tokens where it fires*: over all tokens it would
be 0 for every feature that fires on less than 1 % of them. Tokens of massive norm are left out. Held in memory: the
activations that are not zero, L0 numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_residuals, norm_outliers
from mechreward.rollout import Response
from mechreward.sae import SAE

TOKENS = 1024
"""Tokens encoded at once."""
MASSIVE = 10.0
"""Norms above so many times the median are massive, as in `models.norm_outliers`."""


@dataclass(frozen=True, eq=False)
class Scales:
    """Units of one SAE's features on one model."""

    p99_F: NDArray[Any]
    """In the SAE's own units; NaN for a feature that never fired."""
    mean_F: NDArray[Any]
    """Mean over all tokens."""
    norm: float
    """Median norm of the residuals."""
    n_tokens: int
    weights_hash: str
    """Of the SAE they belong to."""

    @property
    def norm_limit(self) -> float:
        """Tokens of larger norm are left alone by every edit."""
        return MASSIVE * self.norm

    def unit(self, feature: int) -> float:
        """Size of one unit of a feature.

        Raises:
            InputError: if the feature never fired.
        """
        size = float(self.p99_F[feature])
        if not size > 0:
            raise InputError(
                f"feature: {feature} fired on none of the {self.n_tokens} tokens calibrated on, so it has no unit; "
                'give its strength with unit="raw"'
            )
        return size


def measure_scales(loaded: LoadedModel, sae: SAE, responses: Sequence[Response], batch_size: int = 32) -> Scales:
    """Reads the completion tokens of some responses, unedited.

    Raises:
        InputError: as `models.iter_residuals`, and if there is no response.
    """
    if not responses:
        raise InputError("responses: there are none to calibrate on; give at least one")
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    ids: list[NDArray[np.int64]] = []
    values: list[NDArray[np.float32]] = []
    norms: list[NDArray[np.float32]] = []
    for batch in iter_residuals(loaded.model, prompts, completions, sae.meta.layer, batch_size):
        h_ND = batch.h_BTD[norm_outliers(batch.h_BTD, batch.mask_BT)]
        norms.append(h_ND.norm(dim=-1).cpu().numpy())
        for piece_ND in h_ND.split(TOKENS):
            acts_NF = sae.encode(piece_ND)
            fired_NF = acts_NF > 0
            ids.append(fired_NF.nonzero()[:, 1].cpu().numpy())
            values.append(acts_NF[fired_NF].cpu().numpy())
    n_tokens = sum(map(len, norms))
    fired = pd.Series(np.concatenate(values).astype(np.float64)).groupby(np.concatenate(ids))
    every = range(sae.d_sae)
    return Scales(
        p99_F=fired.quantile(0.99).reindex(every).to_numpy(np.float64),
        mean_F=(fired.sum() / n_tokens).reindex(every, fill_value=0.0).to_numpy(np.float64),
        norm=float(np.median(np.concatenate(norms))),
        n_tokens=n_tokens,
        weights_hash=sae.weights_hash,
    )
