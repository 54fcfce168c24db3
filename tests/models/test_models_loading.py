"""Loading from folders, GGUF files and adapters, and one sentence for everything that cannot be loaded."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mechreward.errors import InputError
from mechreward.models import find_blocks, load_model

IDS = torch.tensor([[0, 7, 30, 12]])


@pytest.fixture(scope="module")
def folder(tiny_llama, char_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_llama.save_pretrained(path)
    char_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory) -> Path:
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(tiny_llama), lora_config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path


def lora_config() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_gives_the_same_model_ready_to_use(folder: Path, tiny_llama) -> None:
    loaded = load_model(folder)
    assert torch.equal(logits(loaded.model), logits(tiny_llama))
    assert not loaded.model.training and loaded.name == str(folder)
    assert (loaded.tokenizer.padding_side, loaded.tokenizer.pad_token) == ("left", "<pad>")


def test_dtype_is_that_of_every_weight(folder: Path) -> None:
    model = load_model(str(folder), dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_pad_falls_back_to_eos_and_padding_goes_left(tiny_llama, char_tokenizer, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(char_tokenizer)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    tiny_llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 1
    assert loaded.tokenizer.padding_side == "left"


def test_an_adapter_comes_along_with_its_weights(folder: Path, adapter: Path, tiny_llama) -> None:
    loaded = load_model(folder, adapter=adapter)
    weights = dict(loaded.model.named_parameters())
    a = weights["base_model.model.model.layers.3.self_attn.v_proj.lora_A.default.weight"]
    b = weights["base_model.model.model.layers.3.self_attn.v_proj.lora_B.default.weight"]
    assert b.abs().sum() > 0 and not b.requires_grad
    # By hand: LoRA adds (alpha / r) B A to the weight of each projection it names.
    merged = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for i, block in enumerate(find_blocks(merged)):
            for name in ("q_proj", "v_proj"):
                stem = f"base_model.model.model.layers.{i}.self_attn.{name}."
                a, b = weights[stem + "lora_A.default.weight"], weights[stem + "lora_B.default.weight"]
                getattr(block.self_attn, name).weight += 2.0 * b @ a
    torch.testing.assert_close(logits(loaded.model), logits(merged), atol=1e-4, rtol=1e-4)
    assert (logits(loaded.model) - logits(tiny_llama)).abs().max() > 0.1


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"num_hidden_layers": 5}, {"hidden_size": 16}])
def test_an_adapter_of_a_model_of_another_size_is_refused(folder: Path, change: dict, tmp_path: Path) -> None:
    """PEFT alone loads the first two: weights with no match are dropped, missing ones stay at their start."""
    config = LlamaConfig(**{**small(), **change})
    get_peft_model(LlamaForCausalLM(config), lora_config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"^adapter: {tmp_path} "):
        load_model(folder, adapter=tmp_path)


def small() -> dict:
    return {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64,
    }  # fmt: skip


def test_an_adapter_of_another_architecture_is_refused(folder: Path, tiny_gpt2, tmp_path: Path) -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(copy.deepcopy(tiny_gpt2), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"^adapter: {tmp_path} does not fit the model"):
        load_model(folder, adapter=tmp_path)


@pytest.fixture(scope="module")
def gguf_path(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama as float32 GGUF, query and key rows in llama.cpp's order, with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, 32), (writer.add_block_count, 4),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_vocab_size, 64), (writer.add_rope_dimension_count, 8),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_rope_freq_base, 10000.0),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, ["<s>", "</s>", *map(chr, range(33, 94)), "AB"]),
        (writer.add_token_types, [3, 3] + [1] * 62),
        (writer.add_token_merges, ["A B"]), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
        (writer.add_chat_template, "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ):  # fmt: skip
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, tensor in tiny_llama.state_dict().items():
        values = tensor.numpy()
        for heads, part in ((4, "q_proj"), (2, "k_proj")):
            if part in name:
                values = values.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_weights_tokenizer_and_chat_template(gguf_path: Path, tiny_llama) -> None:
    loaded = load_model(gguf_path)
    torch.testing.assert_close(logits(loaded.model), logits(tiny_llama), atol=1e-4, rtol=1e-4)
    assert loaded.tokenizer.eos_token == "</s>" and "messages" in loaded.tokenizer.chat_template
    apart = load_model(gguf_path.parent, gguf_file=gguf_path.name)
    assert torch.equal(logits(apart.model), logits(loaded.model))


def test_a_truncated_gguf_file_is_refused(gguf_path: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(gguf_path.read_bytes()[: gguf_path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"^model: cannot load {half}"):
        load_model(half)


def test_truncated_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(InputError, match=f"^model: cannot load {tmp_path}"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(folder: Path, tiny_llama, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(tiny_llama.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"^model: cannot load {tmp_path}"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_a_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    copy_with(folder, tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        InputError, match=r"is not whole \(1 weights are not there, the first is model.layers.1.mlp.up_pr"
    ):
        load_model(tmp_path)


def test_a_weight_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    copy_with(folder, tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(InputError, match=f"^model: cannot load {tmp_path}"):
        load_model(tmp_path)


def copy_with(folder: Path, target: Path, change) -> None:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})


def test_a_tilde_is_the_home_folder(folder: Path, adapter: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model(f"~/{folder.name}").name == f"~/{folder.name}"
    monkeypatch.setenv("HOME", str(adapter.parent))
    assert isinstance(load_model(folder, adapter=f"~/{adapter.name}").model, PeftModel)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("./nowhere", {}, "model: there is no folder ./nowhere"),
        ("./nowhere/x.gguf", {}, "model: there is no file ./nowhere/x.gguf"),
        ("{folder}/x.gguf", {}, "model: there is no file {folder}/x.gguf"),
        ("{folder}", {"gguf_file": "x.gguf"}, "gguf_file: there is no file x.gguf in {folder}"),
        ("{folder}/x.gguf", {"gguf_file": "y.gguf"}, "gguf_file: y.gguf is given though"),
        ("{folder}", {"dtype": "float8"}, "dtype: 'float8' is not known; use one of float32, float16, bfloat16"),
        ("{folder}", {"device": "toaster"}, "device: 'toaster' is not a torch device"),
        ("{folder}", {"device": "cuda:99"}, "device: cuda:99 is not there"),
        ("{folder}", {"adapter": "./nowhere"}, "adapter: there is no adapter_config.json in ./nowhere"),
        ("no-such-model-of-ours", {}, "model: cannot load no-such-model-of-ours"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(folder: Path, name: str, options: dict, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(name.format(folder=folder), **options)
    assert str(caught.value).startswith(sentence.format(folder=folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "text", "sentence"),
    [
        ("model", "tokenizer.json", '{"version": "1.0"}', "model: cannot load"),
        ("model", "config.json", '{"model_type": "llama", "hidden_size": "wide"}', "model: cannot load"),
        ("adapter", "adapter_model.safetensors", "cut", "does not fit the model (Error while deserializing header"),
        ("adapter", "adapter_config.json", '{"peft_type": "NEW"}', "does not fit the model ('NEW')"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    folder: Path, adapter: Path, tmp_path: Path, part: str, name: str, text: str, sentence: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / part / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "model", adapter=tmp_path / "adapter")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_gguf_package_is_named(gguf_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="needs the package gguf; run pip install"):
        load_model(gguf_path)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(InputError, match="model: clip_text_model is not a decoder language model"):
        load_model(tmp_path)
