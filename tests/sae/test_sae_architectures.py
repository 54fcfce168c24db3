"""The four trainable SAEs: what comes out against the training class itself and against what sae-lens would save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import SAEMeta, SAEShape, TrainedSAE, save_sae, train_sae
from mechreward.sae.architectures import check_shape, frozen, nested_widths, new_sae, start_at
from mechreward.sae.io import require_sae_lens

META = SAEMeta(release="here", sae_id="x", layer=1, model_name="tiny", hook_name="model.layers.1")
D, F, K, SCALE = 16, 48, 3, 0.3
ALL = ("topk", "batchtopk", "matryoshka", "jumprelu")
SHAPE = SAEShape(d_model=D, d_sae=F, k=K)


def stream(seed: int = 0, size: int = 256) -> Iterator[Tensor]:
    """Sums of three of 32 directions in 16 dimensions, around an offset."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(32, D, generator=torch.Generator().manual_seed(9)), dim=-1)
    while True:
        chosen = torch.rand(size, 32, generator=g).topk(K).indices
        yield 5 * (torch.zeros(size, 32).scatter_(1, chosen, 1.0) @ directions) + 2


def untrained(architecture: str) -> Any:
    """A training SAE of random weights, thresholds and biases, with decoder rows of different norms."""
    torch.manual_seed(5)
    lens_sae = new_sae(require_sae_lens(), replace(SHAPE, architecture=architecture), 100, "cpu")  # type: ignore[arg-type]
    with torch.no_grad():
        lens_sae.W_dec.mul_(torch.rand(F, 1) + 0.5)
        lens_sae.b_dec.normal_()
        lens_sae.b_enc.normal_(std=0.1)
        if architecture == "jumprelu":
            lens_sae.threshold.uniform_(0.0, 0.3)
        elif architecture != "topk":
            lens_sae.topk_threshold = torch.tensor(0.02, dtype=torch.double)
    return lens_sae


@pytest.mark.parametrize("architecture", ALL)
def test_the_frozen_form_is_the_trained_one_without_the_scale(architecture: str) -> None:
    lens_sae = untrained(architecture)
    before = {name: tensor.clone() for name, tensor in lens_sae.state_dict().items()}
    sae = frozen(lens_sae, META, SCALE)
    assert all(torch.equal(before[name], tensor) for name, tensor in lens_sae.state_dict().items())
    assert (sae.architecture, sae.k, sae.meta) == (
        ("topk", K, META) if architecture == "topk" else ("jumprelu", None, META)
    )
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=-1), torch.ones(F))
    h = next(stream(3))
    with torch.no_grad():
        pre, norms = (SCALE * h - lens_sae.b_dec) @ lens_sae.W_enc + lens_sae.b_enc, lens_sae.W_dec.norm(dim=-1)
        if architecture == "topk":
            chosen = (pre * norms) >= (pre * norms).topk(K).values[:, -1:]
        elif architecture == "jumprelu":
            chosen = pre > lens_sae.threshold
        else:
            chosen = pre * norms > 0.02
        acts = pre.relu() * chosen
        # The contribution of a feature of activation a to the reconstruction, in units of the raw residual.
        contributions = acts * norms / SCALE
        rebuilt = (acts @ lens_sae.W_dec + lens_sae.b_dec) / SCALE
    assert 0 < (acts > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(h), contributions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(h)), rebuilt, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ALL)
