"""Whether a pack's features are read on prompts of the form that they were found on.

A feature fires differently behind another prompt, and a model answers another prompt in another format: the first
mechreward lost 200 training steps to that. Told apart are plain text from chat, chat of one user's message from any
other, the text around the question, and the chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mechreward.features.pack import PLACEHOLDER, PackPrompt
from mechreward.files import sha256_bytes
from mechreward.verifiers import as_text

SHOWN = 120
"""Characters of a prompt that a warning shows."""


def pack_prompt(format: str, chat: bool, tokenizer: PreTrainedTokenizerBase) -> PackPrompt:
    """What a pack keeps of prompts made of `format`, and sent through the tokenizer's chat template if `chat`."""
    return PackPrompt(format=format, chat=chat, template_hash=template_hash(tokenizer) if chat else None)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the tokenizer's chat template; None if it has none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    return sha256_bytes((template if isinstance(template, str) else json.dumps(template, sort_keys=True)).encode())


def prompt_mismatch(found_on: PackPrompt, prompts: Sequence[object], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """One sentence on the first prompt of another form, with both forms; None if all are of the pack's.

    Args:
        found_on: the pack's.
        prompts: as trainers hand them over, strings or lists of messages.
        tokenizer: that of the model that answers them.
    """
    pattern = re.compile("(?s:.*)".join(map(re.escape, found_on.format.split(PLACEHOLDER))))
    for prompt in prompts:
        fits = _is_chat(prompt) == found_on.chat and pattern.fullmatch(as_text(prompt))
        if not fits or (found_on.chat and _roles(prompt) != ["user"]):
            return f"the pack was found on {_described(found_on)}, but is read on {_shown(prompt)}"
    here = template_hash(tokenizer)
    if found_on.chat and found_on.template_hash not in (None, here):
        return f"the pack was found on {_described(found_on)}, but the tokenizer's template is {_short(here)}"
    return None


def _is_chat(prompt: object) -> bool:
    return not isinstance(prompt, str)


def _roles(prompt: object) -> list[str]:
    return [message["role"] for message in prompt] if isinstance(prompt, list) else []


def _described(found_on: PackPrompt) -> str:
    if not found_on.chat:
        return f"plain prompts {found_on.format!r}"
    return f"chat prompts {found_on.format!r} (roles user; template {_short(found_on.template_hash)})"


def _shown(prompt: object) -> str:
    kind = f"a chat prompt (roles {', '.join(_roles(prompt))})" if _is_chat(prompt) else "a plain prompt"
    text = as_text(prompt)
    return f"{kind} {text[:SHOWN] + ('...' if len(text) > SHOWN else '')!r}"


def _short(hash_: str | None) -> str:
    return "unknown" if hash_ is None else hash_[:12]
