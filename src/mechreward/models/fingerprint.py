"""Which weights a model has, without reading all of them: a resumed run starts from the model that it started with."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module, n: int = 64) -> str:
    """Hex SHA-256 over the first `n` values of every parameter, adapters' too: training changes it, a device does not.

    The same weights in another dtype have another one.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().reshape(-1)[:n].cpu()
        digest.update(name.encode() + first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
