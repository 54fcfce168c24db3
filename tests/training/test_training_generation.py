"""When decoding is compiled, how long its cache is, and that a static cache draws the very same tokens."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import GenerationConfig, StaticCache
from trl import GRPOConfig

from mechreward.training import DenseConfig, grpo
from mechreward.training.generation import cache_length, use_static_cache, wants_static_cache

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FITS = {"can_compile": True, "one_turn": True, "sharded": False}


def arguments(tmp_path, **options) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


def test_only_on_cuda_and_where_nothing_was_chosen(tmp_path) -> None:
    assert wants_static_cache(arguments(tmp_path), CUDA, **FITS)
    assert wants_static_cache(arguments(tmp_path), torch.device("cuda", 1), **FITS)
    assert not wants_static_cache(arguments(tmp_path), CPU, **FITS)
    assert not wants_static_cache(arguments(tmp_path), torch.device("mps"), **FITS)
    for change in ({"can_compile": False}, {"one_turn": False}, {"sharded": True}):
        assert not wants_static_cache(arguments(tmp_path), CUDA, **{**FITS, **change})
    for choice in (
        {"cache_implementation": "dynamic"},
        {"use_transformers_continuous_batching": True},
        {"generation_kwargs": {"num_beams": 2}},
        {"use_vllm": True},
    ):
        assert not wants_static_cache(arguments(tmp_path, **choice), CUDA, **FITS), choice


def test_transformers_then_compiles_on_cuda_and_only_there(tiny_llama) -> None:
    class OnCuda(type(tiny_llama)):
        device = CUDA

    model = copy.copy(tiny_llama)
    cache = {"past_key_values": StaticCache(config=tiny_llama.config, max_cache_len=8)}
    config = GenerationConfig(disable_compile=True)
    use_static_cache(config)
    assert config.cache_implementation == "static"
    assert not model._valid_auto_compile_criteria(cache, config)
    model.__class__ = OnCuda
    assert model._valid_auto_compile_criteria(cache, config)
    config.disable_compile = True
    assert not model._valid_auto_compile_criteria(cache, config)


def test_cache_length_by_hand() -> None:
    assert [cache_length(width, 10) for width in (1, 64, 65, 128, 129)] == [73, 73, 137, 137, 265]


@given(st.integers(1, 5000), st.integers(1, 2000))
def test_a_cache_holds_the_batch_and_takes_few_lengths(width: int, new_tokens: int) -> None:
    length = cache_length(width, new_tokens)
    assert width <= length - (new_tokens - 1) <= max(64, 2 * width - 1)
    assert len({cache_length(any_width, new_tokens) for any_width in range(1, width + 1)}) <= 8


def constant(completions, **_) -> list[float]:
    return [float(len(completion)) for completion in completions]


LORA = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj"], task_type="CAUSAL_LM")
FAMILIES = ["llama", "mistral", "gemma2", "deepseek_v3", "qwen3_5", "qwen3_5_moe", "gemma4"]


@pytest.mark.parametrize(("family", "peft_config"), [*((f, None) for f in FAMILIES), ("llama", LORA)])
def test_a_static_cache_draws_the_tokens_of_a_growing_one(
    family, peft_config, tmp_path, tiny_model, char_tokenizer, make, score, monkeypatch
) -> None:
    seen = {}
    for static, config in itertools.product((False, True), ({"generation_kwargs": {"do_sample": False}}, {})):
        model = copy.deepcopy(tiny_model(family))
        model.generation_config.eos_token_id = [1, *range(40, 44)]
        monkeypatch.setattr(grpo, "wants_static_cache", lambda *_, static=static, **__: static)
        trainer = make(tmp_path, model, [constant], char_tokenizer, config=config, peft_config=peft_config)
        caches = []
        prepare = type(model)._prepare_static_cache

        def spy(self, *args, prepare=prepare, caches=caches, **named):
            caches.append(named["max_cache_len"])
            return prepare(self, *args, **named)

        monkeypatch.setattr(type(model), "_prepare_static_cache", spy)
        torch.manual_seed(3)
        out = score(trainer)
        # Prompts of 5 and 1 tokens: a longest one of up to 64 gets the same cache.
        assert caches == ([64 + 7 - 1] if static else [])
        seen[static, bool(config)] = out["completion_ids"]
        monkeypatch.undo()
    assert seen[False, True].unique(dim=0).shape[0] > 1
    assert torch.equal(seen[True, True], seen[False, True])
    assert torch.equal(seen[True, False], seen[False, False])


def test_the_trainer_asks_with_what_it_has_and_can_be_told_not_to(
    tmp_path, tiny_llama, char_tokenizer, make, monkeypatch
) -> None:
    asked = []

    def ask(_args, device, **facts) -> bool:
        asked.append((device, facts))
        return True

    monkeypatch.setattr(grpo, "wants_static_cache", ask)
    trainer = make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer)
    assert asked == [(CPU, {"can_compile": True, "one_turn": True, "sharded": False})]
    assert trainer.generation_config.cache_implementation == "static" and not trainer.generation_config.disable_compile
    off = make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer, dense=DenseConfig(fast_rollouts=False))
    assert off.generation_config.cache_implementation is None and off.generation_config.disable_compile
    assert len(asked) == 1
    monkeypatch.undo()
    stock = make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer)
    assert stock.generation_config.cache_implementation is None and stock.generation_config.disable_compile

    monkeypatch.setattr(grpo, "wants_static_cache", ask)
    make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer, rollout_func=lambda _prompts, _trainer: {})
    assert asked[1][1]["one_turn"] is False


def test_the_cache_follows_the_widest_prompt_of_a_batch(
    tmp_path, tiny_llama, char_tokenizer, make, monkeypatch
) -> None:
    monkeypatch.setattr(grpo, "wants_static_cache", lambda *_, **__: True)
    trainer = make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer)
    for prompts, wanted in ((["b", "a" * 70], 128), (["a" * 130, "b"], 256), (["b"], 64)):
        trainer._tokenize_prompts(prompts)
        assert trainer.generation_config.max_cache_len == wanted + 7 - 1
