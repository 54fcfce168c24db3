"""Small random SAEs of every kind, for tests of what features do in a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mechreward.sae import SAE, SAEMeta

KINDS = ("relu", "jumprelu", "gated", "topk", "topk_rescaled", "layer_norm", "constant_norm")


def _random_sae(kind: str, d: int = 32, f: int = 48, layer: int = 1, seed: int = 0) -> SAE:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    options: dict[str, object] = {}
    if kind == "jumprelu":
        options = {"threshold_F": normal(f).abs() * 0.1}
    if kind == "gated":
        options = {"b_gate_F": normal(f) * 0.1, "r_mag_F": normal(f) * 0.3}
    if kind.startswith("topk"):
        options = {"k": 8, "rescale_acts_by_decoder_norm": kind == "topk_rescaled"}
    if kind == "layer_norm":
        options = {"input_norm": "layer_norm"}
    if kind == "constant_norm":
        options = {"input_norm": "constant_norm_rescale", "apply_b_dec_to_input": False}
    return SAE(
        architecture=kind if kind in ("jumprelu", "gated") else "topk" if kind.startswith("topk") else "relu",  # type: ignore[arg-type]
        W_enc_DF=normal(d, f) * 0.3,
        b_enc_F=normal(f) * 0.1,
        W_dec_FD=normal(f, d) * 0.3,
        b_dec_D=normal(d) * 0.1,
        meta=SAEMeta("made", "", layer, "tiny", ""),
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SAE]:
    """Makes a random SAE by kind (`KINDS`): width 32, 48 features, block 1 unless told otherwise."""
    return _random_sae
