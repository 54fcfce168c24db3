"""Training on a stream with known directions: what is learnt, what is measured, what is reported, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mechreward.sae.training as training
from mechreward.errors import InputError
from mechreward.sae import SAE, Checkpoint, SAEMeta, SAEShape, TrainedSAE, Watch, train_sae

META = SAEMeta(release="here", sae_id="x", layer=1, model_name="tiny", hook_name="model.layers.1")
D, K = 16, 2
SHAPE = SAEShape(d_model=D, d_sae=24, k=K)


def stream(n_batches: int = 10**6, seed: int = 0, size: int = 300) -> Iterator[Tensor]:
    """Sums of two of 16 orthogonal directions with strengths in [1, 2], around an offset."""
    g = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99)))
    for _ in range(n_batches):
        chosen = torch.rand(size, D, generator=g).topk(K).indices
        strength = torch.zeros(size, D).scatter_(1, chosen, 1 + torch.rand(size, K, generator=g))
        yield 7 * (strength @ directions) + 3


def trained(n_tokens: int = 60_000, **options: object) -> TrainedSAE:
    fixed = {"n_tokens": n_tokens, "meta": META, "batch_size": 256, "n_held_out": 2000, "lr": 4e-3}
    return train_sae(stream(), SHAPE, **{**fixed, **options})  # type: ignore[arg-type]


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

    out = train_sae(spied(), SHAPE, n_tokens=900, meta=META, batch_size=300, held_out=held)
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


@pytest.mark.parametrize(
    ("device", "kept"), [("cpu", []), ("cuda", [torch.device("cuda")]), ("cuda:1", [torch.device("cuda:1")])]
)
def test_the_generator_of_the_device_is_left_alone_too(
    device: str, kept: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[torch.device]] = []

    def fork(devices: list[torch.device]) -> None:
        asked.append(devices)
        raise KeyboardInterrupt  # there need be no such device here

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    with pytest.raises(KeyboardInterrupt):
        trained(n_tokens=2560, device=device)
    assert asked == [kept]


def test_quiet_and_reports_progress(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[int, float]] = []
    trained(n_tokens=2600, watch=Watch(on_step=lambda seen, loss: steps.append((seen, loss))))
    assert [seen for seen, _ in steps] == [256 * i for i in range(1, 11)]
    assert steps[-1][1] < steps[0][1]
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


def test_points_are_measured_on_held_out_tokens_by_the_sae_as_it_would_be_saved() -> None:
    points: list[TrainingPoint] = []
    whole = trained(n_tokens=2560, watch=Watch(on_point=points.append, every=4))
    assert [(point.step, point.tokens) for point in points] == [(4, 1024), (8, 2048), (10, 2560)]
    last = points[-1]
    assert (last.fvu, last.l0, last.dead_share) == (whole.fvu, whole.l0, whole.dead_share)
    assert points[0].fvu > points[1].fvu > last.fvu
    # Measuring leaves no trace in what is trained.
    assert trained(n_tokens=2560).sae.weights_hash == whole.sae.weights_hash
    # The point after four steps is that of the same weights and schedule, cut off there.
    stopped: list[Tensor] = []

    def stop(tokens: int, loss: float) -> None:
        stopped.append(torch.tensor([tokens, loss]))
        if len(stopped) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(n_tokens=2560, watch=Watch(on_step=stop))
    assert points[0].loss == pytest.approx(stopped[-1][1].item())


def test_points_on_the_way_use_the_first_held_out_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, seen = training._measured, []

    def spy(sae: SAE, held_out: Tensor) -> TrainedSAE:
        seen.append(held_out)
        return measured(sae, held_out)

    monkeypatch.setattr(training, "_measured", spy)
    monkeypatch.setattr(training, "EVAL_TOKENS", 100)
    trained(n_tokens=2560, watch=Watch(every=4))
    assert [len(held_out) for held_out in seen] == [100, 100, 2000]
    assert torch.equal(seen[0], seen[2][:100])


def test_frequencies_are_counted_on_held_out_tokens(topk: TrainedSAE) -> None:
    held = torch.cat([*stream(8)])[:2000]
    fired = (topk.sae.encode(held) > 0).float().mean(0)
    torch.testing.assert_close(topk.sae.frequency_F, fired)
    assert topk.sae.frequency_F.sum().item() == pytest.approx(topk.l0)


def test_the_size_of_the_residuals_does_not_matter() -> None:
    plain = trained(n_tokens=2560).sae
    larger = train_sae(
        (8 * batch for batch in stream()), SHAPE, n_tokens=2560, meta=META, batch_size=256, n_held_out=2000, lr=4e-3
    ).sae
    h = next(stream(1, seed=5))
    torch.testing.assert_close(larger.encode(8 * h), 8 * plain.encode(h), rtol=1e-3, atol=1e-3)


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
        ({"shape": replace(SHAPE, k=25)}, "k: 25 is not between 1 and the SAE's 24 features"),
        ({"n_tokens": 255}, "n_tokens: 255 is less than one batch of 256"),
        ({"batch_size": 0}, "batch_size: 0 is not at least 1"),
        ({"meta": SAEMeta("r", "", 4, "m", "model.layers.1")}, "meta.layer: 4 does not agree"),
        ({"n_held_out": 1}, "n_held_out: 1 is not at least 2"),
        ({"activations": stream(1)}, "the stream ended before 600 held-out"),
        ({"activations": stream(4)}, "the stream ended after 1 of 2 training batches"),
        ({"activations": iter([torch.ones(900, D)])}, "held_out: needs tokens"),
        ({"held_out": torch.randn(9, D + 1)}, "held_out: needs tokens"),
        ({"activations": iter([torch.zeros(3, D + 1)])}, rf"shape \(3, {D + 1}\) is not \[any, {D}\]"),
        ({"activations": iter([torch.full((3, D), float("nan"))])}, "a residual holds NaN or infinity"),
        ({"checkpoint": Checkpoint(Path("c.pt"), 1), "held_out": next(stream(1))}, "checkpoint: needs held_out and a"),
    ],
)
def test_wrong_input(changes: dict[str, object], message: str) -> None:
    options = {
        "activations": stream(), "shape": SHAPE, "n_tokens": 512, "meta": META, "batch_size": 256, "n_held_out": 600,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        train_sae(**{**options, **changes})  # type: ignore[arg-type]
