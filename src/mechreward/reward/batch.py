"""What trainers call a reward with: a batch of prompts and completions, strings or chats."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.verifiers import as_text

Text = str | list[dict[str, Any]]


def check_lengths(prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    """Raises InputError if a batch does not hold one completion a prompt."""
    if len(prompts) != len(completions):
        raise InputError(f"completions: {len(completions)} for {len(prompts)} prompts; give one each")


def is_async(function: Any) -> bool:
    """Whether what a call gives has to be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]] | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts and completions: chats by the tokenizer's template, completions as given, else from their text."""
    prompt_ids = [_prompt_ids(tokenizer, prompt, chat_template_kwargs or {}) for prompt in prompts]
    if completion_ids is None:
        texts = [as_text(completion) for completion in completions]
        completion_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return prompt_ids, [list(ids) for ids in completion_ids]


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Text], completion_ids: Sequence[Sequence[int]] | None
) -> None:
    """Raises InputError if ids that came with their text are not that text in this tokenizer.

    Of a chat nothing is checked: a trainer may have taken reasoning or tool calls out of its text.
    """
    for ids, text in zip(completion_ids or [], completions, strict=False):
        if isinstance(text, str) and str(tokenizer.decode(list(ids), skip_special_tokens=True)) != text:
            raise InputError(
                f"completion_ids: in this tokenizer they do not say what the completion says ({text[:40]!r}); bind the "
                "reward to a model with the policy's tokenizer"
            )


def check_text_only(prompts: Sequence[Text]) -> None:
    """Raises InputError for a chat with images or other parts that are no text: no forward here is given them."""
    for message in (message for prompt in prompts if not isinstance(prompt, str) for message in prompt):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        kind = next((part["type"] for part in parts if part["type"] != "text"), None)
        if kind is not None:
            raise InputError(f"prompts: a feature reward reads text only; this chat holds a part of type {kind!r}")


def holds_tool_output(completions: Sequence[Text]) -> bool:
    """Whether a completion has messages that the policy did not write."""
    chats = (completion for completion in completions if not isinstance(completion, str))
    return any(message["role"] != "assistant" for chat in chats for message in chat)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, options: Mapping[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None and options.get("chat_template") is None:
        raise InputError(
            "prompts: one is a chat, and the tokenizer that reads it has no chat template; bind one that has, or give "
            "bind a chat_template in chat_template_kwargs"
        )
    fixed: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    chat: Any = tokenizer.apply_chat_template(prompt, **fixed, **options)
    return list(chat["input_ids"])
