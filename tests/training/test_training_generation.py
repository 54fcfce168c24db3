"""Which cache decodes, when decoding is compiled, how long its cache is, and that each draws the very same tokens."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import DynamicCache, GenerationConfig, MambaConfig, MambaForCausalLM
from trl import GRPOConfig

from mechreward.models import roomy_cache, static_cache
from mechreward.training import DenseConfig, generation, grpo
from mechreward.training.generation import Decoding, cache_length, decoding_cache

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FITS = {"one_turn": True, "sharded": False}


def arguments(tmp_path, **options) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


def test_static_on_cuda_roomy_elsewhere_and_none_where_something_was_chosen(tmp_path, tiny_model) -> None:
    llama = tiny_model("llama")
    assert decoding_cache(arguments(tmp_path), llama, CUDA, **FITS) == "static"
    assert decoding_cache(arguments(tmp_path), llama, torch.device("cuda", 1), **FITS) == "static"
    assert decoding_cache(arguments(tmp_path), llama, CPU, **FITS) == "roomy"
    assert decoding_cache(arguments(tmp_path), llama, torch.device("mps"), **FITS) == "roomy"
    for change in ({"one_turn": False}, {"sharded": True}):
        assert decoding_cache(arguments(tmp_path), llama, CUDA, **{**FITS, **change}) == "roomy"
    assert decoding_cache(arguments(tmp_path, max_completion_length=None), llama, CUDA, **FITS) == "roomy"
    named = copy.deepcopy(llama)
    for name, kinds in (("static", [None, None]), ("dynamic", [None, None]), ("hybrid", ["static", "roomy"])):
        named.generation_config.cache_implementation = name
        assert [decoding_cache(arguments(tmp_path), named, device, **FITS) for device in (CUDA, CPU)] == kinds
    not_compiled = copy.deepcopy(llama)
    not_compiled._can_compile_fullgraph = False
    assert decoding_cache(arguments(tmp_path), not_compiled, CUDA, **FITS) == "roomy"
    for choice in (
        {"cache_implementation": "dynamic"},
        {"use_transformers_continuous_batching": True},
        {"generation_kwargs": {"num_beams": 2}},
        {"use_vllm": True},
    ):
        assert decoding_cache(arguments(tmp_path, **choice), llama, CUDA, **FITS) is None, choice


def test_a_model_without_a_cache_gets_none(tmp_path, tiny_model) -> None:
    no_cache = copy.deepcopy(tiny_model("llama"))
    no_cache.generation_config.use_cache = False
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, state_size=4))
    for model in (no_cache, mamba):
        assert decoding_cache(arguments(tmp_path), model, CPU, **FITS) is None


def test_transformers_then_compiles_on_cuda_and_only_there(tiny_llama) -> None:
    class OnCuda(type(tiny_llama)):
        device = CUDA

    model = copy.copy(tiny_llama)
    cache = {"past_key_values": static_cache(tiny_llama, 8)}
    config = GenerationConfig(disable_compile=False)
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
def test_every_cache_draws_the_tokens_of_transformers_own(
    family, peft_config, tmp_path, tiny_model, char_tokenizer, make, score, monkeypatch
) -> None:
    seen = {}
    for kind, config in itertools.product(
        (None, "roomy", "static"), ({"generation_kwargs": {"do_sample": False}}, {"gradient_checkpointing": True})
    ):
        model = copy.deepcopy(tiny_model(family))
        model.generation_config.eos_token_id = [1, *range(40, 44)]
        monkeypatch.setattr(grpo, "decoding_cache", lambda *_, kind=kind, **__: kind)
        trainer = make(tmp_path, model, [constant], char_tokenizer, config=config, peft_config=peft_config)
        made = {"static_cache": [], "roomy_cache": []}
        for name, make_one in (("static_cache", static_cache), ("roomy_cache", roomy_cache)):

            def spy(model, length, make_one=make_one, kept=made[name]):
                kept.append((length, make_one(model, length)))
                return kept[-1][1]

            monkeypatch.setattr(generation, name, spy)
        torch.manual_seed(3)
        out = score(trainer)
        static, roomy = made["static_cache"], [cache for _, cache in made["roomy_cache"]]
        # Prompts of 5 and 1 tokens: a longest one of up to 64 gets the same cache.
        assert [length for length, _ in static] == ([64 + 7 - 1] if kind == "static" else [])
        longest = out["completion_ids"].shape[1]
        assert [cache.get_seq_length() for cache in roomy] == ([5 + longest - 1] if kind == "roomy" else [])
        assert {x.longest for cache in roomy for x in cache.layers if hasattr(x, "key_room")} <= {5 + 7}
        assert "generate" not in vars(trainer.model)
        seen[kind, "generation_kwargs" in config] = out["completion_ids"]
        monkeypatch.undo()
    assert seen[None, True].unique(dim=0).shape[0] > 1
    for kind, greedy in itertools.product(("roomy", "static"), (True, False)):
        assert torch.equal(seen[kind, greedy], seen[None, greedy]), (kind, greedy)


def test_the_trainer_asks_with_what_it_has_and_can_be_told_not_to(
    tmp_path, tiny_llama, char_tokenizer, make, monkeypatch
) -> None:
    asked = []

    def ask(_args, model, device, **facts) -> str:
        asked.append((type(model), device, facts))
        return "static"

    monkeypatch.setattr(grpo, "decoding_cache", ask)
    trainer = make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer)
    assert asked == [(type(tiny_llama), CPU, {"one_turn": True, "sharded": False})]
    assert trainer._decoding.kind == "static"
    off = make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer, dense=DenseConfig(fast_rollouts=False))
    assert off._decoding is None and off.generation_config.disable_compile
    assert len(asked) == 1
    make(tmp_path, copy.deepcopy(tiny_llama), [constant], char_tokenizer, rollout_func=lambda _prompts, _trainer: {})
    assert asked[1][2]["one_turn"] is False


@pytest.mark.parametrize("kind", ["static", "roomy"])
def test_what_generate_is_given(tiny_llama, monkeypatch, kind: str) -> None:
    given, lengths, empty = [], [], DynamicCache()
    monkeypatch.setattr(generation, f"{kind}_cache", lambda _model, length: lengths.append(length) or empty)
    model, decoding = copy.copy(tiny_llama), Decoding(kind)
    model.__dict__["generate"] = lambda **named: given.append((named["past_key_values"], named["generation_config"]))
    for width in (70, 130, 1):
        with decoding.of(model):
            config = GenerationConfig(max_new_tokens=7, disable_compile=True)
            model.generate(input_ids=torch.zeros(2, width, dtype=torch.long), generation_config=config)
    # A static cache keeps to the longest so far.
    assert lengths == ([128 + 6, 256 + 6, 256 + 6] if kind == "static" else [77, 137, 8])
    assert all(cache is empty and config.disable_compile == (kind != "static") for cache, config in given)
    assert len(given) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_takes_what_autocast_makes(family, tiny_model) -> None:
    """Keys in float32, values in bfloat16; transformers' own refuses the values of most families."""
    model, ids = tiny_model(family), torch.tensor([[0, 0, 5, 9, 11], [7, 8, 9, 5, 6]])
    asked = {"input_ids": ids, "attention_mask": (ids > 0).long(), "do_sample": False, "max_new_tokens": 12}
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model.generate(**asked)
        assert torch.equal(model.generate(**asked, past_key_values=static_cache(model, 20)), wanted)


def test_without_a_limit_the_cache_has_none(tiny_llama, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(generation, "roomy_cache", lambda _model, longest: made.append(longest) or DynamicCache())
    model = copy.copy(tiny_llama)
    model.__dict__["generate"] = theirs = lambda **_: None
    with Decoding("roomy").of(model):
        for config in (GenerationConfig(max_new_tokens=7), GenerationConfig()):
            model.generate(input_ids=torch.zeros(2, 5, dtype=torch.long), generation_config=config)
    assert made == [5 + 7, None]
    assert model.generate is theirs  # a wrapper of the user's comes back


def test_generate_is_the_models_own_again_after_an_error(tiny_llama) -> None:
    with pytest.raises(RuntimeError, match="broke off"), Decoding("roomy").of(tiny_llama):
        assert "generate" in vars(tiny_llama)
        raise RuntimeError("broke off")
    assert "generate" not in vars(tiny_llama)
