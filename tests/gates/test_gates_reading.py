"""Packs beside the judged reward are read as a reward of their own would read them."""

from __future__ import annotations

import numpy as np
import pytest

from mechreward.features import FeaturePack, PackFeature, sae_ref
from mechreward.gates import read_scores
from mechreward.models import iter_residuals, load_model
from mechreward.reward import FeatureReward
from mechreward.rollout import sample_responses
from mechreward.sae import load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER


@pytest.mark.parametrize("pooling", ["mean", "step_end:."])
def test_packs_are_scored_as_rewards(pooling: str) -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    responses = sample_responses(loaded, load_questions("tiny:easy", limit=4), n=2, max_new_tokens=24, seed=1)
    prompt, completion = list(responses[0].prompt_ids), list(responses[0].completion_ids)
    [batch] = iter_residuals(loaded.model, [prompt], [completion], sae.meta.layer)
    fired_F = sae.encode(batch.h_BTD[0]).amax(0)
    ids = fired_F.argsort(descending=True)[:6].tolist()

    def pack(order: list[int], share: float) -> FeaturePack:
        features = [
            PackFeature(id=i, weight=(-1.0) ** k, scale=k + 1.0, activation_threshold=share * float(fired_F[i]))
            for k, i in enumerate(order)
        ]
        return FeaturePack(name="p", model_name="tiny", sae=sae_ref(sae), features=features, pooling=pooling)

    packs = [pack(ids[:4], 0.0), pack(ids[:4], 0.6), pack(ids[:1:-1], 0.6)]
    found_PN = read_scores(FeatureReward(packs[0], sae), packs, responses, loaded).packs_PN
    alone_PN = [read_scores(FeatureReward(other, sae), [], responses, loaded).judged_N for other in packs]
    np.testing.assert_allclose(found_PN, alone_PN, rtol=1e-5, atol=1e-6)
    assert not np.allclose(found_PN[0], found_PN[1])
