"""OpenAI's files against the formula of their `model.py`, and a converted SAE in sae-lens."""

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
PLACE = "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"


def state(activation: str = "TopK", **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"pre_bias": (D,), "latent_bias": (F,), "encoder.weight": (F, D), "decoder.weight": (D, F)}
    made: dict[str, Any] = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
    counters = {name: torch.ones(F) for name in ("latents_activation_frequency", "latents_mean_square")}
    details = {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}
    return {
        **made,
        **counters,
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "activation": activation,
        "activation_state_dict": details,
        **changes,
    }


def write(path: Path, held: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path)
    return path


def formula(w: dict[str, Any], h_ND: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = torch.zeros(1), torch.ones(1)
    x = h_ND
    if w["activation"] == "TopK":
        mean = h_ND.mean(-1, keepdim=True)
        std = (h_ND - mean).std(-1, keepdim=True)
        x = (h_ND - mean) / (std + 1e-5)
    pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    acts = pre.relu()
    if w["activation"] == "TopK":
        top = pre.topk(K, dim=-1)
        acts = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    return acts, (acts @ w["decoder.weight"].T + w["pre_bias"]) * std + mean


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_formula(activation: str, h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    held = state(activation)
    sae = load_sae(write(tmp_path / "x.pt", held), layer=5)
    agrees(sae, *formula(held, h_ND))
    assert sae.input_norm == ("layer_norm" if activation == "TopK" else "none")


def test_a_file_without_a_name_of_its_activation_is_relu(
    h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path
) -> None:
    held = state("ReLU")
    del held["activation"], held["activation_state_dict"]
    agrees(load_sae(write(tmp_path / "x.pt", held), layer=5), *formula(state("ReLU"), h_ND))


def test_as_sae_lens_reads_the_converted_release(h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    import sae_lens

    w = state()
    lens = sae_lens.SAE.from_dict(
        {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "normalize_activations": "layer_norm"}
    )
    names = {"W_enc": w["encoder.weight"].T, "b_enc": w["latent_bias"], "W_dec": w["decoder.weight"].T}
    lens.load_state_dict({**names, "b_dec": w["pre_bias"]})
    acts = lens.encode(h_ND)
    agrees(load_sae(write(tmp_path / "x.pt", w), layer=5), acts, lens.decode(acts))


def test_the_place_tells_layer_and_model(tmp_path: Path) -> None:
    sae = load_sae(write(tmp_path / PLACE, state()))
    assert (sae.layer, sae.model_name, sae.k) == (8, "gpt2", K)
    with pytest.raises(InputError, match="layer: 7 was given, but .* says 8"):
        load_sae(tmp_path / PLACE, layer=7)
    for other in ("mlp_post_act", "resid_delta_mlp_v4", "resid_post_attn_v5_32k"):
        path = write(tmp_path / "gpt2-small" / other / "autoencoders" / "8.pt", state())
        with pytest.raises(InputError, match=f"reads {other.split('_v')[0]}, not the output of a block"):
            load_sae(path)


def test_wrong_states(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "activation: 'Identity' in .* is not one of TopK, ReLU": state("Identity"),
        "postact_fn: 'Identity' in .* is not 'ReLU'": state(activation_state_dict={"k": K, "postact_fn": "Identity"}),
        "k: .* lacks this key": state(activation_state_dict={"postact_fn": "ReLU"}),
        "k: 17 is not between 1": state(activation_state_dict={"k": F + 1, "postact_fn": "ReLU"}),
        "'decoder.linear.weight' in .* does not belong": state(**{"decoder.linear.weight": torch.zeros(F, D)}),
        r"decoder.weight: shape \(16, 6\) in .* is not \(6, 16\)": state(**{"decoder.weight": torch.zeros(F, D)}),
        r"pre_bias: shape \(16,\) in .* is not \(6,\)": state(pre_bias=torch.zeros(F)),
        "b_dec_D: .* NaN or infinity": state(pre_bias=torch.full((D,), torch.nan)),
    }
    for message, held in cases.items():
        with pytest.raises(InputError, match=message):
            load_sae(write(tmp_path / "x.pt", held), layer=0)
