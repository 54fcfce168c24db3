"""A key-value cache with room to grow: a token is written into it, where transformers' growing cache copies all of it.

That copy is most of what `DynamicCache` costs, at every token. A static cache is written into as well, but is read over
its whole length from the first token on; it is for decoding that is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from mechreward.models.blocks import text_config


def roomy_cache(model: nn.Module, longest: int | None = None) -> DynamicCache:
    """An empty cache for `generate` or a forward of this model, whose full-attention layers keep room for more tokens.

    Its answers are those of `DynamicCache`, of which layers of other kinds (sliding, linear) are kept as they are. It
    takes at most twice the memory.

    Args:
        longest: tokens a row that will not be exceeded, where that is known: no room is made beyond.
    """
    cache = DynamicCache(config=text_config(model))
    cache.layers = [_RoomyLayer(longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def static_cache(model: nn.Module, length: int) -> StaticCache:
    """An empty cache for `generate` or a forward of this model, of `length` tokens a row, that autocast can write into.

    Under autocast rotated keys come in float32 and values in half precision. transformers' static layers hold both in
    the keys' type and refuse the values; here keys are kept in the values', in which attention takes them anyway.
    """
    cache = StaticCache(config=text_config(model), max_cache_len=length)
    for layer in cache.layers:
        layer.__class__ = _ONE_TYPE.get(type(layer), type(layer))
    return cache


class _OneTypeLayer(StaticLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *rest, **named)


class _OneTypeSlidingWindowLayer(_OneTypeLayer, StaticSlidingWindowLayer):
    pass


_ONE_TYPE: dict[type, type] = {
    StaticLayer: _OneTypeLayer,
    StaticSlidingWindowLayer: _OneTypeSlidingWindowLayer,
}


class _RoomyLayer(DynamicLayer):
    """`keys` and `values` are the first tokens of tensors that are twice as long when they have to be made anew, up to
    `longest`."""

    keys: Tensor
    values: Tensor
    key_room: Tensor
    value_room: Tensor

    def __init__(self, longest: int | None = None) -> None:
        super().__init__()
        self.longest = longest

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self.key_room = key_states[:, :, :0]
        self.values = self.value_room = value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = self._append(self.keys, self.key_room, key_states)
        self.values, self.value_room = self._append(self.values, self.value_room, value_states)
        return self.keys, self.values

    def _append(
        self, held: Float[Tensor, "b h s d"], room: Float[Tensor, "rows h r d"], new: Float[Tensor, "b h n d"]
    ) -> tuple[Tensor, Tensor]:
        """What is held with `new` after it, and the tensor that both are in."""
        if new.requires_grad or held.requires_grad:  # what is written over has no gradient
            whole = torch.cat([held, new], dim=2)
            return whole, whole
        start, end = held.shape[2], held.shape[2] + new.shape[2]
        # Beam search, cropping and selecting rows put other tensors in the place of what was written here.
        elsewhere = held.data_ptr() != room.data_ptr() or held.shape[0] != room.shape[0]
        # What inference mode made cannot be written into outside of it.
        elsewhere |= room.is_inference() and not torch.is_inference_mode_enabled()
        if elsewhere or end > room.shape[2]:
            length = 2 * end if self.longest is None else max(end, min(2 * end, self.longest))
            room = new.new_empty(*new.shape[:2], length, new.shape[3])
            room[:, :, :start] = held
        room[:, :, start:end] = new
        return room[:, :, :end], room
