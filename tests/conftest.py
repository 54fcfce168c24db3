"""Tiny random models and the bundled one, shared by every test; no network, no downloads."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRACKIO_DISABLE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB, WIDTH, LAYERS, HEADS = 64, 32, 4, 4
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN #+-=.,:?\n"


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
