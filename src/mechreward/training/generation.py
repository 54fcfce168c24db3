"""Which cache TRL's generation decodes with, where the user has chosen nothing.

On CUDA a static one, whose decoding step transformers then compiles: `generate` compiles if the cache is of one size
for the whole call and nobody forbids it; TRL forbids it. In a pilot on an H100, 1,024 rollouts of SmolLM2-135M went
from 8.1k to 33.6k tokens a second after 50 seconds of compiling. Written for CUDA, but not measured on one since.

A cache of another length is compiled anew, and the length follows the widest prompt of a batch. So the prompt's part is
rounded up to a power of two, and the longest so far is kept to: a run sees a few lengths, not one a batch. Another
number of rows (evaluation) compiles once more.

Elsewhere `models.roomy_cache`, which draws TRL's own tokens. On a CPU a static cache without compiling took .95 to 1.4
times as long as transformers' growing one (the bundled model, 64 rollouts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from trl import GRPOConfig

from mechreward.models import roomy_cache, static_cache, unwrap

_SHORTEST = 64


def decoding_cache(
    args: GRPOConfig, model: Any, device: torch.device, *, one_turn: bool, sharded: bool
) -> Literal["static", "roomy"] | None:
    """The cache to decode with: None where TRL does not call `generate` itself, or the user chose something else.

    Args:
        args: a cache, other generation options, vLLM or continuous batching in it are a choice of the user's.
        model: the policy; static only if transformers compiles its architecture, none if it takes no `DynamicCache` or
            its generation config names a cache.
        device: what the policy is on.
        one_turn: one `generate` call a batch; with tools, later calls have other numbers of rows, each compiled anew.
        sharded: FSDP or DeepSpeed, whose weights come and go during a forward.
    """
    chosen = (
        args.use_vllm
        or args.use_transformers_continuous_batching
        or args.cache_implementation is not None
        or bool(args.generation_kwargs)
    )
    plain: Any = unwrap(model)
    named = plain.generation_config.cache_implementation not in (None, "hybrid")  # transformers drops "hybrid"
    own_state = not plain._supports_default_dynamic_cache() or "mamba" in type(plain).__name__.lower()
    if chosen or named or own_state or plain.generation_config.use_cache is False:
        return None
    bounded = args.max_completion_length is not None  # a static cache has a length
    compiles = device.type == "cuda" and plain._can_compile_fullgraph and bounded and one_turn and not sharded
    return "static" if compiles else "roomy"


class Decoding:
    """Gives every `generate` of a model, called as TRL does, a cache of this kind. A static one is as long as the
    longest so far, so that few lengths are compiled."""

    def __init__(self, kind: Literal["static", "roomy"]) -> None:
        self.kind = kind
        self._longest = 0

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Inside it the model decodes so."""
        theirs, replaced = model.generate, vars(model).get("generate")

        def generate(*, input_ids: Tensor, generation_config: GenerationConfig, **named: Any) -> Any:
            # transformers compiles with a static cache, on CUDA, unless told not to, as TRL does.
            generation_config.disable_compile = self.kind != "static"
            cache = self._cache(model, input_ids.shape[1], generation_config.max_new_tokens)
            return theirs(input_ids=input_ids, generation_config=generation_config, past_key_values=cache, **named)

        model.generate = generate
        try:
            yield
        finally:
            if replaced is None:
                del model.generate
            else:
                model.generate = replaced

    def _cache(self, model: Any, width: int, new_tokens: int | None) -> Cache:
        """`new_tokens` is None where `max_completion_length` is, which no static cache takes."""
        if self.kind == "roomy":
            return roomy_cache(model, None if new_tokens is None else width + new_tokens)
        assert new_tokens is not None
        self._longest = max(self._longest, cache_length(width, new_tokens))
        return static_cache(model, self._longest)


def cache_length(prompt_width: int, new_tokens: int) -> int:
    """Positions of a static cache that holds the widest prompt, rounded up to a power of two (64 at least), and all new
    tokens but the last, which is not read again."""
    return max(_SHORTEST, 1 << (prompt_width - 1).bit_length()) + new_tokens - 1
