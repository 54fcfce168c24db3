"""`read` against the same columns of `encode`: the same support exactly, values to 1e-6; and how much work it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mechreward.sae.reading as reading
import mechreward.sae.sae as sae_module
from mechreward.sae import SAE, SAEMeta, load_sae
from mechreward.sae.arithmetic import Encoder
from mechreward.tiny import SAE_FOLDER

META = SAEMeta(release="r", sae_id="s", layer=2, model_name="m", hook_name="model.layers.2")
D, F = 6, 40


def random_sae(architecture: str, seed: int = 0, **changes: Any) -> SAE:
    g = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"k": 3} if architecture == "topk" else {}
    if architecture == "jumprelu":
        options["threshold_F"] = torch.rand(F, generator=g)
    if architecture == "gated":
        options |= {"b_gate_F": torch.randn(F, generator=g), "r_mag_F": torch.randn(F, generator=g)}
    tensors = [torch.randn(shape, generator=g) for shape in ((D, F), (F,), (F, D), (D,))]
    return SAE(architecture, *tensors, META, **{**options, **changes})  # type: ignore[arg-type]


def assert_reads_as_encoded(sae: SAE, h: Tensor, ids: list[int]) -> None:
    wanted, got = sae.encode(h)[..., ids], sae.read(h, ids)
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert torch.equal(got > 0, wanted > 0)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    architecture=st.sampled_from(["topk", "topk", "topk", "relu", "jumprelu", "gated"]),
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(), (0,), (1,), (23,), (2, 5), (3, 0)]),
    k=st.sampled_from([1, 2, 3, 8, F - 1, F]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    norm=st.sampled_from(["none", "none", "layer_norm", "constant_norm_rescale"]),
    ids=st.lists(st.integers(0, F - 1), max_size=6),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3)),
)
def test_read_is_encode_indexed(
    architecture: str,
    seed: int,
    shape: tuple[int, ...],
    k: int,
    flags: tuple[bool, bool, bool, bool],
    norm: str,
    ids: list[int],
    sizes: tuple[int, int, int],
) -> None:
    rescale, subtract, coarse, calibrated = flags
    options = {"k": k, "rescale_acts_by_decoder_norm": rescale} if architecture == "topk" else {}
    sae = random_sae(architecture, seed, apply_b_dec_to_input=subtract, input_norm=norm, **options)
    if coarse:  # small whole numbers: many ties
        sae = replace(sae, W_enc_DF=sae.W_enc_DF.round(), b_enc_F=sae.b_enc_F.round(), b_dec_D=sae.b_dec_D.round())
    g = torch.Generator().manual_seed(seed + 1)
    h = torch.randn(*shape, D, generator=g)
    h = h.round() if coarse and norm == "none" else h
    if calibrated:
        sae = sae.calibrated(torch.randn(50, D, generator=g))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_module, "BLOCK_TOKENS", sizes[0])
        patch.setattr(sae_module, "BLOCK_BYTES", 0)
        patch.setattr(sae_module, "INPUT_BYTES", 4 * D * sizes[1])
        patch.setattr(reading, "FIRST_STAGE", sizes[2])
        patch.setattr(reading, "STAGE_FLOATS", 8)
        assert_reads_as_encoded(sae, h, ids)


@pytest.mark.parametrize("k", [1, 3, F])
def test_adversarial_rows(k: int) -> None:
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


def test_equal_features_keep_the_lowest_ids() -> None:
    sae = replace(random_sae("topk"), W_enc_DF=torch.zeros(D, F), b_enc_F=torch.ones(F))
    assert sae.read(torch.randn(2, D), [0, 2, 3, 39]).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2
    # Whatever the order in which features are tried.
    tried_backwards = replace(sae, frequency_F=torch.arange(F) / F)
    assert tried_backwards.read(torch.randn(1, D), [0, 2, 3, 39]).tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
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
    """Rows encoded, rows counted on all features, and rows and features of each stage, as `read` goes along."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded: list[int] = []
        self.counted: list[int] = []
        self.staged: list[tuple[int, list[int]]] = []
        activations, counted, exceeding = Encoder.activations, reading._counted, reading._exceeding

        def spy_full(encoder: Encoder, x_ND: Tensor, ids_K: Tensor | None = None) -> Tensor:
            self.encoded.append(len(x_ND))
            return activations(encoder, x_ND, ids_K)

        def spy_counted(encoder: Encoder, x_SD: Tensor, margin_S: Tensor, ids_K: Tensor) -> Tensor:
            self.counted.append(len(x_SD))
            return counted(encoder, x_SD, margin_S, ids_K)

        def spy_stage(encoder: Encoder, x_ND: Tensor, rows_M: Tensor, bar_N: Tensor, ids_S: Tensor) -> Tensor:
            self.staged.append((len(rows_M), ids_S.tolist()))
            return exceeding(encoder, x_ND, rows_M, bar_N, ids_S)

        monkeypatch.setattr(Encoder, "activations", spy_full)
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
    assert (work.counted, work.encoded) == ([20], [])


def test_only_what_counts_leave_open_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Features 0 and 1 are one, and the ninth on ten tokens, where nine are kept: the rule says which of the two.
    sae, h = few_fire_often(140)
    columns = [0, 0, *range(2, 64)]
    sae = replace(sae, W_enc_DF=sae.W_enc_DF[:, columns], k=9)
    h[::14, 0] = 1.5
    h[0, 56] = 0  # room for both
    work = Work(monkeypatch)
    assert (sae.read(h, [0, 1]) > 0).sum(0).tolist() == [10, 1]
    assert work.encoded == [9]


def test_blocks_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, h = few_fire_often(140)
    monkeypatch.setattr(sae_module, "BLOCK_TOKENS", 7)
    monkeypatch.setattr(sae_module, "BLOCK_BYTES", 0)
    work = Work(monkeypatch)
    sae.read(h, [0, 3, 63])
    assert sum(work.counted) == 140
    assert max(work.counted) == 7


def test_nothing_positive_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = replace(random_sae("topk"), b_enc_F=torch.full((F,), -1e3))
    work = Work(monkeypatch)
    assert sae.read(torch.randn(9, D), [1, 2]).count_nonzero() == 0
    assert (work.encoded, work.counted, work.staged) == ([], [], [])


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
