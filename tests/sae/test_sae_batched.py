"""The older names against the methods they call."""

from __future__ import annotations

import pytest
import torch

from mechreward.errors import InputError
from mechreward.sae import SAE, SAEMeta
from mechreward.sae.batched_encode import batched_encode, batched_encode_selective

META = SAEMeta(release="r", sae_id="s", layer=0, model_name="m", hook_name="model.layers.0")


def test_both_are_the_methods() -> None:
    sae = SAE("topk", torch.randn(5, 30), torch.zeros(30), torch.randn(30, 5), torch.zeros(5), META, k=4)
    h = torch.randn(3, 7, 5)
    full = batched_encode(sae, h, batch_size=2)
    assert torch.equal(full, sae.encode(h))
    assert (full > 0).sum() > 50
    assert torch.equal(batched_encode(sae, h, dtype=torch.bfloat16), full.to(torch.bfloat16))
    assert torch.equal(batched_encode_selective(sae, h, [9, 2, 9]) > 0, full[..., [9, 2, 9]] > 0)
    for call in (lambda: batched_encode(sae, h, 0), lambda: batched_encode_selective(sae, h, [1], 0)):
        with pytest.raises(InputError, match="batch_size: 0 is not at least 1"):
            call()
