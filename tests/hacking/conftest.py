"""A small reward of block 1 of the tiny Llama, and a probe of another block."""

from __future__ import annotations

import pytest
import torch

from mechreward.probes import LinearProbe
from mechreward.reward import FeatureReward

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0}


@pytest.fixture(scope="session")
def reward(sae_of_layer) -> FeatureReward:
    return FeatureReward(WEIGHTS, sae_of_layer())


@pytest.fixture(scope="session")
def probe() -> LinearProbe:
    weight = torch.randn(32, generator=torch.Generator().manual_seed(6))
    return LinearProbe(weight, 0.1, 32, "other", layer=2, pooling="max")
