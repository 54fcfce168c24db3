"""Which cache TRL's generation decodes with: on CUDA a static one, whose decoding step transformers then compiles.

`generate` compiles a decoding step if the cache is of one size for the whole call and nobody forbids it; TRL forbids
it. In a pilot on an H100, 1,024 rollouts of SmolLM2-135M went from 8.1k to 33.6k tokens a second after 50 seconds of
compiling. Written for CUDA, but not measured on one since. On a CPU a static cache without compiling took .95 to 1.4
times as long as the growing one (the bundled model, 64 rollouts), so there TRL's default stays.

A cache of another length is compiled anew, and the length follows the widest prompt of a batch. So the prompt's part is
rounded up to a power of two: a run sees a few lengths, not one a batch, and transformers keeps to the longest so far.
Another number of rows (evaluation) compiles once more.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig
from trl import GRPOConfig

_SHORTEST = 64


def wants_static_cache(
    args: GRPOConfig, device: torch.device, *, can_compile: bool, one_turn: bool, sharded: bool
) -> bool:
    """Whether to compile decoding: on CUDA, where TRL calls `generate` itself and the user chose nothing else.

    Args:
        args: a cache, other generation options, vLLM or continuous batching in it are a choice of the user's.
        device: what the policy is on.
        can_compile: whether transformers compiles this architecture (`_can_compile_fullgraph`).
        one_turn: one `generate` call a batch; with tools, later calls have other numbers of rows, each compiled anew.
        sharded: FSDP or DeepSpeed, whose weights come and go during a forward.
    """
    chosen = (
        args.use_vllm
        or args.use_transformers_continuous_batching
        or args.cache_implementation is not None
        or bool(args.generation_kwargs)
    )
    return device.type == "cuda" and can_compile and one_turn and not sharded and not chosen


def use_static_cache(config: GenerationConfig) -> None:
    """Makes `generate` decode with a static cache, and compile where transformers does (not on a CPU)."""
    config.cache_implementation = "static"
    config.disable_compile = False


def cache_length(prompt_width: int, new_tokens: int) -> int:
    """Positions of a static cache that holds the widest prompt, rounded up to a power of two (64 at least), and all new
    tokens but the last, which is not read again."""
    return max(_SHORTEST, 1 << (prompt_width - 1).bit_length()) + new_tokens - 1
