"""The reader of a few tokens against `encode`, where rounding decides too; and how seldom it needs the long road."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mechreward.sae.few as few
from mechreward.errors import InputError
from mechreward.sae import SAE
from mechreward.sae.arithmetic import Encoder
from mechreward.sae.few import FewReader

D, F = 6, 40


class Counted:
    """`SAE.read` as the road that is fallen back to, counting its calls."""

    def __init__(self, sae: SAE, ids: list[int]) -> None:
        self.sae, self.ids, self.calls = sae, ids, 0

    def __call__(self, h_ND: Tensor) -> Tensor:
        self.calls += 1
        return self.sae.read(h_ND, self.ids)


def counted_reader(sae: SAE, ids: list[int]) -> tuple[FewReader, Counted]:
    counted = Counted(sae, ids)
    return replace(sae.reader(ids), read=counted), counted


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each full encoding by a TopK encoder got."""
    rows: list[int] = []
    keep = Encoder._keep_topk
    monkeypatch.setattr(Encoder, "_keep_topk", lambda self, x_ND: rows.append(len(x_ND)) or keep(self, x_ND))
    return rows


@settings(max_examples=200, deadline=None)
@given(
    architecture=st.sampled_from(["topk", "topk", "topk", "relu", "jumprelu", "gated"]),
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([0, 1, 2, 9]),
    k=st.sampled_from([1, 2, 3, 8, F - 1, F]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    norm=st.sampled_from(["none", "none", "center", "layer_norm", "constant_norm_rescale"]),
    ids=st.lists(st.integers(0, F - 1), max_size=6),
    power=st.sampled_from([0, 0, -9, 6]),
)
def test_reads_as_encoded(
    random_sae: Callable[..., SAE],
    architecture: str,
    seed: int,
    rows: int,
    k: int,
    flags: tuple[bool, bool, bool],
    norm: str,
    ids: list[int],
    power: int,
) -> None:
    rescale, subtract, coarse = flags
    options = {"k": k, "rescale_acts_by_decoder_norm": rescale} if architecture == "topk" else {}
    sae = random_sae(architecture, seed, apply_b_dec_to_input=subtract, input_norm=norm, **options)
    h = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed + 1)) * 2.0**power
    if coarse:  # small whole numbers: many ties, which the lower index wins
        sae = replace(sae, W_enc_DF=sae.W_enc_DF.round(), b_enc_F=sae.b_enc_F.round(), b_dec_D=sae.b_dec_D.round())
        h = h.round()
    wanted, got = sae.encode(h)[:, ids], sae.reader(ids)(h)
    assert got.shape == wanted.shape and got.dtype == torch.float32
    assert torch.equal(got > 0, wanted > 0)
    rounding = sae._encoder.margin(sae._inputs(h)).amax().item() if rows else 0.0
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=max(1e-6, rounding))


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated"])
def test_the_long_road_is_for_what_is_open(
    random_sae: Callable[..., SAE], architecture: str, encoded: list[int]
) -> None:
    sae, ids = random_sae(architecture), [3, 7, 7, 11]
    h = torch.randn(20, D, generator=torch.Generator().manual_seed(5))
    reader, counted = counted_reader(sae, ids)
    decided = [reader(row[None]) for row in h]
    assert counted.calls == 0 and not encoded
    assert torch.equal(torch.cat(decided) > 0, sae.encode(h)[:, ids] > 0)
    # Encoders are compared by rows that tie: features 0 and 1 are one and the same, at the k-th place.
    if architecture == "topk":
        W_DF, b_F = sae.W_enc_DF.clone(), sae.b_enc_F.clone()
        pre_F = sae._encoder.affine(sae._inputs(h[:1]))[0]
        kth = int(pre_F.argsort(descending=True)[2])
        other = int(pre_F.argsort()[0])
        W_DF[:, other], b_F[other] = W_DF[:, kth], b_F[kth]
        tied = replace(sae, W_enc_DF=W_DF, b_enc_F=b_F)
        reader, counted = counted_reader(tied, [kth, other])
        encoded.clear()
        acts = reader(h[:1])[0]
        assert encoded == [1] and counted.calls == 0
        assert (acts > 0).tolist() == [kth < other, other < kth]


def test_the_bar_is_that_of_the_largest_residual(random_sae: Callable[..., SAE], encoded: list[int]) -> None:
    sae = random_sae("topk", apply_b_dec_to_input=False)
    h = torch.randn(2, D, generator=torch.Generator().manual_seed(5))
    h[1] *= 1e5
    # Two features of one direction, at the second row's k-th place, apart by less than that row's rounding.
    margins = sae._encoder.margin(h)[:, 0]
    W_DF, b_F = sae.W_enc_DF.clone(), sae.b_enc_F.clone()
    pre_F = sae._encoder.affine(h[1:])[0]
    kth, other = int(pre_F.argsort(descending=True)[2]), int(pre_F.argsort()[0])
    gap = float(margins[1])
    assert gap > 10 * float(margins[0])
    W_DF[:, other], b_F[other] = W_DF[:, kth], b_F[kth] - gap
    reader = replace(sae, W_enc_DF=W_DF, b_enc_F=b_F).reader([kth, other])
    for order in ([0, 1], [1, 0]):
        encoded.clear()
        reader(h[order])
        assert encoded == [2]


def test_fewer_than_k_above_zero(random_sae: Callable[..., SAE]) -> None:
    sae = random_sae("topk", k=8)
    sae = replace(sae, b_enc_F=sae.b_enc_F - 4.0)
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    acts_NF = sae.encode(h)
    assert ((acts_NF > 0).sum(-1) < 8).any() and (acts_NF > 0).any()
    torch.testing.assert_close(sae.reader(list(range(F)))(h), acts_NF, rtol=1e-6, atol=1e-6)


def test_many_tokens_take_the_staged_reading(random_sae: Callable[..., SAE], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, counted = counted_reader(random_sae("topk"), [1, 2])
    monkeypatch.setattr(few, "FEW", 4 * D * F)
    reader(torch.randn(4, D))
    assert counted.calls == 0
    reader(torch.randn(5, D))
    assert counted.calls == 1


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(random_sae: Callable[..., SAE], architecture: str, bad: float) -> None:
    h = torch.randn(3, D)
    h[1, 2] = bad
    with pytest.raises(InputError, match="1 of 3 residuals hold NaN or infinity"):
        random_sae(architecture).reader([1, 2])(h)
    with pytest.raises(InputError, match="feature_ids: 40 is not a feature of this SAE"):
        random_sae(architecture).reader([40])


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("width", [1, D - 1, D + 1])
def test_residuals_of_another_width_are_refused(random_sae: Callable[..., SAE], architecture: str, width: int) -> None:
    # Width 1 would fit any encoder by broadcasting, once b_dec is subtracted.
    with pytest.raises(InputError, match=f"reads width 6 but the residuals have width {width}"):
        random_sae(architecture).reader([1, 2])(torch.ones(3, width))


def test_no_gradient_autocast_or_half_precision_inside(random_sae: Callable[..., SAE]) -> None:
    sae = random_sae("topk")
    h = torch.randn(2, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wanted = sae.encode(h)[:, [1, 2, 3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sae.reader([1, 2, 3])(h)
    assert not got.requires_grad and got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(sae.reader([1, 2, 3])(h.bfloat16()), sae.encode(h.bfloat16())[:, [1, 2, 3]])
