"""Tiny random models and the bundled one, shared by every test; no network, no downloads."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRACKIO_DISABLE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3_5VisionConfig,
)

VOCAB, WIDTH, LAYERS, HEADS = 64, 32, 4, 4
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN #+-=.,:?\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first: the last ones are short then, and both workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 64 tokens in all; BOS, EOS and PAD are distinct; pads on the left."""
    pieces = ["<s>", "</s>", "<pad>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces[:VOCAB])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    # Larger weights than the default initialisation, so that different tokens and layers give clearly different states.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(1)
    return _ready(LlamaForCausalLM(LlamaConfig(**_common(), intermediate_size=64, num_key_value_heads=2)))


@pytest.fixture(scope="session")
def tiny_qwen2() -> PreTrainedModel:
    torch.manual_seed(2)
    return _ready(Qwen2ForCausalLM(Qwen2Config(**_common(), intermediate_size=64, num_key_value_heads=2)))


@pytest.fixture(scope="session")
def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _ready(GPT2LMHeadModel(config))


def _common() -> dict[str, int]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
WINDOW = 8
"""Tokens of sliding attention: shorter than test rows, so that a window that is not honoured shows."""
LINEAR = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GEMMA4 = {
    **GATED,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_common(), **GATED))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_common(), **GATED, sliding_window=WINDOW))


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**_common(), **GATED, head_dim=8, sliding_window=WINDOW))


def _deepseek_v3() -> PreTrainedModel:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    routed = {**EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = {**_common(), **latent, **routed, "intermediate_size": 64, "num_key_value_heads": HEADS}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


def _qwen3_5() -> PreTrainedModel:
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_common(), **GATED, **LINEAR))


def _qwen3_5_image_text() -> PreTrainedModel:
    vision = Qwen3_5VisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH, num_position_embeddings=16
    )
    text = Qwen3_5TextConfig(**_common(), **GATED, **LINEAR)
    # The ids of image and video tokens have to lie inside the tiny vocabulary; the last four characters are given up.
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = Qwen3_5Config(text_config=text.to_dict(), vision_config=vision.to_dict(), **ids)
    return Qwen3_5ForConditionalGeneration(config)


def _qwen3_5_moe() -> PreTrainedModel:
    experts = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
    return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_common(), **LINEAR, **experts, num_key_value_heads=2))


def _gemma4() -> PreTrainedModel:
    return Gemma4ForCausalLM(Gemma4TextConfig(**_common(), **GEMMA4))


def _gemma4_image_text() -> PreTrainedModel:
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        position_embedding_size=64,
    )
    ids = {"image_token_id": 60, "video_token_id": 61, "boi_token_id": 62, "eoi_token_id": 63, "audio_token_id": 59}
    text = Gemma4TextConfig(**_common(), **GEMMA4)
    config = Gemma4Config(text_config=text.to_dict(), vision_config=vision.to_dict(), **ids)
    return Gemma4ForConditionalGeneration(config)


TINY_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "deepseek_v3": _deepseek_v3,
    "qwen3_5": _qwen3_5,
    "qwen3_5_image_text": _qwen3_5_image_text,
    "qwen3_5_moe": _qwen3_5_moe,
    "gemma4": _gemma4,
    "gemma4_image_text": _gemma4_image_text,
}


@cache
def _made(name: str) -> PreTrainedModel:
    torch.manual_seed(4)
    return _ready(TINY_MODELS[name]().float())


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """Makes a tiny random model by name (`TINY_MODELS`), the same object each time: width 32, 4 blocks, vocabulary 64.

    In evaluation mode and shared by all tests: a test that trains one takes a deep copy.
    """
    return _made


@pytest.fixture(scope="session")
def sae_of_layer() -> Callable[..., Any]:
    """Makes a random SAE for a block of the tiny Llama."""
    # Not above: shapes are checked in what is imported after this file.
    from mechreward.sae import SAE, SAEMeta

    def make(layer: int = 1, seed: int = 5) -> SAE:
        encoder = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        return SAE(
            architecture="topk",
            W_enc_DF=encoder,
            b_enc_F=torch.zeros(64),
            W_dec_FD=encoder.T.clone(),
            b_dec_D=torch.zeros(32),
            meta=SAEMeta(release="r", sae_id="i", layer=layer, model_name="", hook_name="h"),
            k=32,
        )

    return make
