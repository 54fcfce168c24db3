"""Training on a stream with known directions; sae-lens' own inference form as the reference for the copied weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mechreward.sae.training as training
from mechreward.errors import InputError
from mechreward.sae import SAE, SAEMeta, TrainedSAE, train_sae

META = SAEMeta(release="here", sae_id="x", layer=1, model_name="tiny", hook_name="model.layers.1")
D, K = 16, 2


def stream(n_batches: int = 10**6, seed: int = 0, size: int = 300) -> Iterator[Tensor]:
    """Sums of two of 16 orthogonal directions with strengths in [1, 2], around an offset."""
    g = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99)))
    for _ in range(n_batches):
        chosen = torch.rand(size, D, generator=g).topk(K).indices
        strength = torch.zeros(size, D).scatter_(1, chosen, 1 + torch.rand(size, K, generator=g))
        yield 7 * (strength @ directions) + 3


def trained(architecture: str = "topk", n_tokens: int = 60_000, **options: object) -> TrainedSAE:
    return train_sae(
        stream(), d_model=D, d_sae=24, k=K, n_tokens=n_tokens, meta=META, architecture=architecture, batch_size=256,
        n_held_out=2000, lr=4e-3, **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def topk() -> TrainedSAE:
    return trained()


def test_learns_the_directions(topk: TrainedSAE) -> None:
    assert topk.fvu < 0.1
    assert topk.l0 <= K
    assert topk.dead_share < 0.5
    directions, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99)))
    cosines = torch.nn.functional.normalize(topk.sae.W_dec_FD, dim=-1) @ directions.T
    assert (cosines.max(0).values > 0.95).float().mean() > 0.8


def test_numbers_are_of_held_out_tokens(topk: TrainedSAE) -> None:
    # The first 2000 of the stream are set aside; the three numbers again, from definitions.
    held = torch.cat([*stream(8)])[:2000]
    acts = topk.sae.encode(held)
    rest = held - topk.sae.decode(acts)
    assert topk.n_held_out == 2000
    assert topk.fvu == pytest.approx((rest.pow(2).sum() / (held - held.mean(0)).pow(2).sum()).item(), rel=1e-4)
    assert topk.l0 == pytest.approx((acts > 0).sum().item() / 2000)
    assert topk.dead_share == pytest.approx((acts > 0).any(0).logical_not().float().mean().item())


def test_own_held_out_tokens_leave_the_stream_alone() -> None:
    held = next(stream(1, seed=5))
    seen: list[Tensor] = []

    def spied() -> Iterator[Tensor]:
        for batch in stream():
            seen.append(batch)
            yield batch

    out = train_sae(spied(), d_model=D, d_sae=24, k=K, n_tokens=900, meta=META, batch_size=300, held_out=held)
    assert (out.n_held_out, len(seen)) == (300, 3)
    assert out.fvu == pytest.approx(out.sae.fvu(held))


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = trained(n_tokens=2560, seed=1).sae.weights_hash
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert trained(n_tokens=2560, seed=1).sae.weights_hash == first
    assert trained(n_tokens=2560, seed=2).sae.weights_hash != first


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_copied_weights_are_the_inference_form_of_sae_lens(
    architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    from sae_lens import SAE as LensSAE

    kept: list[object] = []
    finished = training._finished

    def spy(lens_sae: object, meta: SAEMeta) -> SAE:
        kept.append(lens_sae)
        return finished(lens_sae, meta)

    monkeypatch.setattr(training, "_finished", spy)
    sae = trained(architecture, n_tokens=12_800).sae
    assert sae.architecture == {"topk": "topk", "batchtopk": "jumprelu"}[architecture]
    assert (sae.meta, sae.k) == (META, K if architecture == "topk" else None)
    kept[0].save_inference_model(tmp_path)  # type: ignore[attr-defined]
    lens = LensSAE.load_from_disk(tmp_path)  # type: ignore[arg-type]
    h = next(stream(1, seed=9))
    assert (sae.encode(h) > 0).sum() > 100
    torch.testing.assert_close(sae.encode(h), lens.encode(h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(h)), lens.decode(lens.encode(h)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=-1), torch.ones(24))


def test_quiet_and_reports_progress(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, float]] = []
    trained(n_tokens=2600, on_step=lambda seen, loss: steps.append((seen, loss)))
    assert [seen for seen, _ in steps] == [256 * i for i in range(1, 11)]
    assert steps[-1][1] < steps[0][1]
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


def test_works_under_no_grad() -> None:
    with torch.no_grad():
        assert trained(n_tokens=2560, seed=1).sae.weights_hash == trained(n_tokens=2560, seed=1).sae.weights_hash


def test_rebatched_cuts_any_stream_into_even_batches() -> None:
    chunks = [torch.arange(a, b).float()[:, None] for a, b in [(0, 3), (3, 3), (3, 14), (14, 15)]]
    assert [batch[:, 0].tolist() for batch in training._rebatched(chunks, 4, 1)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k: 0 is not between 1 and the SAE's 24 features"),
        ({"k": 25}, "k: 25 is not between 1"),
        ({"d_sae": 0}, "d_sae: 0 is not at least 1"),
        ({"n_tokens": 255}, "n_tokens: 255 is less than one batch of 256"),
        ({"architecture": "gated"}, "architecture: 'gated' cannot be trained"),
        ({"meta": SAEMeta("r", "", 4, "m", "model.layers.1")}, "meta.layer: 4 does not agree"),
        ({"n_held_out": 1}, "n_held_out: 1 is not at least 2"),
        ({"activations": stream(1)}, "the stream ended before 600 held-out"),
        ({"activations": stream(4)}, "the stream ended after 1 of 2 training batches"),
        ({"activations": iter([torch.ones(900, D)])}, "held_out: needs tokens"),
        ({"held_out": torch.randn(9, D + 1)}, "held_out: needs tokens"),
        ({"activations": iter([torch.zeros(3, D + 1)])}, rf"shape \(3, {D + 1}\) is not \[any, {D}\]"),
        ({"activations": iter([torch.full((3, D), float("nan"))])}, "a residual holds NaN or infinity"),
    ],
)
def test_wrong_input(changes: dict[str, object], message: str) -> None:
    options = {
        "activations": stream(), "d_model": D, "d_sae": 24, "k": K, "n_tokens": 512, "meta": META, "batch_size": 256,
        "n_held_out": 600,
    }  # fmt: skip
    options = {**options, **changes}
    if "architecture" in changes:
        # The type says so already; the sentence is for callers without a type checker.
        with pytest.raises(InputError, match=message):
            training._check_options(D, 24, K, 512, 256, "gated", META)
        return
    with pytest.raises(InputError, match=message):
        train_sae(**options)  # type: ignore[arg-type]