def test_the_frozen_form_is_what_sae_lens_saves_and_loads(architecture: str, tmp_path: Path) -> None:
    from sae_lens import SAE as LensSAE

    lens_sae = untrained(architecture)
    sae = frozen(lens_sae, META, SCALE)
    lens_sae.fold_activation_norm_scaling_factor(SCALE)
    if architecture == "jumprelu":
        lens_sae.fold_W_dec_norm()
    lens_sae.save_inference_model(tmp_path / "theirs")
    save_sae(sae, tmp_path / "ours")
    h = next(stream(3))
    for folder in ("theirs", "ours"):
        lens = LensSAE.load_from_disk(tmp_path / folder)
        torch.testing.assert_close(sae.encode(h), lens.encode(h), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.decode(sae.encode(h)), lens.decode(lens.encode(h)), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained() -> dict[str, TrainedSAE]:
    return {
        architecture: train_sae(
            stream(),
            replace(SHAPE, architecture=architecture),  # type: ignore[arg-type]
            n_tokens=256 * 400,
            meta=META,
            batch_size=256,
            n_held_out=2048,
            lr=4e-3,
        )
        for architecture in ALL
    }


@pytest.mark.parametrize("architecture", ALL)
def test_k_is_the_number_of_active_features_in_every_architecture(
    trained: dict[str, TrainedSAE], architecture: str
) -> None:
    assert trained[architecture].l0 == pytest.approx(K, rel=0.25)
    assert trained[architecture].fvu < 0.3


def test_first_thresholds_let_each_feature_fire_on_its_share() -> None:
    lens_sae = untrained("jumprelu")
    sample = next(stream(4, 2048)) + 0.1 * torch.randn(2048, D)  # without it tokens repeat, and tie
    lens_sae.b_enc.data.zero_()  # as training starts; a threshold is never below 0
    start_at(lens_sae, sample, SCALE)
    assert torch.equal(lens_sae.b_dec, sample.mean(0) * SCALE)
    with torch.no_grad():
        pre = (sample * SCALE - sample.mean(0) * SCALE) @ lens_sae.W_enc
    # k/F = 1/16 of 2048 tokens are 128; the last is the threshold itself, passed only by rounding.
    assert set((pre > lens_sae.threshold).sum(0).tolist()) <= {127, 128}


def test_l0_of_a_short_jumprelu_run_is_near_k() -> None:
    shape = replace(SHAPE, architecture="jumprelu")
    short = train_sae(stream(), shape, n_tokens=256 * 60, meta=META, batch_size=256, n_held_out=2048, lr=4e-3)
    assert short.l0 == pytest.approx(K, rel=0.4)


def test_threshold_of_a_short_batchtopk_run_has_caught_up() -> None:
    # With sae-lens' rate of .01 the threshold is at 1 - .99**60 = 45 % of its value after 60 steps, and L0 far over k.
    shape = replace(SHAPE, architecture="batchtopk")
    short = train_sae(stream(), shape, n_tokens=256 * 60, meta=META, batch_size=256, n_held_out=2048, lr=4e-3)
    assert short.l0 == pytest.approx(K, rel=0.25)


def test_matryoshka_inner_levels_rebuild_more_than_chance_subsets(trained: dict[str, TrainedSAE]) -> None:
    h = next(stream(7, 2048))

    def fvu_of_first(sae: Any, n: int) -> float:
        acts = sae.encode(h)
        acts[:, n:] = 0
        return ((h - sae.decode(acts)).pow(2).sum() / (h - h.mean(0)).pow(2).sum()).item()

    half = nested_widths(SHAPE)[-2]
    assert fvu_of_first(trained["matryoshka"].sae, half) < 0.7 * fvu_of_first(trained["batchtopk"].sae, half)


def test_nested_widths() -> None:
    assert nested_widths(replace(SHAPE, d_sae=65536)) == [2048, 6144, 14336, 30720, 65536]
    assert nested_widths(replace(SHAPE, d_sae=16)) == [1, 3, 7, 16]
    assert nested_widths(replace(SHAPE, widths=(5, 9))) == [5, 9, F]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k: 0 is not between 1 and the SAE's 48 features"),
        ({"k": 49}, "k: 49 is not between"),
        ({"d_sae": 0}, "d_sae: 0 is not at least 1"),
        ({"d_model": 0}, "d_model: 0 is not at least 1"),
        ({"widths": (4,)}, r"widths: \[4\] are for matryoshka, not for topk"),
        ({"widths": (8, 4), "architecture": "matryoshka"}, r"widths: \[8, 4\] do not grow"),
        ({"widths": (4, 48), "architecture": "matryoshka"}, "do not grow from 1 to less than the SAE's 48"),
        ({"widths": (0, 4), "architecture": "matryoshka"}, "do not grow"),
        ({"bandwidth": 0.0}, "must both be above 0"),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_shape(replace(SHAPE, **changes))


def test_an_architecture_that_cannot_be_trained() -> None:
    shape = replace(SHAPE)
    object.__setattr__(shape, "architecture", "gated")  # past the type check, as a caller without one would
    with pytest.raises(
        InputError, match="'gated' cannot be trained; allowed are topk, batchtopk, matryoshka, jumprelu"
    ):
        check_shape(shape)


def test_a_good_shape_passes() -> None:
    check_shape(replace(SHAPE, architecture="matryoshka", widths=(4, 8)))
