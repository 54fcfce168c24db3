"""Prompts that several completions share, read once (prefix caching, as inference servers do it).

The completions of a GRPO group, and the answers that discovery contrasts, repeat one prompt many times. What a block
has to know of it are its keys and values: one forward over the distinct prompts makes them, and the forward over the
completions finds them in its cache. The states are those of a forward over prompt and completion in one piece.

Prompts are padded on the left and positions are told, so that nothing lies between a prompt and its completion, which
a sliding window would count. Blocks that carry a state along instead of keys and values (linear attention) take no
part: transformers lets them begin anew where more than one token follows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mechreward.models.blocks import find_blocks, text_config, unwrap

KEPT = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values alone."""


def can_share(model: nn.Module, layer: int) -> bool:
    """Whether the blocks up to `layer` can take up after a prompt that was read before.

    Not while a hook is on any part of these blocks: a forward in two pieces is not what it was written for. Hooks
    elsewhere do not count, such as the one that PEFT wants on the embedding under gradient checkpointing, nor those
    that transformers leaves on blocks after a forward with `output_hidden_states`.
    """
    inner: Any = unwrap(model)
    takes = {"position_ids", "past_key_values"} <= inspect.signature(inner.forward).parameters.keys()
    if not takes or any(_hooked(module) for module in find_blocks(inner)[: layer + 1].modules()):
        return False
    config = text_config(inner)
    chunked = "chunked_attention" in (config.to_dict().get("layer_types") or [])  # its borders are counted in pads
    layers = DynamicCache(config=config).layers
    return not chunked and len(layers) > layer and all(type(each) in KEPT for each in layers[: layer + 1])


def _hooked(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not hook.__module__.startswith("transformers.") for hook in hooks)


class SharedPrompts:
    """Distinct prompts, and the cache that a forward over them is to fill.

    Args:
        model: one that `can_share`.
        prompts: token ids of each, none empty.

    Attributes:
        forward_arguments: of the forward over the prompts.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        device, width = unwrap(model).device, max(map(len, prompts))
        self._length_N1: Int[Tensor, "n 1"] = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        self._seen_NP: Bool[Tensor, "n p"] = torch.arange(width, device=device) >= width - self._length_N1
        self._cache = DynamicCache(config=text_config(model))
        ids_NP = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        self.forward_arguments = {
            "input_ids": ids_NP,
            "attention_mask": self._seen_NP.long(),
            "position_ids": (self._seen_NP.cumsum(dim=1) - 1).clamp(min=0),
            "past_key_values": self._cache,
            "use_cache": True,
        }

    def continued(
        self, which: Sequence[int], ids_BT: Int[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"]
    ) -> dict[str, Any]:
        """Arguments of the forward over completions, each after the prompt that `which` names by its place.

        May be asked for any number of batches: what a completion puts into the cache is not kept.
        """
        which_B = torch.tensor(which, device=ids_BT.device)
        cache = copy.copy(self._cache)
        # Blocks behind the last one that is read may keep something else, or nothing: Gemma 4's take others' keys.
        cache.layers = [
            _RowsOf(cast(DynamicLayer, layer), which_B) if type(layer) in KEPT else layer
            for layer in self._cache.layers
        ]
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.cat([self._seen_NP[which_B], mask_BT], dim=1).long(),
            "position_ids": self._length_N1[which_B] + torch.arange(ids_BT.shape[1], device=ids_BT.device),
            "past_key_values": cache,
            "use_cache": True,
        }


class _RowsOf(DynamicLayer):
    """A layer's keys and values of the prompts of some rows; new ones are put after them and not kept."""

    def __init__(self, prompts: DynamicLayer, which_B: Int[Tensor, " b"]) -> None:
        super().__init__()
        self.prompts, self.which_B = prompts, which_B
        self.is_sliding = prompts.is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        rows = copy.copy(self.prompts)
        rows.batch_select_indices(self.which_B.to(key_states.device))
        return rows.update(key_states, value_states, *args, **named)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prompts.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.prompts.get_seq_length()
