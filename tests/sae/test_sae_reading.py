"""`read` against the same columns of `encode`: the same support exactly, values to 1e-6; and how much work it does.

Half-precision counts, which a GPU gets, are put on the CPU here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mechreward.sae.reading as reading
from mechreward.sae import SAE, SAEMeta, load_sae
from mechreward.sae.arithmetic import Encoder
from mechreward.sae.screening import Screen, float16_screen
from mechreward.tiny import SAE_FOLDER

META = SAEMeta(release="r", sae_id="s", layer=2, model_name="m", hook_name="model.layers.2")
D, F = 6, 40


def assert_reads_as_encoded(sae: SAE, h: Tensor, ids: list[int]) -> None:
    wanted, got = sae.encode(h)[..., ids], sae.read(h, ids)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert torch.equal(got > 0, wanted > 0)
    # Where large terms cancel, values are as good as float32 makes the sum.
    rounding = sae._encoder.margin(sae._inputs(sae._rows(h))).amax().item() if h.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=max(1e-6, rounding))


@settings(max_examples=150, deadline=None)
@given(
    architecture=st.sampled_from(["topk", "topk", "topk", "relu", "jumprelu", "gated"]),
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(), (0,), (1,), (23,), (2, 5), (3, 0)]),
    k=st.sampled_from([1, 2, 3, 8, F - 1, F]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    norm=st.sampled_from(["none", "none", "center", "layer_norm", "constant_norm_rescale"]),
    ids=st.lists(st.integers(0, F - 1), max_size=6),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3)),
    half=st.booleans(),
    powers=st.tuples(*[st.sampled_from([0, 0, 0, -9, -3, 4, 9])] * 3),
)
def test_read_is_encode_indexed(
    random_sae: Callable[..., SAE],
    architecture: str,
    seed: int,
    shape: tuple[int, ...],
    k: int,
    flags: tuple[bool, bool, bool, bool],
    norm: str,
    ids: list[int],
    sizes: tuple[int, int, int],
    half: bool,
    powers: tuple[int, int, int],
) -> None:
    rescale, subtract, coarse, calibrated = flags
    options = {"k": k, "rescale_acts_by_decoder_norm": rescale} if architecture == "topk" else {}
    sae = random_sae(architecture, seed, apply_b_dec_to_input=subtract, input_norm=norm, **options)
    if coarse:  # small whole numbers: many ties
        sae = replace(sae, W_enc_DF=sae.W_enc_DF.round(), b_enc_F=sae.b_enc_F.round(), b_dec_D=sae.b_dec_D.round())
    g = torch.Generator().manual_seed(seed + 1)
    h = torch.randn(*shape, D, generator=g)
    h = h.round() if coarse else h
    if calibrated:
        sae = sae.calibrated(torch.randn(50, D, generator=g))
    # Numbers that half precision cannot hold, in the weights, the biases and some of the tokens.
    sae = replace(sae, W_enc_DF=sae.W_enc_DF * 10.0 ** powers[0], b_enc_F=sae.b_enc_F * 10.0 ** powers[1])
    h = h * torch.where(torch.rand(*shape, 1, generator=g) < 0.5, 10.0 ** powers[2], 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_TOKENS", sizes[0])
        patch.setattr(reading, "FIRST_STAGE", sizes[2])
        patch.setattr(reading, "half_pays", lambda _: half)
        patch.setattr(reading, "ON_CPU", reading.Sizes(stage=8, piece=8 * F, block=0, inputs=D * sizes[1]))
        assert_reads_as_encoded(sae, h, ids)


@pytest.mark.parametrize("k", [1, 3, F])
def test_adversarial_rows(random_sae: Callable[..., SAE], k: int) -> None:
    base = random_sae("topk", k=k)
    rows = torch.randn(40, D)
    # All pre-activations negative; all equal; every feature twice; a chosen feature exactly at the k-th value.
    for sae in (
        replace(base, b_enc_F=torch.full((F,), -1e3)),
        replace(base, W_enc_DF=torch.zeros(D, F), b_enc_F=torch.ones(F)),
        replace(base, W_enc_DF=base.W_enc_DF[:, :20].repeat(1, 2), b_enc_F=base.b_enc_F[:20].repeat(2)),
        replace(base, W_enc_DF=base.W_enc_DF[:, :20].repeat_interleave(2, 1), b_enc_F=torch.zeros(F)),
    ):
        for ids in ([0, 1, 19, 20, 39], [39, 0, 39], [7]):
            assert_reads_as_encoded(sae, rows, ids)
    assert replace(base, b_enc_F=torch.full((F,), -1e3)).read(rows, [0, 5]).count_nonzero() == 0


def test_equal_features_keep_the_lowest_ids(random_sae: Callable[..., SAE]) -> None:
    sae = replace(random_sae("topk"), W_enc_DF=torch.zeros(D, F), b_enc_F=torch.ones(F))
    assert sae.read(torch.randn(2, D), [0, 2, 3, 39]).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    # Whatever the order in which features are tried.
    tried_backwards = replace(sae, frequency_F=torch.arange(F) / F)
    assert tried_backwards.read(torch.randn(1, D), [0, 2, 3, 39]).tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(random_sae: Callable[..., SAE], dtype: torch.dtype) -> None:
    assert_reads_as_encoded(random_sae("topk"), torch.randn(30, D).to(dtype), [4, 4, 11])


def test_the_bundled_sae() -> None:
    sae = load_sae(SAE_FOLDER)
    # Sums of decoder rows look like the residuals it was made for: few features, clearly active.
    g = torch.Generator().manual_seed(0)
    h = sae.decode(torch.rand(300, sae.d_sae, generator=g).pow(60) * 5)
    ids = torch.randperm(sae.d_sae, generator=g)[:20].tolist()
    assert (sae.read(h, ids) > 0).any()
    for tested in (sae, sae.calibrated(h)):
        assert_reads_as_encoded(tested, h, ids)


def few_fire_often(n: int) -> tuple[SAE, Tensor]:
    """64 features that are the axes; the last 8 fire on every token, any other on one token in fourteen."""
    f = 64
    sae = SAE("topk", torch.eye(f), torch.zeros(f), torch.eye(f), torch.zeros(f), META, k=8)
    h = torch.rand(n, f)
    h[:, -8:] += 2
    rare = torch.arange(n) % 14
    h[torch.arange(n), rare] += 5
    return sae, h


class Work:
    """Rows counted on all features, rows and features of each stage, and pairs ranked exactly, as `read` goes along."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted: list[int] = []
        self.settled: list[list[tuple[int, int]]] = []
        self.staged: list[tuple[int, list[int]]] = []
        exact, counted, exceeding = reading._exact, reading._counted, reading._exceeding

        def spy_exact(encoder: Encoder, x_SD: Tensor, row_M: Tensor, id_M: Tensor) -> Tensor:
            self.settled.append(list(zip(row_M.tolist(), id_M.tolist(), strict=True)))
            return exact(encoder, x_SD, row_M, id_M)

        def spy_counted(encoder: Encoder, x_SD: Tensor, *args: Any) -> Tensor:
            self.counted.append(len(x_SD))
            return counted(encoder, x_SD, *args)

        def spy_stage(screen: Screen, rows_M: Tensor, bar_N: Tensor, ids_S: Tensor) -> Tensor:
            self.staged.append((len(rows_M), ids_S.tolist()))
            return exceeding(screen, rows_M, bar_N, ids_S)

        monkeypatch.setattr(reading, "_exact", spy_exact)
        monkeypatch.setattr(reading, "_counted", spy_counted)
        monkeypatch.setattr(reading, "_exceeding", spy_stage)


