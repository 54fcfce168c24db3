"""Prompts read once for all their completions, against forwards in one piece, one unpadded row at a time."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from mechreward.errors import InputError
from mechreward.models import capture_blocks, find_blocks, iter_blocks, iter_residuals, read_residuals
from mechreward.models.prefix import SharedPrompts, can_share

# Two are longer than the tiny models' window of 8 tokens; two are of one length.
FOUR = [[0, 5, 6], [0, *range(10, 22)], [0, 9, 8, 7, 6, 5], [0, *range(30, 42)]]
WHICH = [0, 1, 0, 2, 3, 1, 0, 2, 3]
PROMPTS = [FOUR[i] for i in WHICH]
COMPLETIONS = [[40 + i, *range(7, 7 + length)] for i, length in enumerate([3, 9, 0, 1, 12, 2, 5, 4, 0])]
SHARING = ["llama", "mistral", "gemma2", "deepseek_v3", "gemma4", "gemma4_image_text"]
CARRYING = ["qwen3_5", "qwen3_5_image_text", "qwen3_5_moe"]


def states_alone(model: nn.Module, prompt: list[int], completion: list[int], layer: int) -> Tensor:
    """The block's states on one completion, from a forward of one row in one piece."""
    with torch.no_grad(), capture_blocks(model, [layer], stop=False) as states:
        model(torch.tensor([prompt + completion]), use_cache=False)
    return states[layer][0, len(prompt) :]


def assert_equal_alone(model: nn.Module, prompts: list, completions: list, layer: int, batch_size: int) -> None:
    seen = []
    for batch in iter_residuals(model, prompts, completions, layer, batch_size):
        for place, row in enumerate(batch.rows):
            length = len(completions[row])
            assert batch.mask_BT[place].tolist() == [t < length for t in range(batch.mask_BT.shape[1])]
            want = states_alone(model, prompts[row], completions[row], layer)
            torch.testing.assert_close(batch.h_BTD[place, :length], want, atol=3e-5, rtol=1e-4)
            assert (batch.h_BTD[place, length:] == 0).all()
            seen.append(row)
    assert sorted(seen) == list(range(len(prompts)))


@pytest.mark.parametrize("batch_size", [2, 32])
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("name", [*SHARING, *CARRYING])
def test_states_equal_those_of_each_row_alone(tiny_model, name: str, layer: int, batch_size: int) -> None:
    model = tiny_model(name)
    assert can_share(model, layer) == (name in SHARING)
    assert_equal_alone(model, PROMPTS, COMPLETIONS, layer, batch_size)


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_gpt2"])
def test_states_of_models_that_want_positions_told(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    assert can_share(model, 2)
    assert_equal_alone(model, PROMPTS, COMPLETIONS, 2, 32)


def test_what_comes_behind_the_block_may_keep_no_keys_of_its_own() -> None:
    """The last blocks of Gemma 4's small models take the keys of earlier ones; hybrids may end in linear attention."""
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    kinds = ["sliding_attention", "full_attention"] * 3
    torch.manual_seed(8)
    shared = Gemma4ForCausalLM(
        Gemma4TextConfig(
            **shape, **own, num_hidden_layers=6, num_kv_shared_layers=2, layer_types=kinds, sliding_window=8
        )
    )
    hybrid = Lfm2ForCausalLM(Lfm2Config(**shape, num_hidden_layers=2, layer_types=["full_attention", "conv"]))
    for model, layer in ((shared.eval(), 3), (hybrid.eval(), 0)):
        assert can_share(model, layer)
        assert_equal_alone(model, PROMPTS, COMPLETIONS, layer, 32)
    assert not can_share(shared, 4)
    assert_equal_alone(shared, PROMPTS, COMPLETIONS, 4, 32)


def test_rows_of_one_length_need_no_mask(tiny_llama: PreTrainedModel) -> None:
    """Without a pad transformers leaves the mask out, and attention has to know that the prompt comes first."""
    assert_equal_alone(tiny_llama, [FOUR[1], FOUR[3]] * 2, [[7, 8, 9], [8, 9, 7], [9, 7, 8], [7, 9, 8]], 2, 32)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    which=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 6), min_size=8, max_size=8),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_grouping_gives_the_states_of_one_piece(
    tiny_llama: PreTrainedModel, which: list[int], lengths: list[int], batch_size: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    prompts = [FOUR[i] for i in which]
    rows = [torch.randint(4, 60, (n,), generator=draw).tolist() for n in lengths[: len(which)]]
    split, _ = read_residuals(tiny_llama, prompts, rows, 1, batch_size)
    whole = next(iter_blocks(tiny_llama, prompts, rows, [1], batch_size=8, stop=False))
    torch.testing.assert_close(split[whole.rows], whole.h_BTD[1], atol=1e-5, rtol=1e-5)


def test_the_adapter_counts_for_the_prompt_too(tiny_llama: PreTrainedModel) -> None:
    torch.manual_seed(7)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"])
    adapted = get_peft_model(copy.deepcopy(tiny_llama), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert_equal_alone(adapted, PROMPTS, COMPLETIONS, 2, 32)
    on, _ = read_residuals(adapted, PROMPTS, COMPLETIONS, 2)
    with adapted.disable_adapter():
        off, _ = read_residuals(adapted, PROMPTS, COMPLETIONS, 2)
    base, mask_BT = read_residuals(tiny_llama, PROMPTS, COMPLETIONS, 2)
    torch.testing.assert_close(off, base)
    assert ((on - base).norm(dim=-1)[mask_BT] > 0.01).all()


def forwards(model: nn.Module, prompts: list, completions: list, **options: object) -> list[tuple[int, int]]:
    """Rows and tokens of each forward that reading takes."""
    shapes: list[tuple[int, int]] = []
    forward = model.forward

    def counted(*args: object, **named: object) -> object:
        shapes.append(tuple(named["input_ids"].shape))
        return forward(*args, **named)

    counted.__signature__ = inspect.signature(forward)
    model.forward = counted
    try:
        for _ in iter_blocks(model, prompts, completions, [1], **options):
            pass
    finally:
        del model.forward
    return shapes


def test_each_prompt_is_read_once(tiny_llama: PreTrainedModel) -> None:
    # Four prompts, the longest of 13 tokens; completions of 1 1 2 3 | 4 5 6 10 | 13 tokens.
    assert forwards(tiny_llama, PROMPTS, COMPLETIONS, batch_size=4) == [(4, 13), (4, 3), (4, 10), (1, 13)]
    # Prompts of 3 and 6 tokens with their five completions (1 2 | 4 5 | 6), then those of 13 (1 3 | 10 13).
    assert forwards(tiny_llama, PROMPTS, COMPLETIONS, batch_size=2) == [
        *[(2, 6), (2, 2), (2, 5), (1, 6)],
        *[(2, 13), (2, 3), (2, 13)],
    ]


def test_prompts_of_one_row_empty_ones_and_sharded_models_are_read_in_one_piece(tiny_llama: PreTrainedModel) -> None:
    prompts, rows = [FOUR[0], [], [], FOUR[2], FOUR[2]], [[7, 8]] * 5
    # Three rows by themselves (2, 2 and 5 tokens), then one prompt of 6 tokens and its two completions.
    assert forwards(tiny_llama, prompts, rows) == [(3, 5), (1, 6), (2, 2)]
    assert forwards(tiny_llama, prompts, rows, stop=False) == [(5, 8)]


def test_who_cannot_share() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32}
    no_positions = BloomForCausalLM(BloomConfig(**sizes, n_layer=2, n_head=4))
    chunks = {"layer_types": ["chunked_attention", "full_attention"], "num_attention_heads": 4, "head_dim": 8}
    experts = {"num_hidden_layers": 2, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 1}
    chunked = Llama4ForCausalLM(Llama4TextConfig(**sizes, **chunks, **experts, num_key_value_heads=2))
    mamba = MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=2, state_size=4))
    assert not any(can_share(model, 0) for model in (no_positions, chunked, mamba))


