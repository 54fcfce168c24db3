"""A model's fingerprint: the same for the same weights, another one once any parameter has changed."""

from __future__ import annotations

import hashlib
from copy import deepcopy

import torch
from transformers import PreTrainedModel

from mechreward.models import fingerprint


def test_it_is_a_hash_of_names_and_first_values() -> None:
    one = torch.nn.Linear(3, 1, dtype=torch.bfloat16)
    told = [b"weight" + one.weight[0, :2].detach().view(torch.uint8).numpy().tobytes()]
    told += [b"bias" + one.bias.detach().view(torch.uint8).numpy().tobytes()]
    assert fingerprint(one, n=2) == hashlib.sha256(b"".join(told)).hexdigest()


def test_every_parameter_counts(tiny_llama: PreTrainedModel) -> None:
    model = deepcopy(tiny_llama)
    seen = {fingerprint(model)}
    assert seen == {fingerprint(tiny_llama)}
    parameters = list(model.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(parameters)
