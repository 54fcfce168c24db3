"""The text a verifier judges: chat messages joined, another question cut off, and the gold answer found."""

from __future__ import annotations

import re
from collections.abc import Collection

from mechreward.errors import InputError
from mechreward.tasks import MARKER, after_marker

# A line that opens another question or another speaker's turn. A dot or bracket needs a number first ("Problem 2.").
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:#{1,6}[ \t]+)?(?:\*\*|__)?"
    r"(?:(?:Q|Question|Problem|Exercise)(?:[ \t]*#?\d+[ \t]*[.:)]|[ \t]*:)|(?:User|Human)[ \t]*:)",
    re.IGNORECASE,
)
Gold = str | int | float | None


def as_text(value: object, *, roles: Collection[str] | None = None) -> str:
    """A prompt or completion as text, whether given as a string or in chat form.

    Args:
        value: a string, or a list of messages `{"role": ..., "content": ...}` whose content is a string, None, or a
            list of parts of which those of type `text` count. Messages are joined by newlines.
        roles: of a chat, take only messages of these roles.

    Raises:
        InputError: if `value` is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        return "\n".join(_content(m["content"]) for m in value if roles is None or m["role"] in roles)
    raise InputError(
        f"text: a {type(value).__name__} is neither a string nor a chat; allowed are a string and a list of messages "
        "with role and content"
    )


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return str(content)


def cut_at_next_question(text: str) -> str:
    """The text up to the first line that opens another question (``Q:``, ``Question 2:``, ``Problem:``, ``User:``).

    A question on the very first line is left: there the response may say again what it was asked.

    >>> cut_at_next_question("It is 4.\\nQ: What is 3 + 3?\\nA: 6")
    'It is 4.'
    """
    found = _NEXT_QUESTION.search(text)
    return text[: found.start()] if found else text


def answer_text(completion: object) -> str:
    """What is judged of a completion: the assistant's own messages (no tool output), without a further question."""
    return cut_at_next_question(as_text(completion, roles=("assistant",)))


def gold_text(prompt: object, answer: Gold) -> str:
    """The gold answer: `answer`, or the text after its ``####``; without one, the text after the prompt's ``####``.

    Raises:
        InputError: if there is none, or the prompt has several that differ (worked examples, say).
    """
    if answer is not None:
        text = str(answer)
        gold = after_marker(text) if MARKER in text else text.strip()
        if not gold:
            raise InputError(f"answer: {text!r} is empty; a gold answer is needed")
        return gold
    lines = as_text(prompt).splitlines()
    golds = {gold for line in lines if (gold := after_marker(line))}
    if len(golds) == 1:
        return golds.pop()
    if golds:
        raise InputError(f"answer: the prompt has {len(golds)} different ones after {MARKER}; pass the gold as answer")
    raise InputError(f"answer: none was given and the prompt has none after {MARKER}; pass answer or put it there")
