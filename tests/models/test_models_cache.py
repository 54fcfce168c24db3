"""The cache with room holds what transformers' growing one holds, whatever is done to it between two tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mechreward.models import roomy_cache
from mechreward.models.cache import _RoomyLayer

FAMILIES = ["llama", "gemma2", "gemma4", "deepseek_v3", "qwen3_5"]


def crop(layer: DynamicLayer) -> None:
    layer.crop(-1)


def reorder(layer: DynamicLayer) -> None:
    layer.reorder_cache(torch.tensor([1, 1, 0]))


def select(layer: DynamicLayer) -> None:
    layer.batch_select_indices(torch.tensor([2, 0, 1]))


def first_rows_again(layer: DynamicLayer) -> None:
    layer.keys, layer.values = layer.keys[:2], layer.values[:2]
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(slice(0, 3))


def reset(layer: DynamicLayer) -> None:
    layer.reset()


@given(
    st.lists(
        st.one_of(st.integers(1, 5), st.sampled_from([crop, reorder, select, first_rows_again, reset])), max_size=14
    ),
    st.integers(0, 99),
)
def test_it_holds_what_a_growing_cache_holds(events, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    roomy, growing = _RoomyLayer(), DynamicLayer()
    for event in [2, *events]:
        if isinstance(event, int):
            keys = torch.randn(3, 2, event, 4, generator=generator)
            values = torch.randn(3, 2, event, 6, generator=generator)
            for mine, theirs in zip(roomy.update(keys, values), growing.update(keys, values), strict=True):
                assert torch.equal(mine, theirs)
        elif growing.get_seq_length() > 1:
            event(roomy)
            event(growing)
        assert roomy.get_seq_length() == growing.get_seq_length()


def test_rows_taken_away_are_not_written_into() -> None:
    layer = _RoomyLayer()
    layer.update(torch.zeros(3, 1, 2, 1), torch.zeros(3, 1, 2, 1))
    layer.keys, layer.values = layer.keys[:2], layer.values[:2]
    keys, _ = layer.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 1], [0, 0, 1]]


def test_a_token_is_copied_a_logarithmic_number_of_times() -> None:
    layer = _RoomyLayer()
    rooms = set()
    for _ in range(1000):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        rooms.add(layer.key_room.shape[2])
    assert sorted(rooms) == [2, 6, 14, 30, 62, 126, 254, 510, 1022]


def test_no_room_is_made_beyond_the_longest() -> None:
    layer = _RoomyLayer(10)
    rooms = []
    for _ in range(12):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        rooms.append(layer.value_room.shape[2])
    assert rooms == [2, 2, 6, 6, 6, 6, 10, 10, 10, 10, 11, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards_are_those_with_a_growing_cache(family: str, tiny_model) -> None:
    model = tiny_model(family)
    ids_BS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    seen_BS = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    roomy, growing = roomy_cache(model), DynamicCache(config=model.config.get_text_config(decoder=True))
    assert {type(layer) for layer in growing.layers} - {DynamicLayer} == {type(x) for x in roomy.layers} - {_RoomyLayer}
    assert any(isinstance(layer, _RoomyLayer) for layer in roomy.layers)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 9)):
            inputs = {"input_ids": ids_BS[:, start:end], "attention_mask": seen_BS[:, :end]}
            mine, theirs = (model(**inputs, past_key_values=cache).logits for cache in (roomy, growing))
            assert torch.equal(mine, theirs)


def test_a_copy_goes_its_own_way(tiny_llama) -> None:
    cache = roomy_cache(tiny_llama)
    with torch.no_grad():
        tiny_llama(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        other = copy.deepcopy(cache)
        tiny_llama(torch.tensor([[8]]), past_key_values=cache)
        tiny_llama(torch.tensor([[9]]), past_key_values=other)
        again = copy.deepcopy(cache)
        mine = tiny_llama(torch.tensor([[10]]), past_key_values=cache).logits
        theirs = tiny_llama(torch.tensor([[10]]), past_key_values=again).logits
    assert torch.equal(mine, theirs)
    assert not torch.equal(cache.layers[0].keys[:, :, 3], other.layers[0].keys[:, :, 3])


def test_a_gradient_goes_through_what_was_put_in_before(tiny_llama) -> None:
    model = copy.deepcopy(tiny_llama)
    grads = []
    for cache in (roomy_cache(model), DynamicCache(config=model.config)):
        model.zero_grad()
        first = model(torch.tensor([[5, 6, 7]]), past_key_values=cache).logits.sum()
        second = model(torch.tensor([[8]]), past_key_values=cache).logits.sum()
        (first + second).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))


def test_what_inference_mode_made_is_carried_on_outside_of_it() -> None:
    layer, growing = _RoomyLayer(), DynamicLayer()
    keys = torch.arange(4.0)[None, None, :, None]
    for one in (layer, growing):
        with torch.inference_mode():
            one.update(keys[:, :, :2].clone(), keys[:, :, :2].clone())
        with torch.no_grad():
            one.update(keys[:, :, 2:3], keys[:, :, 2:3])
            one.update(keys[:, :, 3:], keys[:, :, 3:])
    assert torch.equal(layer.keys, growing.keys) and torch.equal(layer.keys, keys)
