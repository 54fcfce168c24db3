"""Exact text: the answer word for word, whatever the spaces between; capitals count.

Strict extraction takes the rest of the line after the last ``####``; without a marker, the whole response. Lenient
extraction asks whether the response ends on the gold answer, as whole words, a closing full stop aside.
"""

from __future__ import annotations

from mechreward.tasks import after_marker
from mechreward.verifiers.text import Gold, answer_text, gold_text
from mechreward.verifiers.verdict import Verdict


def exact(prompt: object, completion: object, answer: Gold = None) -> Verdict:
    """Judges a completion by its very words.

    Args:
        prompt: text or chat; read only where `answer` is not given, for the gold text after its ``####``.
        completion: text or chat.
        answer: the gold text.

    Raises:
        InputError: if the gold answer is missing.

    >>> exact("Spell it.", " New   York\\n", "New York").correct
    True
    """
    gold = " ".join(gold_text(prompt, answer).split())
    text = answer_text(completion)
    words = " ".join(text.split())
    lenient = any(f" {ending}".endswith(f" {gold}") for ending in (words, words.removesuffix(".")))
    marked = after_marker(text, last=True)
    extracted = words if marked is None else " ".join(marked.split())
    if not extracted:
        return Verdict(False, None, "empty response" if marked is None else "nothing after ####", lenient)
    return Verdict(extracted == gold, extracted, "match" if extracted == gold else "different text", lenient)
