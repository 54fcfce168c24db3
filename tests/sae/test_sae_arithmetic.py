"""The rule of what is active against exact rational arithmetic, on inputs that float32 alone would get wrong."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechreward.sae import SAE, SAEMeta
from mechreward.sae.arithmetic import Encoder

META = SAEMeta(release="r", sae_id="s", layer=0, model_name="m", hook_name="model.layers.0")
D, F = 24, 30


def near_ties(seed: int, offset: float) -> tuple[Tensor, Tensor]:
    """Tokens and encoder weights whose products often differ by less than float32 can tell.

    Features come in groups of three: the same numbers in another order along D, where the tokens are constant. So the
    products of a group are equal, or differ by one part in 2**26, but their float32 sums need not.
    """
    g = torch.Generator().manual_seed(seed)
    x_ND = (torch.randn(6, 1, generator=g) + offset).expand(6, D).contiguous()
    base_FD = torch.randn(F // 3, D, generator=g).repeat_interleave(3, 0)
    W_FD = torch.stack([row[torch.randperm(D, generator=g)] for row in base_FD])
    W_FD[2::3, 0] *= 1 + 2.0**-22
    return x_ND, W_FD


def exact_product(x: Tensor, w: Tensor) -> np.float32:
    total = sum(Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), w.tolist(), strict=True))
    return np.float32(float(total))


def make(architecture: str, x_ND: Tensor, W_FD: Tensor, k: int = 7) -> SAE:
    """An SAE for which every feature is at, or next to, the point where it becomes active on the first token."""
    z_F = torch.tensor([exact_product(x_ND[0], w) for w in W_FD])
    bias = torch.linspace(-1, 1, 10).repeat_interleave(3)
    options: dict[str, object] = {}
    if architecture == "topk":
        options["k"] = k
    if architecture == "relu" or k >= F - 1:
        # One in three features just below zero, one just above, one at it.
        bias = -z_F
        bias[::3] = torch.nextafter(bias[::3], torch.tensor(-torch.inf))
        bias[1::3] = torch.nextafter(bias[1::3], torch.tensor(torch.inf))
    if architecture == "jumprelu":
        options["threshold_F"] = z_F + bias
        # A negative threshold never lets a negative value through: there the boundary is zero.
        bias[::2], options["threshold_F"][::2] = -z_F[::2], -1.0  # type: ignore[index]
    if architecture == "gated":
        r_mag, b_gate = torch.randn(F) / 3, -z_F.clone()
        # Every other feature is at the boundary of its magnitude, with its gate open.
        bias[::2], b_gate[::2] = -z_F[::2] * r_mag.exp()[::2], 1 - z_F[::2]
        options |= {"b_gate_F": b_gate, "r_mag_F": r_mag}
    return SAE(architecture, W_FD.T, bias, W_FD.clone(), torch.zeros(D), META, **options)  # type: ignore[arg-type]


def by_the_rule(sae: SAE, x_ND: Tensor) -> np.ndarray:
    """Exact products rounded once to float32, elementwise float32, ties to the lowest index."""
    W, b = sae.W_enc_DF.T, sae.b_enc_F.numpy()
    z = np.array([[exact_product(x, w) for w in W] for x in x_ND], dtype=np.float32)
    pre = z + b
    if sae.k is not None:
        order = np.lexsort((np.broadcast_to(np.arange(F), pre.shape), -pre))[:, : sae.k]
        kept = np.zeros_like(pre, dtype=bool)
        np.put_along_axis(kept, order, True, axis=1)
        return np.maximum(pre, 0) * kept
    if sae.threshold_F is not None:
        return np.maximum(pre, 0) * (pre > sae.threshold_F.numpy())
    if sae.b_gate_F is not None and sae.r_mag_F is not None:
        magnitude = np.maximum(z * sae.r_mag_F.exp().numpy() + b, 0)
        return magnitude * (z + sae.b_gate_F.numpy() > 0)
    return np.maximum(pre, 0)


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(["topk", "relu", "jumprelu", "gated"]),
    seed=st.integers(0, 10**6),
    offset=st.sampled_from([0.0, 100.0]),
    k=st.sampled_from([1, 2, 7, 8, 10, F - 1, F]),
)
def test_support_is_that_of_exact_arithmetic(architecture: str, seed: int, offset: float, k: int) -> None:
    x_ND, W_FD = near_ties(seed, offset)
    sae = make(architecture, x_ND, W_FD, k)
    wanted = by_the_rule(sae, x_ND)
    got = sae.encode(x_ND).numpy()
    assert (got >= 0).all()
    np.testing.assert_array_equal(got > 0, wanted > 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4 * (1 + offset))
    ids = [29, 3, 12, 3, 13, 14]
    chosen = sae.read(x_ND, ids).numpy()
    assert (chosen >= 0).all()
    np.testing.assert_array_equal(chosen > 0, wanted[:, ids] > 0)


def test_the_planted_ties_are_beyond_float32() -> None:
    # Otherwise the test above would show nothing: a plain float32 product and top-k does get them wrong.
    wrong = 0
    for seed in range(20):
        x_ND, W_FD = near_ties(seed, 100.0)
        sae = make("topk", x_ND, W_FD)
        pre_NF = x_ND @ sae.W_enc_DF + sae.b_enc_F
        plain = torch.zeros_like(pre_NF).scatter_(1, pre_NF.topk(7).indices, 1.0)
        wrong += int(((plain > 0) & (pre_NF > 0)).ne(torch.from_numpy(by_the_rule(sae, x_ND)) > 0).any(-1).sum())
    assert wrong >= 10


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated"])
def test_a_token_alone_is_the_token_in_a_batch(architecture: str) -> None:
    for seed in range(10):
        x_ND, W_FD = near_ties(seed, 100.0)
        sae = make(architecture, x_ND, W_FD)
        alone = torch.cat([sae.encode(row[None]) for row in x_ND])
        assert torch.equal(alone > 0, sae.encode(x_ND) > 0)


def encoder(**parts: object) -> Encoder:
    none = dict.fromkeys(("scale_F", "threshold_F", "gate_bias_F", "magnitude_F", "k"))
    given_parts = {"W_FD": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "bias_F": torch.tensor([-2.0, 0.5])}
    return Encoder(**{**none, **given_parts, **parts})  # type: ignore[arg-type]


def test_margin_by_hand() -> None:
    # |x| = 5 and 0; the longest feature has norm 5, the largest offset is 2; sqrt(D) = sqrt(2).
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    wanted = torch.tensor([[2**0.5 * 5 * 5 + 4 * 2], [4 * 2]]) * 2.0**-24
    torch.testing.assert_close(encoder().margin(x), wanted, rtol=1e-6, atol=0)
    # A scale above 1 stretches both; one below 1 does not shrink the margin of the product itself.
    scaled = encoder(scale_F=torch.tensor([2.0, 0.1]), k=1)
    wanted = torch.tensor([[2**0.5 * 10 * 5 + 4 * 4], [4 * 4]]) * 2.0**-24
    torch.testing.assert_close(scaled.margin(x), wanted, rtol=1e-6, atol=0)
    shrunk = encoder(scale_F=torch.tensor([0.5, 0.1]), k=1)
    torch.testing.assert_close(shrunk.margin(x), encoder().margin(x), rtol=1e-6, atol=0)


def test_exact_products_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechreward.sae.arithmetic.EXACT_FLOATS", 4)  # pieces of two pairs
    x = torch.tensor([[1.0, 2.0**-30], [2.0, 1.0]])
    rows, ids = torch.tensor([0, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 0])
    assert encoder().exact(x, rows, ids).tolist() == [3.0, 10.0, 1.0, 2.0**-30, 3.0]
