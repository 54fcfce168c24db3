"""What a reward, and packs read the same way, say of each response: one truncated forward for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features import FeaturePack, weighted_sum
from mechreward.models import LoadedModel, ResidualBatch, iter_residuals
from mechreward.reward import FeatureReward
from mechreward.reward.aggregation import pool
from mechreward.rollout import Response

Array = NDArray[np.float64]


@torch.no_grad()
def read_scores(
    reward: FeatureReward,
    packs: Sequence[FeaturePack],
    responses: Sequence[Response],
    loaded: LoadedModel,
    *,
    batch_size: int = 32,
) -> tuple[Array, Array]:
    """The reward's own score of each response [N], and each pack's [P, N] read and pooled the same way, in one forward.

    Raises:
        InputError: if a score is not finite.
    """
    judged_N = torch.full((len(responses),), torch.nan)
    packs_PN = torch.full((len(packs), len(responses)), torch.nan)
    prompts = [list(response.prompt_ids) for response in responses]
    completions = [list(response.completion_ids) for response in responses]
    ends_NT = reward.step_ends(loaded.tokenizer, completions)
    for batch in iter_residuals(loaded.model, prompts, completions, reward.layer, batch_size):
        ends_BT = None
        if ends_NT is not None:
            ends_BT = ends_NT[batch.rows, : batch.mask_BT.shape[1]].to(batch.mask_BT.device)
        judged_N[batch.rows] = reward.compute(batch.h_BTD, batch.mask_BT, ends_BT).cpu()
        if packs:
            packs_PN[:, batch.rows] = _pack_scores(reward, packs, batch, ends_BT).cpu()
    bad = (~judged_N.isfinite()).nonzero()
    if len(bad):
        question = responses[int(bad[0])].question_id
        raise InputError(f"reward: its score of an answer to question {question} is not finite")
    return judged_N.double().numpy(), packs_PN.double().numpy()


def _pack_scores(
    reward: FeatureReward, packs: Sequence[FeaturePack], batch: ResidualBatch, step_end_BT: Tensor | None
) -> Tensor:
    """[P, B]: the union of the packs' features is read once."""
    ids = sorted({i for pack in packs for i in pack.feature_ids()})
    readable_BT = reward.readable(batch.h_BTD, batch.mask_BT)
    acts_NK = reward.sae.read(batch.h_BTD[readable_BT], ids)
    pooled = []
    for pack in packs:
        reward_BT = torch.zeros(readable_BT.shape, device=acts_NK.device)
        reward_BT[readable_BT] = weighted_sum(pack, acts_NK[:, [ids.index(i) for i in pack.feature_ids()]])
        pooled.append(pool(reward_BT, readable_BT, reward.aggregation, step_end_BT))
    return torch.stack(pooled)