def test_only_tokens_with_an_active_chosen_feature_meet_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, h = few_fire_often(140)
    monkeypatch.setattr(reading, "FIRST_STAGE", 1)
    sae = sae.calibrated(h)
    work = Work(monkeypatch)
    active = sae.read(h, [0, 3]) > 0
    assert active.sum().item() == 20
    # The eight that always fire are tried first and are enough for the 120 others; the second stage lets no token go.
    assert sorted(work.staged[0][1]) == list(range(56, 64))
    assert [rows for rows, _ in work.staged] == [140, 20]
    assert (work.counted, work.settled) == ([20], [])


def test_only_what_counts_leave_open_is_ranked_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    # Features 0 and 1 are one, and the ninth on ten tokens, where nine are kept: the rule says which of the two.
    sae, h = few_fire_often(140)
    columns = [0, 0, *range(2, 64)]
    sae = replace(sae, W_enc_DF=sae.W_enc_DF[:, columns], k=9)
    h[::14, 0] = 1.5
    h[0, 56] = 0  # room for both
    work = Work(monkeypatch)
    assert (sae.read(h, [0, 1]) > 0).sum(0).tolist() == [10, 1]
    asked, near = work.settled
    assert len(asked) == 18 and set(asked) == {(row, feature) for row, _ in asked for feature in (0, 1)}
    # Each of the pairs met both, itself and the one it ties with; what both met was computed once.
    assert sorted(near) == sorted(asked)


def test_what_is_near_several_chosen_features_is_computed_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # All features of a token tie, and every chosen one meets all of them: 40 x 20 x 40 pairs, of 40 x 40 products.
    g = torch.Generator().manual_seed(0)
    W_enc_DF = torch.randn(D, 1, generator=g).abs().expand(D, F)
    sae = SAE("topk", W_enc_DF, torch.zeros(F), torch.randn(F, D, generator=g), torch.zeros(D), META, k=5)
    sae = replace(sae, apply_b_dec_to_input=False)
    work = Work(monkeypatch)
    assert_reads_as_encoded(sae, torch.rand(40, D, generator=g), list(range(0, F, 2)))
    asked, near = work.settled
    assert (len(asked), len(near)) == (40 * 20, 40 * F)