def test_a_hooked_model_is_read_in_one_piece(tiny_llama: PreTrainedModel) -> None:
    second = find_blocks(tiny_llama)[1]
    for hook in (second.mlp.register_forward_hook, second.register_forward_pre_hook):
        handle = hook(lambda *_: None)
        try:
            assert [can_share(tiny_llama, layer) for layer in range(4)] == [True, False, False, False]
        finally:
            handle.remove()
    assert can_share(tiny_llama, 3)


def test_hooks_of_transformers_itself_are_no_hindrance(tiny_llama: PreTrainedModel) -> None:
    model = copy.deepcopy(tiny_llama)
    model(torch.tensor([[5, 6]]), output_hidden_states=True, output_attentions=True)
    assert any(block._forward_hooks for block in find_blocks(model))  # it leaves them there
    assert can_share(model, 2)
    assert_equal_alone(model, PROMPTS, COMPLETIONS, 2, 32)


def test_gradient_checkpointing_of_an_adapter_is_no_hindrance(tiny_llama: PreTrainedModel) -> None:
    """TRL then has a hook on the embedding."""
    model = copy.deepcopy(tiny_llama)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert can_share(model.train(), 2)
    assert_equal_alone(model.eval(), PROMPTS, COMPLETIONS, 2, 32)
    inner = model.train()
    h_BTD, _ = read_residuals(inner, PROMPTS, COMPLETIONS, 2)
    torch.testing.assert_close(h_BTD, read_residuals(tiny_llama, PROMPTS, COMPLETIONS, 2)[0])


def test_completions_leave_nothing_in_the_prompts(tiny_llama: PreTrainedModel) -> None:
    shared = SharedPrompts(tiny_llama, FOUR)
    with torch.no_grad(), capture_blocks(tiny_llama, [2]):
        tiny_llama(**shared.forward_arguments)
    kept = [layer.keys.clone() for layer in shared.forward_arguments["past_key_values"].layers[:3]]
    ids_BT, mask_BT = torch.tensor([[7, 8, 9], [8, 9, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    first, second = [], []
    for found in (first, second):
        with torch.no_grad(), capture_blocks(tiny_llama, [2]) as states:
            tiny_llama(**shared.continued([3, 1], ids_BT, mask_BT))
        found.append(states[2])
    assert torch.equal(first[0], second[0])
    held = shared.forward_arguments["past_key_values"].layers
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(held[:3], kept, strict=True))
    assert not held[3].is_initialized  # nothing beyond the block that is read


def test_a_nan_is_named_by_its_row(tiny_llama: PreTrainedModel) -> None:
    broken = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        broken.get_input_embeddings().weight[48] = torch.nan  # only row 8 holds token 48
    with pytest.raises(InputError, match="state after block 1 is NaN at row 8"):
        read_residuals(broken, PROMPTS, COMPLETIONS, 1)
