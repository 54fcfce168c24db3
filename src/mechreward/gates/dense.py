"""Rivals that read the same states as the reward, without its features: what an SAE has to add to be worth its name.

- `raw direction`: the pack as one direction, the sum of its decoder rows by weight over scale, on the pooled states;
- `DiffMean`: mean state of right answers less that of wrong ones (Marks and Tegmark 2023), cross-fitted by question;
- `dense probe`: logistic regression on the states (that of the layer sweep), cross-fitted by question;
- `random-weight SAE`: an SAE of the same shape whose encoder is noise, columns of the trained one's lengths, with the
  pack's weights on features that fire as often.

They are reported and decide nothing: a reward may be worth training on where a probe does as well. Beating them is
needed for one claim only, that sparse features read more than a dense direction does. Two of them are fitted on the
judged questions (cross-fitted), which the pack is not, so the comparison leans their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mechreward.features import FeaturePack, PackFeature, sae_ref
from mechreward.features.crossfit import dense_probe_scores, direction_scores
from mechreward.features.pooling import pooled_activations
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.sae import SAE

Array = NDArray[np.float64]
FREQUENCY_SAMPLE = 256
"""Responses on which the random-weight SAE's firing frequencies are taken."""


def dense_rivals(
    pack: FeaturePack,
    sae: SAE,
    states_ND: Array,
    right_N: NDArray[np.bool_],
    questions: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Array]:
    """Scores by name from states [N, D], pooled as the reward pools."""
    return {
        "raw direction": states_ND @ raw_direction(pack, sae),
        "DiffMean": direction_scores(states_ND, right_N, questions, seed=seed),
        "dense probe": dense_probe_scores(states_ND, right_N, questions, seed=seed),
    }


def raw_direction(pack: FeaturePack, sae: SAE) -> Array:
    """[D]: sum of weight / scale times decoder row."""
    weight_K = torch.tensor([feature.weight / feature.scale for feature in pack.features])
    rows_KD = sae.W_dec_FD[pack.feature_ids()].detach().float().cpu()
    return np.asarray((weight_K[:, None] * rows_KD).sum(0).double().numpy())


def random_weight_sae(sae: SAE, *, seed: int = 0) -> SAE:
    """The same shape, kind and biases; encoder columns are noise of the trained ones' lengths, decoder rows follow."""
    generator = torch.Generator().manual_seed(seed)
    noise_DF = torch.randn(sae.W_enc_DF.shape, generator=generator)
    unit_DF = noise_DF / noise_DF.norm(dim=0, keepdim=True)
    lengths_F = sae.W_enc_DF.detach().float().norm(dim=0).cpu()
    made = replace(sae.to("cpu"), W_enc_DF=unit_DF * lengths_F, W_dec_FD=unit_DF.T.contiguous(), frequency_F=None)
    return made.to(sae.device)


def matched_pack(
    pack: FeaturePack, sae: SAE, noise: SAE, responses: Sequence[Response], loaded: LoadedModel, *, seed: int = 0
) -> FeaturePack | None:
    """The pack's weights on features of `noise` that fire in as many responses; each at its own standard deviation.

    Frequencies are those on the first `FREQUENCY_SAMPLE` responses. None if too few features of `noise` vary there.
    """
    sample = list(responses[:FREQUENCY_SAMPLE])
    own_F, _ = _support(sae, sample, loaded, pack.pooling)
    support_F, spread_F = _support(noise, sample, loaded, pack.pooling)
    left = np.flatnonzero(spread_F > 0)
    if len(left) < len(pack.features):
        return None
    features, order = [], np.random.default_rng(seed).permutation(len(left))
    left = left[order]  # Of features equally near the first in this order is taken.
    for feature in pack.features:
        at = int(np.abs(support_F[left] - own_F[feature.id]).argmin())
        drawn, left = int(left[at]), np.delete(left, at)
        features.append(PackFeature(id=drawn, weight=feature.weight, scale=float(spread_F[drawn])))
    return FeaturePack(
        name="random-weights",
        model_name=pack.model_name,
        sae=sae_ref(noise),
        features=features,
        pooling=pack.pooling,
    )


def _support(sae: SAE, responses: Sequence[Response], loaded: LoadedModel, pooling: str) -> tuple[Array, Array]:
    """Share of the responses in which each feature fires [F], and its standard deviation over them [F]."""
    n, fires_F, sum_F, square_F = 0, np.zeros(sae.d_sae), np.zeros(sae.d_sae), np.zeros(sae.d_sae)
    for batch in pooled_activations(loaded, sae, responses, pooling):
        acts_BF = batch.acts_BF.double().numpy()
        n += len(acts_BF)
        fires_F, sum_F = fires_F + (acts_BF > 0).sum(0), sum_F + acts_BF.sum(0)
        square_F = square_F + (acts_BF**2).sum(0)
    return fires_F / n, np.sqrt(np.maximum(square_F / n - (sum_F / n) ** 2, 0))
