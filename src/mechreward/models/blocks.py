"""Where a model keeps its decoder blocks.

Layer `L` means the output of decoder block `L`, counted from 0, everywhere in this library. transformers calls it
`hidden_states[L + 1]`, except after the last block, where `hidden_states` holds the state *after* the final norm; so we
always look at the block itself and never at `hidden_states`.
"""

from __future__ import annotations

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mechreward.errors import InputError

BLOCK_LISTS = ("layers", "h", "blocks")  # the second is GPT-2's name, the third MPT's
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")  # GPT-2, GPT-NeoX, Phi, MPT


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, `torch.compile`, DeepSpeed and PEFT wrappers.

    LoRA and its kin live inside the model's own linear layers, so the unwrapped model still runs with the adapter.

    Raises:
        InputError: for adapters that add virtual tokens (prompt and prefix tuning), which would shift every position,
            and for anything that is not a transformers model.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(inner, PeftModel):
        if inner.active_peft_config.is_prompt_learning:
            kind = inner.active_peft_config.peft_type
            raise InputError(f"adapter: {kind} adds virtual tokens, which shift every position; use LoRA or its kin")
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        kind = type(model).__name__
        raise InputError(f"model: {kind} holds no transformers model; pass a PreTrainedModel or a PeftModel")
    return inner


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder without its head, which keeps the blocks; for a multimodal model that of its language model."""
    decoder = unwrap(model).get_decoder()
    # Llama 4 gives its model with the head on.
    return decoder if _block_list(decoder) is not None else dict(decoder.named_children()).get("model", decoder)


def _block_list(decoder: nn.Module) -> nn.ModuleList | None:
    children = dict(decoder.named_children())
    lists = (children.get(name) for name in BLOCK_LISTS)
    return next((each for each in lists if isinstance(each, nn.ModuleList)), None)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order, whatever wraps the model; for a multimodal model those of its language model.

    Raises:
        InputError: if the decoder has no list of blocks under a known name.
    """
    decoder = find_decoder(model)
    blocks = _block_list(decoder)
    if blocks is not None:
        return blocks
    names = " or ".join(BLOCK_LISTS)
    raise InputError(f"model: {type(decoder).__name__} keeps no blocks under {names}; it is not supported")


def find_final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding.

    Raises:
        InputError: if the decoder has none under a known name.
    """
    decoder = find_decoder(model)
    children = dict(decoder.named_children())
    norm = next((children[name] for name in FINAL_NORMS if name in children), None)
    if norm is None:
        raise InputError(f"model: {type(decoder).__name__} keeps no final norm under {' or '.join(FINAL_NORMS)}")
    return norm


def block_name(model: nn.Module, layer: int) -> str:
    """Path of block `layer` in the transformers model, such as ``model.language_model.layers.3``."""
    check_layer(model, layer)
    block = find_blocks(model)[layer]
    return next(name for name, module in unwrap(model).named_modules() if module is block)


def n_blocks(model: nn.Module) -> int:
    """How many decoder blocks the model has."""
    return len(find_blocks(model))


def d_model(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(text_config(model).hidden_size)


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the language model, also inside a multimodal one."""
    return unwrap(model).config.get_text_config(decoder=True)


def check_causal(model: nn.Module) -> None:
    """Raises:
    InputError: if tokens see what comes after them, so that no state is what the model had while it wrote.
    """
    # PaliGemma's, where a completion would be taken for a part of the prompt, which sees all of itself, and
    # EmbeddingGemma's; Gemma 4's "vision" is of images alone.
    if text_config(model).to_dict().get("use_bidirectional_attention") in (True, "all"):
        name = type(unwrap(model)).__name__
        raise InputError(f"model: tokens of {name} see later ones; only causal models are supported")


def context_length(model: nn.Module) -> int | None:
    """Most tokens a row may have, or None where the architecture states no limit."""
    # Optional in transformers' configurations: ALiBi and state-space models have none.
    config, name = text_config(model), "max_position_embeddings"
    limit = config.to_dict().get(config.attribute_map.get(name, name))
    return None if limit is None else int(limit)


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the embedding matrix: token ids go from 0 to one less."""
    # Not from the matrix: sharded weights (ZeRO-3) are empty between two forwards.
    return int(text_config(model).vocab_size)


def check_layer(model: nn.Module, layer: int) -> None:
    """Raises:
    InputError: if the model has no block `layer`; negative numbers are not counted from the end.
    """
    last = n_blocks(model) - 1
    if not 0 <= layer <= last:
        raise InputError(f"layer: {layer} is out of range; the model has blocks 0 to {last}")
