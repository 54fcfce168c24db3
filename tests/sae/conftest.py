"""What the tests of file formats share: residuals, a comparison with a formula, and sae-lens' own loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechreward.sae import SAE, SAEMeta

WIDTH = 6
META = SAEMeta(release="r", sae_id="s", layer=2, model_name="m", hook_name="model.layers.2")
D, F = 6, 40


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SAE]:
    """Makes an SAE of an architecture with random weights: D inputs, F features."""

    def make(architecture: str, seed: int = 0, **changes: Any) -> SAE:
        g = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"k": 3} if architecture == "topk" else {}
        if architecture == "jumprelu":
            options["threshold_F"] = torch.rand(F, generator=g)
        if architecture == "gated":
            options |= {"b_gate_F": torch.randn(F, generator=g), "r_mag_F": torch.randn(F, generator=g)}
        tensors = [torch.randn(shape, generator=g) for shape in ((D, F), (F,), (F, D), (D,))]
        return SAE(architecture, *tensors, META, **{**options, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def h_ND() -> Tensor:
    """Residuals that are neither centred nor of one norm, so that no bias and no normalisation goes unnoticed."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(50, WIDTH, generator=g) * torch.rand(50, 1, generator=g).mul(2).add(0.5) + 0.3


@pytest.fixture
def agrees(h_ND: Tensor) -> Callable[[SAE, Tensor, Tensor], None]:
    """Compares encode and decode with activations and reconstructions of `h_ND` by a formula."""

    def compare(sae: SAE, acts_NF: Tensor, rebuilt_ND: Tensor) -> None:
        assert 0.03 < (acts_NF > 0).float().mean() < 0.97
        torch.testing.assert_close(sae.encode(h_ND), acts_NF, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sae.decode(acts_NF, h_ND), rebuilt_ND, rtol=1e-6, atol=1e-6)

    return compare


@pytest.fixture
def lens_loader(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """sae-lens' loader of a name, on files below `root` in place of the hub's; gives a `sae_lens.SAE`."""

    def load(name: str, root: Path, repo_id: str, folder_name: str, **overrides: Any) -> Any:
        import sae_lens
        from sae_lens.loading import pretrained_sae_loaders as loaders

        def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
            del repo_id  # the loaders pass it by name
            return str(root / subfolder / filename)

        monkeypatch.setattr(loaders, "hf_hub_download", local)
        cfg, tensors, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[name](repo_id, folder_name, "cpu", False, overrides)
        made = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
        made.load_state_dict({key: tensor.contiguous() for key, tensor in tensors.items()})
        return made

    return load
