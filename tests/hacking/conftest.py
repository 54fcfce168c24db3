"""A small reward of block 1 of the tiny Llama, and a probe of another block."""

from __future__ import annotations

import pytest
import torch

from mechreward.probes import LinearProbe
from mechreward.reward import FeatureReward
from mechreward.sae import SAE, SAEMeta

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0}


@pytest.fixture(scope="session")
def reward() -> FeatureReward:
    encoder = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    sae = SAE(
        architecture="topk",
        W_enc_DF=encoder,
        b_enc_F=torch.zeros(64),
        W_dec_FD=encoder.T.clone(),
        b_dec_D=torch.zeros(32),
        meta=SAEMeta(release="r", sae_id="i", layer=1, model_name="", hook_name="h"),
        k=32,
    )
    return FeatureReward(WEIGHTS, sae)


@pytest.fixture(scope="session")
def probe() -> LinearProbe:
    weight = torch.randn(32, generator=torch.Generator().manual_seed(6))
    return LinearProbe(weight, 0.1, 32, "other", layer=2, pooling="max")
