"""Loading a policy and its tokenizer: Hugging Face folders and ids, GGUF files, multimodal checkpoints, PEFT adapters.

Everything goes through transformers' and PEFT's own loaders; no pickle is read. A GGUF file is dequantised to `dtype`
by transformers; tokenizer and chat template come out of the same file.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mechreward.errors import InputError
from mechreward.models.blocks import unwrap
from mechreward.models.device import find_device

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A policy ready to use: in evaluation mode, its tokenizer padding on the left with a pad token."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> LoadedModel:
    """Loads a causal or multimodal language model and its tokenizer.

    Args:
        name_or_path: a folder, a Hugging Face id, or a path that ends in `.gguf`.
        gguf_file: name of a GGUF file inside the folder (or repository) `name_or_path`.
        adapter: folder or id of a PEFT adapter to put on top; it is loaded for inference, all its weights must fit.
        dtype: "float32", "float16" or "bfloat16".
        device: a torch device, such as "cpu" or "cuda:0", or "auto" (`find_device`).

    Raises:
        InputError: naming what is missing, unknown or does not fit.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    target = find_device(device)
    source, gguf_file = _locate(os.path.expanduser(name_or_path), gguf_file)
    policy, tokenizer = _load(source, gguf_file, DTYPES[dtype])
    if adapter is not None:
        policy = _add_adapter(policy, os.path.expanduser(str(adapter)))
    _prepare_tokenizer(tokenizer, str(name_or_path))
    cast(nn.Module, policy).to(target)
    return LoadedModel(policy.eval(), tokenizer, str(name_or_path))


def _load(
    source: str, gguf_file: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    # A GGUF file is a format of its own; everywhere else weights that are pickled are refused.
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    weights: dict[str, Any] = {} if gguf_file else {"use_safetensors": True}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        auto_class: Any = _auto_class(config)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        loading = {"config": config, "dtype": dtype, "output_loading_info": True} | options | weights
        model, found = auto_class.from_pretrained(source, **loading)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
        # RuntimeError: transformers' for weights of another shape than the configuration's; KeyError: for a
        # tokenizer.json without its parts; StrictDataclassError: for a configuration's value of another type.
        what = f"{source}/{gguf_file}" if gguf_file else source
        why = f"cannot load {what} ({_first_line(error)})"
        raise InputError(f"model: {why}; name a whole model folder or id") from error
    if missing := sorted(found["missing_keys"]):
        # transformers draws them at random and goes on.
        count = f"{len(missing)} weights are not there, the first is {missing[0]}"
        raise InputError(f"model: {source} is not whole ({count}); name a whole model folder or id")
    return model, tokenizer


def _locate(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Folder (or id) and GGUF file; a path ending in .gguf is taken apart, a path that is not there is an error."""
    if name.endswith(".gguf"):
        if gguf_file is not None:
            raise InputError(f"gguf_file: {gguf_file} is given though {name} is a GGUF file already; give one of them")
        if not Path(name).is_file():
            raise InputError(f"model: there is no file {name}; name a .gguf file, a model folder or a Hugging Face id")
        name, gguf_file = str(Path(name).parent), Path(name).name
    if _looks_local(name) and not Path(name).is_dir():
        raise InputError(f"model: there is no folder {name}; name a model folder, a .gguf file or a Hugging Face id")
    if gguf_file is not None and Path(name).is_dir() and not (Path(name) / gguf_file).is_file():
        raise InputError(f"gguf_file: there is no file {gguf_file} in {name}")
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise InputError(f"gguf_file: reading {gguf_file} needs the package gguf; run pip install 'mechreward[gguf]'")
    return name, gguf_file


def _looks_local(name: str) -> bool:
    # An id is "name" or "owner/name"; everything deeper, absolute or relative to here can only be a path.
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Causal where transformers has a causal class for the checkpoint, else the image-and-text one."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise InputError(f"model: {config.model_type} is not a decoder language model; name a causal or multimodal one")


def _add_adapter(model: PreTrainedModel | PeftModel, adapter: str) -> PeftModel:
    if _looks_local(adapter) and not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"adapter: there is no adapter_config.json in {adapter}; name the folder of a PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = True
        peft_model = PeftModel(unwrap(model), config)
        # `PeftModel.from_pretrained` drops this result, and weights for blocks the model lacks would go unnoticed.
        result = peft_model.load_adapter(adapter, "default")
    except (ValueError, RuntimeError, OSError, KeyError, SafetensorError) as error:
        # PEFT raises ValueError for modules it cannot find, RuntimeError for weights of another shape and KeyError for
        # a kind of adapter that it does not know.
        raise InputError(f"adapter: {adapter} does not fit the model ({_first_line(error)})") from error
    strangers = [*result.missing_keys, *result.unexpected_keys]
    if strangers:
        count = f"{len(strangers)} weights have no match, the first is {strangers[0]}"
        raise InputError(f"adapter: {adapter} was made for another model ({count}); name one made for this")
    unwrap(peft_model)
    return peft_model


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer: that of {name} has neither a pad nor an EOS token; set one in its configuration")
    tokenizer.pad_token = tokenizer.eos_token


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
