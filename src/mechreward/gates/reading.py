"""What a reward, and packs read the same way, say of each response: one truncated forward for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features import FeaturePack, weighted_sum
from mechreward.models import LoadedModel, ResidualBatch, iter_residuals
from mechreward.reward import FeatureReward
from mechreward.reward.aggregation import Aggregation, build_aggregation
from mechreward.rollout import Response
from mechreward.sae import SAE

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """Scores and pooled states of N responses."""

    judged_N: Array
    """The reward's own score."""
    packs_PN: Array
    """Each pack's, on the reward's SAE."""
    states_ND: Array
    """The states the reward reads, pooled as it pools."""
    noise_N: Array | None
    """Those of a pack on another SAE, if one was given."""


@torch.no_grad()
def read_scores(
    reward: FeatureReward,
    packs: Sequence[FeaturePack],
    responses: Sequence[Response],
    loaded: LoadedModel,
    *,
    noise: tuple[SAE, FeaturePack] | None = None,
    batch_size: int = 32,
) -> Readings:
    """What the reward and its rivals read, all over the same tokens and pooled the same way, in one forward.

    Args:
        packs: of the reward's own SAE.
        noise: another SAE of the same layer and width, and a pack of it.

    Raises:
        InputError: if a score is not finite.
    """
    n = len(responses)
    judged_N, packs_PN = torch.full((n,), torch.nan), torch.full((len(packs), n), torch.nan)
    states_ND, noise_N = torch.full((n, reward.sae.d_model), torch.nan), torch.full((n,), torch.nan)
    prompts = [list(response.prompt_ids) for response in responses]
    completions = [list(response.completion_ids) for response in responses]
    ends_NT = reward.step_ends(loaded.tokenizer, completions)
    pooling = build_aggregation(reward.pack.pooling)
    for batch in iter_residuals(loaded.model, prompts, completions, reward.layer, batch_size):
        ends_BT = None
        if ends_NT is not None:
            ends_BT = ends_NT[batch.rows, : batch.mask_BT.shape[1]].to(batch.mask_BT.device)
        judged_N[batch.rows] = reward.compute(batch.h_BTD, batch.mask_BT, ends_BT).cpu()
        readable_BT = reward.readable(batch.h_BTD, batch.mask_BT)
        states_ND[batch.rows] = pooling(batch.h_BTD, readable_BT, ends_BT).cpu()
        if packs:
            packs_PN[:, batch.rows] = _pack_scores(reward.sae, packs, batch, readable_BT, pooling, ends_BT).cpu()
        if noise is not None:
            sae, pack = noise
            noise_N[batch.rows] = _pack_scores(sae, [pack], batch, readable_BT, pooling, ends_BT)[0].cpu()
    bad = (~judged_N.isfinite()).nonzero()
    if len(bad):
        question = responses[int(bad[0])].question_id
        raise InputError(f"reward: its score of an answer to question {question} is not finite")
    of_noise = None if noise is None else _array(noise_N)
    return Readings(_array(judged_N), _array(packs_PN), _array(states_ND), of_noise)


def _array(values: Tensor) -> Array:
    return values.double().numpy()


def _pack_scores(
    sae: SAE,
    packs: Sequence[FeaturePack],
    batch: ResidualBatch,
    readable_BT: Tensor,
    pooling: Aggregation,
    step_end_BT: Tensor | None,
) -> Tensor:
    """[P, B]: the union of the packs' features is read once."""
    ids = sorted({i for pack in packs for i in pack.feature_ids()})
    acts_NK = sae.read(batch.h_BTD[readable_BT], ids)
    pooled = []
    for pack in packs:
        reward_BT = torch.zeros(readable_BT.shape, device=acts_NK.device)
        reward_BT[readable_BT] = weighted_sum(pack, acts_NK[:, [ids.index(i) for i in pack.feature_ids()]])
        pooled.append(pooling(reward_BT, readable_BT, step_end_BT))
    return torch.stack(pooled)
