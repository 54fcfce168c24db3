"""The activation iterator against `read_residuals` row by row: which tokens come, how often, and in what order."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.models import LoadedModel, block_name, read_residuals
from mechreward.sae import ActivationStream, activation_batches
from mechreward.sae.activations import first_tokens

BOS, EOS, PAD = 0, 1, 2
LAYER = 1
ROWS = [([BOS, 5 + i, 9], [10 + (i + j) % 40 for j in range(1 + 3 * (i % 5))] + [EOS]) for i in range(30)]


@pytest.fixture(scope="module")
def loaded(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


def expected(loaded: LoadedModel, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """The same states, row by row in order."""
    states = [read_residuals(loaded.model, [prompt], [completion], LAYER)[0][0] for prompt, completion in rows]
    return torch.cat(states)


def in_order(x_ND: Tensor) -> Tensor:
    """Rows sorted, so that two sets of states can be compared whatever their order."""
    return x_ND[torch.argsort(x_ND[:, 0])]


def test_every_completion_token_once_in_full_batches(loaded: LoadedModel) -> None:
    batches = list(activation_batches(loaded, ROWS, LAYER, batch_size=32, buffer_size=100))
    want = expected(loaded, ROWS)
    assert [len(batch) for batch in batches] == [32] * (len(want) // 32) + [len(want) % 32]
    torch.testing.assert_close(in_order(torch.cat(batches)), in_order(want), atol=1e-5, rtol=1e-5)


def test_prompts_by_option_without_their_first_token(loaded: LoadedModel) -> None:
    got = torch.cat(list(activation_batches(loaded, ROWS, LAYER, batch_size=8, buffer_size=64, include_prompt=True)))
    want = expected(loaded, [(prompt[:1], prompt[1:] + completion) for prompt, completion in ROWS])
    assert len(got) == sum(2 + len(completion) for _, completion in ROWS)
    torch.testing.assert_close(in_order(got), in_order(want), atol=1e-5, rtol=1e-5)


def test_special_tokens_are_left_out_wherever_they_are_but_eos_stays(loaded: LoadedModel) -> None:
    row = ([BOS, 7], [11, BOS, 12, PAD, 13, EOS])
    states = expected(loaded, [row])
    got = torch.cat(list(activation_batches(loaded, [row], LAYER, batch_size=2, buffer_size=4, outlier_factor=1e9)))
    torch.testing.assert_close(in_order(got), in_order(states[[0, 2, 4, 5]]), atol=1e-5, rtol=1e-5)
    chosen = activation_batches(loaded, [row], LAYER, batch_size=2, buffer_size=4, outlier_factor=1e9, exclude_ids=[12])
    got = torch.cat(list(chosen))
    torch.testing.assert_close(in_order(got), in_order(states[[0, 1, 3, 4, 5]]), atol=1e-5, rtol=1e-5)


def test_massive_norm_tokens_are_left_out(loaded: LoadedModel) -> None:
    row = ROWS[4]
    states = expected(loaded, [row])
    norms = states.norm(dim=-1)
    factor = 1.02
    kept = norms <= factor * norms.median()
    assert 0 < kept.sum() < len(norms)
    got = torch.cat(list(activation_batches(loaded, [row], LAYER, batch_size=2, buffer_size=4, outlier_factor=factor)))
    torch.testing.assert_close(in_order(got), in_order(states[kept]), atol=1e-5, rtol=1e-5)


def test_order_follows_the_seed_and_mixes_rows(loaded: LoadedModel) -> None:
    def stream(seed: int) -> Tensor:
        return torch.cat(list(activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=400, seed=seed)))

    assert torch.equal(stream(3), stream(3))
    assert not torch.equal(stream(3), stream(4))
    want = expected(loaded, ROWS)
    owner = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor([len(completion) for _, completion in ROWS]))
    nearest = torch.cdist(stream(3)[:16], want).argmin(1)
    assert len(set(owner[nearest].tolist())) >= 8  # 16 tokens of 30 rows: a batch is not one row
    # A buffer smaller than the data is filled from rows anywhere in the list, not from its front.
    first = next(activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=32, seed=3))
    assert owner[torch.cdist(first, want).argmin(1)].max() >= 15


def test_epochs_repeat_every_token(loaded: LoadedModel) -> None:
    once = in_order(torch.cat(list(activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=64))))
    twice = torch.cat(list(activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=64, epochs=2)))
    torch.testing.assert_close(in_order(twice), in_order(torch.cat([once, once])), atol=1e-5, rtol=1e-5)
    endless = activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=64, epochs=None)
    assert sum(len(next(endless)) for _ in range(3 * len(once) // 16)) > 2 * len(once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "rows: there are none"),
        ({"buffer_size": 15}, "buffer_size: 15 is not at least two batches of batch_size=8"),
        ({"batch_size": 0}, "buffer_size: 64 is not at least two batches of batch_size=0"),
        ({"epochs": 0}, "epochs: 0 is not at least 1"),
        ({"reuse": 0}, "reuse: 0 is not at least 1"),
    ],
)
def test_wrong_options_at_once(loaded: LoadedModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        activation_batches(
            loaded,
            layer=LAYER,
            **{"rows": ROWS, "batch_size": 8, "buffer_size": 64, **options},  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("epochs", [1, None])
def test_nothing_left_to_read_ends_with_a_sentence(loaded: LoadedModel, epochs: int | None) -> None:
    stream = activation_batches(loaded, ROWS, LAYER, batch_size=8, buffer_size=16, epochs=epochs, exclude_ids=range(64))
    with pytest.raises(InputError, match="no token is left to read"):
        next(stream)


BLOCKS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "gemma2": "model.layers",
    "deepseek_v3": "model.layers",
    "qwen3_5": "model.layers",
    "qwen3_5_image_text": "model.language_model.layers",
    "qwen3_5_moe": "model.layers",
    "gemma4": "model.layers",
    "gemma4_image_text": "model.language_model.layers",
}


def by_hand(model: PreTrainedModel, path: str, ids: list[int]) -> Tensor:
    """One row through the whole model, the block hooked by its path; no padding, no early stop."""
    kept: list[Tensor] = []
    block = model.get_submodule(path)
    handle = block.register_forward_hook(lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return kept[0].reshape(len(ids), -1)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", sorted(BLOCKS))
def test_every_family_gives_the_states_of_a_plain_forward(
    tiny_model: Callable[[str], PreTrainedModel], char_tokenizer: PreTrainedTokenizerFast, family: str, layer: int
) -> None:
    model = tiny_model(family)
    assert block_name(model, layer) == f"{BLOCKS[family]}.{layer}"
    rng = random.Random(0)
    rows = [([BOS, 5], [*rng.choices(range(4, 59), k=3 + 4 * i), *([EOS] if i % 2 else [])]) for i in range(6)]
    path = f"{BLOCKS[family]}.{layer}"
    want = torch.cat([by_hand(model, path, [*prompt, *completion])[2:] for prompt, completion in rows])
    stream = activation_batches(
        LoadedModel(model, char_tokenizer, family),
        rows,
        layer,
        batch_size=16,
        buffer_size=48,
        read_batch_size=4,
        outlier_factor=1e9,
    )
    got = torch.cat(list(stream))
    assert got.shape == want.shape
    # One to one: each state is that of its own token, and no two tokens have states as close as that.
    distance = torch.cdist(got, want, compute_mode="donot_use_mm_for_euclid_dist")
    own = distance.argmin(1)
    assert sorted(own.tolist()) == list(range(len(want)))
    torch.testing.assert_close(got, want[own], atol=1e-4, rtol=1e-4)
    assert distance.topk(2, largest=False).values[:, 1].min() > 1e-2 * want.norm(dim=-1).mean()


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_stream_taken_up_again_goes_on_with_the_same_batches(loaded: LoadedModel, reuse: int) -> None:
    def fresh() -> ActivationStream:
        return activation_batches(
            loaded, ROWS, LAYER, batch_size=16, buffer_size=96, seed=3, epochs=2, reuse=reuse, read_batch_size=2
        )

    whole = list(fresh())
    assert len(whole) > 24
    for taken in (0, 1, 11, 23, len(whole)):
        stream = fresh()
        for _ in range(taken):
            next(stream)
        state = stream.state_dict()
        next(stream, None)  # what is read after the state was taken does not change it
        resumed = fresh()
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert len(rest) == len(whole) - taken
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[taken:], strict=True))


def test_a_state_does_not_hold_the_rows_again(loaded: LoadedModel) -> None:
    stream = activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=96, epochs=None)
    next(stream)
    state = stream.state_dict()
    assert set(state) == {"group", "chunk", "held", "pool", "order", "passes", "generator"}
    # What is left of the buffer, and no more.
    assert 96 <= len(state["held"]) + len(state["pool"]) <= 96 + 32 * 14


def test_reuse_hands_each_half_buffer_out_again_in_another_order(loaded: LoadedModel) -> None:
    def stream(reuse: int) -> list[Tensor]:
        return list(activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=400, reuse=reuse))

    once, thrice = torch.cat(stream(1)), torch.cat(stream(3))
    assert len(thrice) == 3 * len(once) < 3 * 400
    for start in (0, len(once), 2 * len(once)):
        again = thrice[start : start + len(once)]
        assert torch.equal(in_order(again), in_order(once))
        assert torch.equal(again, once) == (start == 0)


def test_first_tokens(loaded: LoadedModel) -> None:
    def stream() -> ActivationStream:
        return activation_batches(loaded, ROWS, LAYER, batch_size=16, buffer_size=96)

    whole = torch.cat(list(stream()))
    assert torch.equal(first_tokens(stream(), 21), whole[:21])
    assert torch.equal(first_tokens(stream()), whole)
    assert torch.equal(first_tokens(stream(), 10**6), whole)
