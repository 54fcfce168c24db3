"""The reader's arithmetic against numbers worked out by hand, a naive loop, and its own `encode`."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mechreward.sae.reading as reading
from mechreward.errors import InputError
from mechreward.sae import SAE, SAEMeta

META = SAEMeta(release="r", sae_id="s", layer=2, model_name="m", hook_name="model.layers.2")
# Two inputs, four features: x, y, x + y, -x.
W_ENC = torch.tensor([[1.0, 0.0, 1.0, -1.0], [0.0, 1.0, 1.0, 0.0]])
B_ENC = torch.tensor([0.0, 0.5, -1.0, 0.0])
W_DEC = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [-0.5, 0.0]])
B_DEC = torch.tensor([1.0, -1.0])


def small(architecture: str = "topk", **changes: object) -> SAE:
    options = {"k": 2} if architecture == "topk" else {}
    if architecture == "jumprelu":
        options = {"threshold_F": torch.tensor([1.0, 2.5, -1.0, 0.0])}
    return SAE(architecture, W_ENC, B_ENC, W_DEC, B_DEC, META, **{**options, **changes})  # type: ignore[arg-type]


def random_sae(architecture: str, d: int = 6, f: int = 17, seed: int = 0, **changes: object) -> SAE:
    g = torch.Generator().manual_seed(seed)
    options = {"k": 3} if architecture == "topk" else {}
    if architecture == "jumprelu":
        options = {"threshold_F": torch.rand(f, generator=g)}
    tensors = [torch.randn(shape, generator=g) for shape in ((d, f), (f,), (f, d), (d,))]
    return SAE(architecture, *tensors, META, **{**options, **changes})  # type: ignore[arg-type]


def test_relu_by_hand() -> None:
    # h - b_dec = (1, 2); pre = (1, 2.5, 2, -1)
    sae = small("relu")
    h = torch.tensor([2.0, 1.0])
    assert sae.encode(h).tolist() == [1.0, 2.5, 2.0, 0.0]
    # decode: 1*(1,0) + 2.5*(0,2) + 2*(3,4) + b_dec
    assert sae.decode(sae.encode(h)).tolist() == [8.0, 12.0]
    # without subtracting b_dec: pre = (2, 1.5, 2, -2)
    assert small("relu", apply_b_dec_to_input=False).encode(h).tolist() == [2.0, 1.5, 2.0, 0.0]


def test_jumprelu_threshold_is_strict_and_never_lets_negatives_through() -> None:
    # pre = (1, 2.5, 2, -1) and thresholds (1, 2.5, -1, 0): 1 > 1 and 2.5 > 2.5 are false.
    sae = small("jumprelu")
    h = torch.tensor([[2.0, 1.0], [2.5, 1.25]])
    assert sae.encode(h).tolist() == [[0.0, 0.0, 2.0, 0.0], [1.5, 2.75, 2.75, 0.0]]
    # pre = (0, .6, -.9, 0): the third is above its threshold of -1 but negative.
    assert sae.encode(torch.tensor([1.0, -0.9])).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_topk_by_hand() -> None:
    h = torch.tensor([2.0, 1.0])
    assert small().encode(h).tolist() == [0.0, 2.5, 2.0, 0.0]
    assert small(k=1).encode(h).tolist() == [0.0, 2.5, 0.0, 0.0]
    assert small(k=4).encode(h).tolist() == [1.0, 2.5, 2.0, 0.0]


def test_topk_rescaled_by_decoder_norm() -> None:
    # norms (1, 2, 5, .5): pre (1, 2.5, 2, -1) -> (1, 5, 10, -.5); decode divides by the norms again.
    sae = small(rescale_acts_by_decoder_norm=True, k=1)
    h = torch.tensor([2.0, 1.0])
    assert sae.encode(h).tolist() == [0.0, 0.0, 10.0, 0.0]
    assert sae.decode(sae.encode(h)).tolist() == [7.0, 7.0]
    assert sae.read(h, [2, 0]).tolist() == [10.0, 0.0]


def test_topk_rescaled_with_a_dead_decoder_row_stays_finite() -> None:
    W_dec = W_DEC.clone()
    W_dec[2] = 0
    sae = replace(small(k=4, rescale_acts_by_decoder_norm=True), W_dec_FD=W_dec)
    h = torch.tensor([2.0, 1.0])
    assert sae.encode(h).tolist() == [1.0, 5.0, 0.0, 0.0]
    assert sae.decode(sae.encode(h)).tolist() == [2.0, 4.0]


def kept(pre: Tensor, k: int) -> Tensor:
    """What a TopK SAE makes of these very pre-activations."""
    f = pre.shape[1]
    return SAE("topk", torch.eye(f), torch.zeros(f), torch.eye(f), torch.zeros(f), META, k=k).encode(pre)


@pytest.mark.parametrize(
    ("row", "k", "wanted"),
    [
        ([1.0, 3.0, 3.0, 3.0], 2, [0.0, 3.0, 3.0, 0.0]),
        ([3.0, 1.0, 3.0, 3.0], 1, [3.0, 0.0, 0.0, 0.0]),
        ([2.0, 5.0, 2.0, 2.0], 2, [2.0, 5.0, 0.0, 0.0]),
        ([2.0, 2.0, 2.0, 2.0], 4, [2.0, 2.0, 2.0, 2.0]),
        ([-1.0, -2.0, -3.0, -4.0], 2, [0.0, 0.0, 0.0, 0.0]),
        ([0.0, 0.0, 1.0, 0.0], 3, [0.0, 0.0, 1.0, 0.0]),
        ([-1.0, 4.0, -1.0, -1.0], 2, [0.0, 4.0, 0.0, 0.0]),
    ],
)
def test_ties_keep_the_lowest_index(row: list[float], k: int, wanted: list[float]) -> None:
    # A second row without ties must come through untouched.
    both = torch.tensor([row, [4.0, 3.0, 2.0, 1.0]])
    assert kept(both, k).tolist() == [wanted, [4.0, 3.0, 2.0, 1.0][:k] + [0.0] * (4 - k)]


def naive_topk(row: list[float], k: int) -> list[float]:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return [max(row[i], 0.0) if i in order else 0.0 for i in range(len(row))]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-2, 3), min_size=6, max_size=6), max_size=5), k=st.integers(1, 6))
def test_topk_equals_sorting(rows: list[list[int]], k: int) -> None:
    pre = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    assert kept(pre, k).tolist() == [naive_topk([float(x) for x in row], k) for row in rows]


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_blocks_of_tokens_do_not_change_the_result(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, h = random_sae(architecture), torch.randn(10, 6).round()
    sae = replace(sae, W_enc_DF=sae.W_enc_DF.round())
    whole, fvu = sae.encode(h), sae.fvu(h)
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 3)
    monkeypatch.setattr(reading, "ON_CPU", reading.Sizes(block=0))
    assert torch.equal(sae.encode(h) > 0, whole > 0)
    assert torch.allclose(sae.encode(h), whole, atol=1e-6)
    assert sae.fvu(h) == pytest.approx(fvu, rel=1e-6)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_selected_columns_only(architecture: str) -> None:
    # Weights of unselected features made huge after the fact must not matter, nor be touched at all.
    sae, h = random_sae(architecture), torch.randn(4, 6)
    wanted = sae.encode(h)[:, [3, 8]]
    sae.W_enc_DF[:, [0, 1, 2, 4, 5, 6, 7]] = float("nan")
    torch.testing.assert_close(sae.read(h, [3, 8]), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    sae = random_sae("topk")
    h = torch.randn(5, 6).to(dtype)
    assert sae.encode(h).dtype == torch.float32
    assert torch.equal(sae.encode(h), sae.encode(h.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae.encode(h), sae.encode(h.float()))
        torch.testing.assert_close(sae.read(h, [0, 4, 9]), sae.encode(h.float())[:, [0, 4, 9]], rtol=1e-6, atol=1e-6)
        inside = sae.decode(sae.encode(h))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sae.decode(sae.encode(h)))


def test_weights_of_any_float_type_become_float32() -> None:
    sae = SAE("relu", *(t.to(torch.bfloat16) for t in (W_ENC, B_ENC, W_DEC, B_DEC)), META)
    assert {t.dtype for t in sae.weights().values()} == {torch.float32}


def test_weights_in_their_stored_layout_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = random_sae("jumprelu")
    # The largest matrix was copied at every `replace`, too: what changes the label only must not need its memory again.
    for same in (sae.to("cpu"), replace(sae, meta=META), replace(sae, b_dec_D=torch.zeros(6))):
        assert same.W_enc_DF.data_ptr() == sae.W_enc_DF.data_ptr()
        assert same.W_dec_FD.data_ptr() == sae.W_dec_FD.data_ptr()
    # Feature by feature, whichever way the weights came.
    by_row, by_feature = torch.randn(6, 17), torch.randn(17, 6)
    for W_enc in (by_row, by_feature.T):
        held = replace(sae, W_enc_DF=W_enc).W_enc_DF
        assert torch.equal(held, W_enc) and held.T.is_contiguous()
    assert held.data_ptr() == by_feature.data_ptr()
    # The check for NaN copies nothing either, unless it has found one.
    monkeypatch.setattr(Tensor, "isfinite", lambda x: torch.isfinite(x) if x.ndim < 2 else pytest.fail("a copy"))
    replace(sae, meta=META)


def test_large_weights_are_finite() -> None:
    W_dec = W_DEC.clone()
    W_dec[1:, 0] = 3e38  # each is finite, their sum is not
    assert torch.equal(replace(small(), W_dec_FD=W_dec).W_dec_FD, W_dec)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_no_gradient_ever(architecture: str) -> None:
    sae = random_sae(architecture)
    sae = replace(sae, W_enc_DF=sae.W_enc_DF.requires_grad_())
    h = torch.randn(3, 6, requires_grad=True)
    acts = sae.encode(h)
    assert not any(x.requires_grad for x in (acts, sae.read(h, [1]), sae.decode(acts), *sae.weights().values()))


def test_fvu_by_hand() -> None:
    # ReLU SAE that copies the first input and drops the second: all error is the second input's.
    sae = SAE("relu", torch.eye(2), torch.zeros(2), torch.diag(torch.tensor([1.0, 0.0])), torch.zeros(2), META)
    h = torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 5.0]])
    # squared errors 1 + 9 + 25; distances from the mean (2, 3): (1 + 4) + (1 + 0) + (0 + 4)
    assert sae.fvu(h) == pytest.approx(35 / 10)
    assert sae.fvu(h.view(1, 3, 2)) == pytest.approx(35 / 10)
    assert replace(sae, W_dec_FD=torch.eye(2)).fvu(h) == 0.0


def test_hash_covers_everything_that_changes_a_reading() -> None:
    sae = small()
    nudged = W_ENC.clone()
    nudged[0, 0] += 1e-6
    changed = [
        replace(sae, k=3),
        replace(sae, apply_b_dec_to_input=False),
        replace(sae, rescale_acts_by_decoder_norm=True),
        replace(sae, W_enc_DF=nudged),
        replace(sae, b_enc_F=B_ENC + 1e-6),
        replace(sae, W_dec_FD=W_DEC + 1e-6),
        replace(sae, b_dec_D=B_DEC + 1e-6),
        small("relu"),
        small("jumprelu"),
        small("jumprelu", threshold_F=torch.tensor([1.0, 2.5, -1.0, 0.1])),
    ]
    assert len({sae.weights_hash, *(other.weights_hash for other in changed)}) == len(changed) + 1
    assert small().weights_hash == sae.weights_hash == sae.to("cpu").weights_hash
    assert replace(sae, meta=replace(META, release="elsewhere")).weights_hash == sae.weights_hash
    # Written down once: packs store this number, so it must not move between versions or machines.
    assert sae.weights_hash == "8fb498011c15057a82bead6a969288ae32d3fe83c3eae963eb18f3a8bdfac168"


def test_pickled_after_use_it_carries_its_weights_once() -> None:
    sae = random_sae("topk", d=64, f=512, seed=1)
    sae = sae.calibrated(torch.randn(9, 64))
    fresh = len(pickle.dumps(sae))
    h = torch.randn(5, 64)
    wanted, hash_ = sae.read(h, [3, 5]), sae.weights_hash
    again = pickle.loads(pickle.dumps(sae))
    assert len(pickle.dumps(sae)) < fresh + 1000
    assert torch.equal(again.read(h, [3, 5]), wanted) and again.weights_hash == hash_
    assert again._encoder.W_FD.data_ptr() == again.W_enc_DF.data_ptr()


def test_sizes() -> None:
    sae = small()
    assert (sae.d_model, sae.d_sae, sae.meta.layer, sae.device.type) == (2, 4, 2, "cpu")


@pytest.mark.parametrize("ids", [[4], [-1], [0, 99]])
def test_feature_ids_out_of_range(ids: list[int]) -> None:
    with pytest.raises(InputError, match=rf"feature_ids: {ids[-1]} is not a feature .* 0 to 3"):
        small().read(torch.zeros(1, 2), ids)


# The public methods are typed and checked here; users' calls are not.
@pytest.mark.parametrize("ids", [[1.7], np.array([1.0]), torch.tensor([0.5]), ["1"], [False, True, False, False]])
def test_feature_ids_that_are_not_whole_numbers(ids: Iterable[object]) -> None:
    with pytest.raises(InputError, match="feature_ids: .* is not a whole number"):
        small()._feature_index(ids)


def test_feature_ids_of_any_kind() -> None:
    kinds = [range(1, 3), (1, 2), np.array([1, 2], np.uint8), torch.tensor([1, 2]), {1: 0, 2: 0}, (i for i in (1, 2))]
    for ids in kinds:
        assert small()._feature_index(ids).tolist() == [1, 2]


def test_residuals_of_another_width() -> None:
    for call in (small().encode, small().fvu, lambda h: small().read(h, [0])):
        with pytest.raises(InputError, match="reads width 2 but the residuals have width 3"):
            call(torch.zeros(4, 3))
    with pytest.raises(InputError, match="has 4 features but the activations have 3"):
        small().decode(torch.zeros(4, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_residuals_that_are_not_finite(value: float) -> None:
    h = torch.zeros(3, 2)
    h[1, 0] = value
    for call in (small().encode, small("relu").fvu, lambda h: small("jumprelu").read(h, [0])):
        with pytest.raises(InputError, match="1 of 3 residuals hold NaN or infinity"):
            call(h)


@pytest.mark.parametrize("h", [torch.zeros(0, 2), torch.ones(1, 2), torch.ones(4, 2)])
def test_fvu_needs_variance(h: Tensor) -> None:
    with pytest.raises(InputError, match=f"these {len(h)} do not differ"):
        small().fvu(h)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "k: 5 is not between 1 and the SAE's 4 features"),
        ({"k": 0}, "k: 0 is not"),
        ({"k": None}, "k: None is not"),
        ({"W_enc_DF": torch.full((2, 4), float("nan"))}, "W_enc_DF: .* NaN"),
        ({"b_dec_D": torch.full((2,), float("inf"))}, "b_dec_D: .* infinity"),
        ({"b_enc_F": torch.zeros(3)}, r"b_enc_F: shape \(3,\) is not \(4,\)"),
        ({"W_dec_FD": torch.zeros(2, 4)}, r"W_dec_FD: shape \(2, 4\) is not \(4, 2\)"),
        ({"W_enc_DF": torch.zeros(2, 0)}, "W_enc_DF: shape"),
        ({"W_enc_DF": torch.zeros(4)}, "W_enc_DF: shape"),
        ({"threshold_F": torch.zeros(4)}, "threshold_F: needed by jumprelu and only by it"),
    ],
)
def test_impossible_saes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(small(), **changes)  # type: ignore[arg-type]


def test_options_of_another_architecture() -> None:
    with pytest.raises(InputError, match="are for topk, not for relu"):
        small("relu", k=2)
    with pytest.raises(InputError, match="are for topk, not for jumprelu"):
        small("jumprelu", rescale_acts_by_decoder_norm=True)
    with pytest.raises(InputError, match="threshold_F"):
        small("jumprelu", threshold_F=None)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_a_residual_of_zeros_stays_one_however_it_is_normalised(architecture: str) -> None:
    plain = random_sae(architecture)
    h = torch.zeros(2, 6)
    for norm in ("layer_norm", "constant_norm_rescale"):
        sae = replace(plain, input_norm=norm)
        assert torch.equal(sae.encode(h), plain.encode(h)) and bool((plain.encode(h) > 0).any())
        assert torch.equal(sae.read(h, [1, 4]), plain.encode(h)[:, [1, 4]])
        assert torch.equal(sae.reader([1, 4])(h), plain.encode(h)[:, [1, 4]])
        assert torch.equal(sae.decode(sae.encode(h), h), h)


@pytest.mark.parametrize("norm", ["none", "center", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_feature_adds_its_decoder_row_in_the_residual_s_unit(norm: str, rescaled: bool) -> None:
    sae = random_sae("topk", input_norm=norm, rescale_acts_by_decoder_norm=rescaled)
    h = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 3 + 1
    acts = sae.encode(h)
    changed = acts.clone()
    changed[:, [2, 11]] += torch.tensor([1.5, -0.5])
    wanted = sae.decode(changed, h) - sae.decode(acts, h)
    added = torch.tensor([1.5, -0.5]) @ sae.decoder_rows([2, 11]) * sae.residual_unit(h)
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.norm(dim=-1).min() > 0.1
    with pytest.raises(InputError, match="feature_ids: 17 is not a feature"):
        sae.decoder_rows([17])
