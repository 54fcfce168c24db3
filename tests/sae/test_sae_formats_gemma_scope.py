"""Gemma Scope files against the release's formula and sae-lens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import load_sae

D, F = 6, 16


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w_enc": (D, F), "b_enc": (F,), "w_dec": (F, D), "b_dec": (D,)}
    made = {name: rng.normal(size=shape).astype("f4") * 0.4 for name, shape in shapes.items()}
    return {**made, "threshold": rng.uniform(0.05, 0.5, F).astype("f4")}


def write(folder: Path, held: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **held)
    return folder


def formula(held: dict[str, np.ndarray], h_ND: Tensor) -> tuple[Tensor, Tensor]:
    w = {name: torch.from_numpy(array) for name, array in held.items()}
    pre = h_ND @ w["w_enc"] + w["b_enc"]
    acts = torch.where(pre > w["threshold"], pre.clamp(min=0), 0.0)
    return acts, acts @ w["w_dec"] + w["b_dec"]


@pytest.mark.parametrize("case", ["lower", "upper", "file"])
def test_formula(case: str, h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    held = arrays()
    named = {name.replace("w_", "W_"): array for name, array in held.items()} if case == "upper" else held
    folder = write(tmp_path, named)
    sae = load_sae(folder / "params.npz" if case == "file" else folder, layer=3, model_name="lab/model")
    agrees(sae, *formula(held, h_ND))
    assert (sae.architecture, sae.layer, sae.model_name, sae.d_model, sae.d_sae) == ("jumprelu", 3, "lab/model", D, F)
    assert sae.hook_name == "blocks.3.hook_resid_post"


def test_a_threshold_is_strict_and_may_be_negative(tmp_path: Path) -> None:
    held = {
        **arrays(),
        "w_enc": np.eye(D, F, dtype="f4"),
        "b_enc": np.zeros(F, "f4"),
        "threshold": np.full(F, 1.0, "f4"),
    }
    held["threshold"][1] = -5
    acts = load_sae(write(tmp_path, held), layer=0).encode(torch.tensor([[1.0, -1, 1.0000001, 0, 0, 2]]))
    assert acts[0].nonzero()[:, 0].tolist() == [2, 5]


def test_as_sae_lens(h_ND: Tensor, lens_loader: Callable[..., Any], tmp_path: Path) -> None:
    inner = "layer_20/width_16k/average_l0_71"
    folder = write(tmp_path / "gemma-scope-9b-it-res" / inner, arrays(1))
    lens = lens_loader("gemma_2", folder.parents[2], "google/gemma-scope-9b-it-res", inner, d_in=D, d_sae=F)
    sae = load_sae(tmp_path / "gemma-scope-9b-it-res", inner)
    torch.testing.assert_close(sae.encode(h_ND), lens.encode(h_ND), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(h_ND)), lens.decode(lens.encode(h_ND)), rtol=1e-6, atol=1e-6)
    assert (sae.hook_name, sae.model_name) == (lens.cfg.metadata.hook_name, "google/" + lens.cfg.metadata.model_name)


def test_folders_tell_layer_and_model(tmp_path: Path) -> None:
    # As the hub's cache lays it out.
    snapshot = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "fd5" / "layer_12" / "width_16k"
    sae = load_sae(write(snapshot / "average_l0_82", arrays()))
    assert (sae.layer, sae.model_name) == (12, "google/gemma-2-2b")
    with pytest.raises(InputError, match="layer: 11 was given, but .* says 12"):
        load_sae(snapshot / "average_l0_82", layer=11)
    assert load_sae(snapshot / "average_l0_82", model_name="gemma-2-9b").model_name == "gemma-2-9b"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gemma-scope-2b-pt-mlp/layer_3", "gemma-scope-2b-pt-mlp reads mlp, not the residual stream"),
        ("gemma-scope-2b-pt-transcoders/layer_3", "reads transcoders, not the residual stream"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "reads the embeddings"),
        ("unnamed", "layer: .* does not say which decoder block it reads; say it with layer="),
    ],
)
def test_places_that_cannot_be_read(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path / place, arrays()))


def test_wrong_arrays(tmp_path: Path) -> None:
    good = arrays()
    cases: dict[str, dict[str, np.ndarray]] = {
        "the tensor 'w_enc' is missing": {name: array for name, array in good.items() if name != "w_enc"},
        "the tensor 'threshold' is missing": {name: array for name, array in good.items() if name != "threshold"},
        "'w_skip' in .*params.npz does not belong": {**good, "w_skip": good["w_enc"]},
        r"w_dec: shape \(6, 16\) in .*params.npz is not \(16, 6\)": {**good, "w_dec": good["w_dec"].T},
        r"w_enc: shape \(96,\) in .* is not that of a matrix": {**good, "w_enc": good["w_enc"].reshape(-1)},
        "two arrays whose names differ in case only": {**good, "W_enc": good["w_enc"]},
        "b_enc_F: .* NaN or infinity": {**good, "b_enc": good["b_enc"] * np.nan},
    }
    for message, held in cases.items():
        with pytest.raises(InputError, match=message):
            load_sae(write(tmp_path, held), layer=0)
    with pytest.raises(InputError, match="k: 3 was given, but .* holds no TopK SAE"):
        load_sae(write(tmp_path, good), layer=0, k=3)
