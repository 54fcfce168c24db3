"""Qwen-Scope files against the model cards' formula and sae-lens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import load_sae

D, F, K = 6, 16, 4
RELEASE = "SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"


def tensors(f: int = F) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (f, D), "b_enc": (f,), "W_dec": (D, f), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}


def write(folder: Path, layer: int, held: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(held, folder / f"layer{layer}.sae.pt")
    return folder / f"layer{layer}.sae.pt"


def formula(w: dict[str, Tensor], h_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    pre = h_ND @ w["W_enc"].T + w["b_enc"]
    values, chosen = pre.topk(k, dim=-1)
    acts = torch.zeros_like(pre).scatter_(-1, chosen, values).clamp(min=0)
    return acts, acts @ w["W_dec"].T + w["b_dec"]


def test_formula(h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    w = tensors()
    sae = load_sae(write(tmp_path, 7, w), k=K)
    agrees(sae, *formula(w, h_ND, K))
    assert (sae.k, sae.layer, sae.model_name) == (K, 7, "")


def test_as_sae_lens_and_the_folder_tells_model_and_k(
    h_ND: Tensor, agrees: Callable[..., None], lens_loader: Callable[..., Any], tmp_path: Path
) -> None:
    w = tensors(1024)
    path = write(tmp_path / RELEASE, 3, w)
    lens = lens_loader("qwen_scope", path.parent, f"Qwen/{RELEASE}", path.name, d_in=D)
    sae = load_sae(tmp_path / RELEASE, "layer3.sae.pt")
    agrees(sae, lens.encode(h_ND), lens.decode(lens.encode(h_ND)))
    agrees(sae, *formula(w, h_ND, 50))
    assert (sae.k, sae.layer, sae.model_name) == (50, 3, lens.cfg.metadata.model_name)
    with pytest.raises(InputError, match="k: 100 was given, but .* says 50"):
        load_sae(path, k=100)
    with pytest.raises(InputError, match="layer: 4 was given, but .* says 3"):
        load_sae(path, layer=4)


def test_width_has_to_be_the_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"has 16 features, but its folder {RELEASE} says 1K"):
        load_sae(write(tmp_path / RELEASE, 0, tensors()))


def test_layer_chooses_among_files(tmp_path: Path) -> None:
    first, second = tensors(), {name: tensor * 2 for name, tensor in tensors().items()}
    write(tmp_path, 0, first)
    assert load_sae(tmp_path, k=K).layer == 0  # the only one
    write(tmp_path, 1, second)
    sae = load_sae(tmp_path, layer=1, k=K)
    assert sae.layer == 1
    assert torch.equal(sae.W_enc_DF, second["W_enc"].T)
    with pytest.raises(InputError, match="layer: .* has no layer2.sae.pt"):
        load_sae(tmp_path, layer=2, k=K)
    with pytest.raises(InputError, match="holds 2 torch files .*; name one with sae_id="):
        load_sae(tmp_path, k=K)


def test_k_is_needed_and_at_most_f(tmp_path: Path) -> None:
    path = write(tmp_path, 0, tensors())
    with pytest.raises(InputError, match="k: .* does not say how many features are kept a token; say it with k="):
        load_sae(path)
    with pytest.raises(InputError, match="k: 17 is not between 1 and the SAE's 16 features"):
        load_sae(path, k=17)
    with pytest.raises(InputError, match="k: 0 .* is not a whole number"):
        load_sae(path, k=0)


def test_wrong_tensors(tmp_path: Path) -> None:
    w = tensors()
    cases: dict[str, dict[str, Any]] = {
        "the tensor 'b_dec' is missing": {name: tensor for name, tensor in w.items() if name != "b_dec"},
        "'threshold' in .* does not belong": {**w, "threshold": torch.zeros(F)},
        r"b_enc: shape \(16,\) in .* is not \(6,\)": {**w, "W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T},
        r"W_dec: shape \(16, 6\) in .* is not \(6, 16\)": {**w, "W_dec": w["W_dec"].T},
        "W_enc_DF: .* NaN or infinity": {**w, "W_enc": w["W_enc"].log()},
    }
    for message, held in cases.items():
        with pytest.raises(InputError, match=message):
            load_sae(write(tmp_path, 0, held), k=K)
