"""Training an SAE on a model's own rows: what is trained on, what is only measured on, and the errors."""

from __future__ import annotations

import random

import pytest

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.sae import ActivationStream, SAEMeta, activation_batches, own, own_shape, train_own_sae

META = SAEMeta("own", "", 1, "tiny", "model.layers.1")
OPTIONS = {"meta": META, "n_tokens": 2048, "batch_size": 128, "lr": 2e-3}


def rows(n: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(0)
    return [([0, *rng.choices(range(4, 60), k=4)], rng.choices(range(4, 60), k=20)) for _ in range(n)]


def test_one_row_in_twenty_is_only_measured_on(tiny_llama: object, char_tokenizer: object) -> None:
    pytest.importorskip("sae_lens")
    loaded = LoadedModel(model=tiny_llama, tokenizer=char_tokenizer, name="tiny")
    given, shape = rows(60), own_shape(loaded, expansion=2, k=4)
    trained = train_own_sae(loaded, given, shape, **OPTIONS)
    # Three rows of 24 tokens after BOS; the rest, seen or not, has no part in the measure.
    assert trained.n_held_out == 3 * 24
    assert (trained.sae.d_model, trained.sae.d_sae, trained.sae.k) == (32, 64, 4)
    assert trained.l0 == pytest.approx(4.0)
    changed = [row if at % 20 == 0 else ([0, 5], [6] * 20) for at, row in enumerate(given)]
    other = train_own_sae(loaded, changed, shape, **OPTIONS)
    assert other.n_held_out == trained.n_held_out
    assert other.fvu > trained.fvu
    again = train_own_sae(loaded, given, shape, **OPTIONS)
    assert again.sae.weights_hash == trained.sae.weights_hash


def test_too_few_rows(tiny_llama: object, char_tokenizer: object) -> None:
    loaded = LoadedModel(model=tiny_llama, tokenizer=char_tokenizer, name="tiny")
    with pytest.raises(InputError, match="rows: 19 are too few"):
        train_own_sae(loaded, rows(19), own_shape(loaded, expansion=2, k=4), meta=META, n_tokens=2048)


@pytest.mark.parametrize(("options", "buffers"), [({}, [72, 1368]), ({"n_held_out": 50, "reuse": 2}, [64, 1024])])
def test_no_more_is_buffered_than_is_wanted(
    tiny_llama: object,
    char_tokenizer: object,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, int],
    buffers: list[int],
) -> None:
    loaded = LoadedModel(model=tiny_llama, tokenizer=char_tokenizer, name="tiny")
    asked: list[int] = []

    def spy(*arguments: object, buffer_size: int, **rest: object) -> ActivationStream:
        asked.append(buffer_size)
        return activation_batches(*arguments, buffer_size=buffer_size, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(own, "activation_batches", spy)
    given = [([0], [*prompt[1:], *completion]) for prompt, completion in rows(60)]
    shape = own_shape(loaded, expansion=2, k=4)
    trained = train_own_sae(loaded, given, shape, **{**OPTIONS, "batch_size": 32}, include_prompt=False, **options)
    # Rows of 24 tokens, 3 of 60 held out: all of them, or what was asked for (and at least two batches).
    assert sorted(asked) == buffers
    assert trained.n_held_out == options.get("n_held_out", 72)
