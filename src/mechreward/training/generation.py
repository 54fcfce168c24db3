"""Which cache TRL's generation decodes with, where the user has chosen nothing.

On CUDA a static one, whose decoding step transformers then compiles: `generate` compiles if the cache is of one size
for the whole call and nobody forbids it; TRL forbids it. In a pilot on an H100, 1,024 rollouts of SmolLM2-135M went
from 8.1k to 33.6k tokens a second after 50 seconds of compiling. Written for CUDA, but not measured on one since.

A cache of another length is compiled anew, and the length follows the widest prompt of a batch. So the prompt's part is
rounded up to a power of two: a run sees a few lengths, not one a batch, and transformers keeps to the longest so far.
Another number of rows (evaluation) compiles once more.

Elsewhere `models.roomy_cache`, which draws TRL's own tokens. On a CPU a static cache without compiling took .95 to 1.4
times as long as transformers' growing one (the bundled model, 64 rollouts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl import GRPOConfig

from mechreward.models import roomy_cache, unwrap

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


@contextmanager
def decode_with_room(model: Any) -> Iterator[None]:
    """Gives every `generate` of the model inside it, called as TRL does, a roomy cache."""
    theirs, replaced = model.generate, vars(model).get("generate")

    def generate(*, input_ids: Tensor, generation_config: GenerationConfig, **named: Any) -> Any:
        new_tokens = generation_config.max_new_tokens  # None where `max_completion_length` is
        cache = roomy_cache(model, None if new_tokens is None else input_ids.shape[1] + new_tokens)
        return theirs(input_ids=input_ids, generation_config=generation_config, past_key_values=cache, **named)

    model.generate = generate
    try:
        yield
    finally:
        if replaced is None:
            del model.generate
        else:
            model.generate = replaced


def use_static_cache(config: GenerationConfig) -> None:
    """Makes `generate` decode with a static cache, and compile where transformers does (not on a CPU)."""
    config.cache_implementation = "static"
    config.disable_compile = False


def cache_length(prompt_width: int, new_tokens: int) -> int:
    """Positions of a static cache that holds the widest prompt, rounded up to a power of two (64 at least), and all new
    tokens but the last, which is not read again."""
    return max(_SHORTEST, 1 << (prompt_width - 1).bit_length()) + new_tokens - 1
