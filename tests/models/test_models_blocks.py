"""Finding blocks in every wrapping, and saying which layers there are."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MptConfig,
    MptForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

import mechreward.models.blocks as blocks_module
from mechreward.errors import InputError
from mechreward.models import (
    check_layer,
    context_length,
    d_model,
    find_blocks,
    find_decoder,
    find_final_norm,
    n_blocks,
    read_residuals,
    unwrap,
    vocabulary_size,
)


@pytest.fixture(scope="module")
def tiny_gemma3() -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 12, "intermediate_size": 48, "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=60, boi_token_index=61, eoi_token_index=62
    )
    config.mm_tokens_per_image = 4
    return Gemma3ForConditionalGeneration(config).eval()


def test_blocks_of_llama_qwen_and_gpt2_are_their_own_lists(tiny_llama, tiny_qwen2, tiny_gpt2) -> None:
    assert find_blocks(tiny_llama) is tiny_llama.model.layers
    assert find_blocks(tiny_qwen2) is tiny_qwen2.model.layers
    assert find_blocks(tiny_gpt2) is tiny_gpt2.transformer.h
    for model in (tiny_llama, tiny_qwen2, tiny_gpt2):
        assert (n_blocks(model), d_model(model), vocabulary_size(model)) == (4, 32, 64)
    assert (context_length(tiny_llama), context_length(tiny_gpt2)) == (256, 128)


def test_blocks_of_a_multimodal_model_are_those_of_its_language_model(tiny_gemma3) -> None:
    assert find_blocks(tiny_gemma3) is tiny_gemma3.model.language_model.layers
    assert (n_blocks(tiny_gemma3), d_model(tiny_gemma3)) == (3, 24)


def test_blocks_of_llama_4_and_mpt() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 1, "num_key_value_heads": 2}
    llama4 = Llama4ForCausalLM(Llama4TextConfig(**sizes, **experts, head_dim=8)).eval()
    mpt = MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4)).eval()
    assert find_blocks(llama4) is llama4.model.layers and find_decoder(llama4) is llama4.model
    assert find_blocks(mpt) is mpt.transformer.blocks
    prompts, rows = [[3, 5, 6]] * 2, [[7, 8], [9]]
    for model in (llama4, mpt):
        h_BTD, _ = read_residuals(model, prompts, rows, 0)
        with torch.no_grad():
            state = model(torch.tensor([[3, 5, 6, 7, 8]]), output_hidden_states=True).hidden_states[1][0, 3:]
        torch.testing.assert_close(h_BTD[0], state, atol=1e-5, rtol=1e-4)


def test_the_final_norm_leads_from_the_last_block_to_the_head(tiny_llama, tiny_gpt2) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    phi = PhiForCausalLM(PhiConfig(**sizes, intermediate_size=64)).eval()
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64)).eval()
    mpt = MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4)).eval()
    for model in (tiny_llama, tiny_gpt2, phi, neox, mpt):
        h_BTD, _ = read_residuals(model, [[3, 5]], [[7, 8]], n_blocks(model) - 1)
        with torch.no_grad():
            wanted_TV = model(torch.tensor([[3, 5, 7, 8]])).logits[0, 2:]
            found_TV = model.get_output_embeddings()(find_final_norm(model)(h_BTD[0]))
        torch.testing.assert_close(found_TV, wanted_TV, atol=1e-5, rtol=1e-4)


def test_a_decoder_without_a_final_norm_is_refused(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "FINAL_NORMS", ("ln_f", "norm_f"))
    with pytest.raises(InputError, match="^model: LlamaModel keeps no final norm under ln_f or norm_f$"):
        find_final_norm(tiny_llama)


def test_blocks_are_found_through_peft_compile_and_the_bare_decoder(tiny_llama) -> None:
    base = copy.deepcopy(tiny_llama)
    blocks = base.model.layers
    lora = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert find_blocks(lora) is blocks
    assert find_blocks(base.model) is blocks
    compiled = torch.compile(lora)
    assert find_blocks(compiled) is blocks
    assert unwrap(compiled) is base


def test_prompt_tuning_is_refused_because_it_shifts_positions(tiny_llama) -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    with pytest.raises(InputError, match="PROMPT_TUNING adds virtual tokens"):
        unwrap(get_peft_model(copy.deepcopy(tiny_llama), config))


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(InputError, match="Linear holds no transformers model"):
        find_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layer", [-1, 4, 9])
def test_a_layer_out_of_range_is_named_with_the_range(tiny_llama: PreTrainedModel, layer: int) -> None:
    with pytest.raises(InputError) as caught:
        check_layer(tiny_llama, layer)
    assert str(caught.value) == f"layer: {layer} is out of range; the model has blocks 0 to 3"


def test_every_layer_in_range_passes(tiny_gpt2: PreTrainedModel) -> None:
    for layer in range(4):
        check_layer(tiny_gpt2, layer)


def test_weights_that_are_elsewhere_do_not_change_the_vocabulary(tiny_llama) -> None:
    """ZeRO-3 leaves empty tensors between two forwards."""
    model = copy.deepcopy(tiny_llama)
    model.get_input_embeddings().weight.data = torch.empty(0)
    assert vocabulary_size(model) == 64