def test_half_precision_counts_leave_little_open(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g) / 8 for shape in ((64, 512), (512,), (512, 64), (64,))]
    sae = SAE("topk", *tensors, META, k=16)
    h = torch.randn(500, 64, generator=g)
    monkeypatch.setattr(reading, "half_pays", lambda _: True)
    work = Work(monkeypatch)
    assert_reads_as_encoded(sae, h, [3, 70, 200, 311])
    asked, near = work.settled
    # 2,000 pairs; |x| |w| is 8 deviations of a pre-activation here, the margin an eightieth of one.
    assert 0 < len(asked) < 40
    assert len(near) < 10 * len(asked)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("powers", [(0, 0, 0), (-9, 0, 0), (0, 6, 0), (0, -6, 4), (5, 5, -7)])
def test_the_margin_of_half_precision_holds(
    random_sae: Callable[..., SAE], powers: tuple[int, int, int], scale: bool
) -> None:
    g = torch.Generator().manual_seed(1)
    weight, bias, size = (10.0**power for power in powers)
    sae = replace(random_sae("topk", rescale_acts_by_decoder_norm=scale), W_dec_FD=torch.rand(F, D, generator=g) * 5)
    sae = replace(sae, W_enc_DF=sae.W_enc_DF * weight, b_enc_F=sae.b_enc_F * bias)
    x_ND = torch.randn(200, D, generator=g) * size * torch.rand(200, 1, generator=g) ** 8
    truth = x_ND.double() @ sae.W_enc_DF.double() + sae.b_enc_F.double()
    if scale:
        truth *= sae.W_dec_FD.double().norm(dim=-1)
    screen = float16_screen(sae._encoder, x_ND, sae._encoder.margin(x_ND)[:, 0])
    error_N = (screen.pre(torch.arange(200)).double() * screen.unit - truth).abs().amax(-1)
    assert (error_N <= screen.margin_N.double()).all()
    # And it is no more than a few times what is seen.
    assert (screen.margin_N.double() < 40 * error_N.amax()).any()
    part = screen.part(torch.tensor([5, 2]))
    assert torch.equal(part.pre(torch.tensor([7])), screen.pre(torch.tensor([7]))[:, [5, 2]])


@pytest.mark.parametrize("half", [False, True])
def test_values_that_rounding_could_take_for_zero(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    # Beside 1,000 a millionth is far within the margin; the exact product still says that it is above zero.
    sae = SAE("topk", torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), META, k=8)
    monkeypatch.setattr(reading, "half_pays", lambda _: half)
    h = torch.zeros(1, 8)
    h[0, :3] = torch.tensor([1e3, 1e-6, -1e-6])
    assert sae.read(h, [1, 2, 3, 0]).tolist() == [[h[0, 1].item(), 0.0, 0.0, 1e3]]
    assert sae.read(h, [1, 2]).tolist() == [[h[0, 1].item(), 0.0]]
    assert torch.equal(sae.encode(h)[:, [1, 2, 3, 0]] > 0, torch.tensor([[True, False, False, True]]))


def test_blocks_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, h = few_fire_often(140)
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 7)
    monkeypatch.setattr(reading, "ON_CPU", reading.Sizes(block=0))
    work = Work(monkeypatch)
    sae.read(h, [0, 3, 63])
    assert sum(work.counted) == 140
    assert max(work.counted) == 7


@pytest.mark.parametrize(
    ("device", "n_features", "tokens"),
    [
        ("cpu", 1024, 1024),  # 4 MiB of float32
        ("cpu", 8192, 128),
        ("cpu", 2**20, 128),
        ("cuda", 1024, 65536),  # 256 MiB
        ("cuda:1", 40960, 1638),
        ("cuda", 2**20, 128),
    ],
)
def test_a_gpu_is_given_larger_blocks(device: str, n_features: int, tokens: int) -> None:
    assert reading.block_tokens(n_features, torch.device(device)) == tokens


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 4096), ("cuda", 52428)])
def test_a_gpu_is_given_more_tokens_at_a_time(device: str, tokens: int) -> None:
    assert reading.input_tokens(2560, torch.device(device)) == tokens
    assert reading.input_tokens(2**40, torch.device(device)) == 1


def test_nothing_positive_costs_nothing(random_sae: Callable[..., SAE], monkeypatch: pytest.MonkeyPatch) -> None:
    sae = replace(random_sae("topk"), b_enc_F=torch.full((F,), -1e3))
    work = Work(monkeypatch)
    assert sae.read(torch.randn(9, D), [1, 2]).count_nonzero() == 0
    assert (work.settled, work.counted, work.staged) == ([], [], [])


def test_stages_grow_and_cover() -> None:
    assert list(reading._stages(60, 8)) == [(0, 8), (8, 20), (20, 38), (38, 60)]
    assert list(reading._stages(5, 8)) == [(0, 5)]


def test_calibration_counts_what_fires() -> None:
    sae, h = few_fire_often(140)
    frequency = sae.calibrated(h.view(10, 14, 64)).frequency_F
    assert frequency is not None
    wanted = (sae.encode(h) > 0).float().mean(0)
    torch.testing.assert_close(frequency, wanted)
    assert frequency[:14].tolist() == pytest.approx([1 / 14] * 14)
    assert sae.calibrated(h).weights_hash == sae.weights_hash
