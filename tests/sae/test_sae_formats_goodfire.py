"""Goodfire files against the model cards' formula and sae-lens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.sae import load_sae

D, F = 6, 16
NAME = "Llama-3.1-8B-Instruct-SAE-l19.pth"


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_linear, self.decoder_linear = nn.Linear(D, F), nn.Linear(F, D)


def write(path: Path, **changes: Tensor) -> Theirs:
    theirs = Theirs()
    torch.save({**theirs.state_dict(), **changes}, path)
    return theirs


@torch.no_grad()
def test_formula_and_sae_lens(
    h_ND: Tensor, agrees: Callable[..., None], lens_loader: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = write(tmp_path / NAME)
    acts = theirs.encoder_linear(h_ND).relu()
    for path in (tmp_path / NAME, tmp_path):
        sae = load_sae(path)
        agrees(sae, acts, theirs.decoder_linear(acts))
    lens = lens_loader(
        "goodfire", tmp_path, "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", NAME, d_in=D, d_sae=F, dtype="float32"
    )
    agrees(sae, lens.encode(h_ND), lens.decode(lens.encode(h_ND)))
    assert (sae.layer, sae.model_name) == (19, lens.cfg.metadata.model_name)


def test_other_names_need_a_layer(tmp_path: Path) -> None:
    write(tmp_path / "weights.pt")
    with pytest.raises(InputError, match="layer: .*weights.pt does not say which decoder block it reads"):
        load_sae(tmp_path / "weights.pt")
    assert load_sae(tmp_path / "weights.pt", layer=2).layer == 2


def test_wrong_tensors(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Tensor]] = {
        "'b_dec' in .* does not belong": {"b_dec": torch.zeros(D)},
        r"decoder_linear.weight: shape \(16, 6\) in .* is not \(6, 16\)": {"decoder_linear.weight": torch.zeros(F, D)},
        "b_enc_F: .* NaN or infinity": {"encoder_linear.bias": torch.full((F,), torch.inf)},
    }
    for message, changes in cases.items():
        write(tmp_path / NAME, **changes)
        with pytest.raises(InputError, match=message):
            load_sae(tmp_path / NAME)
    torch.save({"encoder_linear.weight": torch.zeros(F, D)}, tmp_path / NAME)
    with pytest.raises(InputError, match="the tensor 'encoder_linear.bias' is missing"):
        load_sae(tmp_path / NAME)
