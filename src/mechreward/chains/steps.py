"""A response as steps with exact character and token spans, and the pieces of a long one.

Step boundaries come from the text (`split.py`), tokens from the ids (`spans.py`). A step is made of whole tokens: a
boundary that falls inside a token moves to that token's end, or is none if a step would then have no text. Tokens that
wrote nothing (special tokens, the first bytes of a character) belong to the step of what is written next, those at the
end (EOS) to the last.

`mechreward.features.steps` knows a second, narrower way: a step ends at a token whose own text contains a given mark.
It asks nothing but each id's own text, which is what a trainer can afford on every batch, and it is what credit `step`
and pooling `step_end` use. Where every step ends in that mark and nothing else ends one, the two agree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mechreward.chains.spans import token_ends
from mechreward.chains.split import step_starts
from mechreward.errors import InputError


@dataclass(frozen=True)
class Step:
    """One step: `text` is `response[char_start:char_end]`, written by tokens `token_start` to before `token_end`."""

    text: str
    char_start: int
    char_end: int
    token_start: int
    token_end: int


def decompose(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int]) -> list[Step]:
    """Splits a response into its steps.

    Args:
        tokenizer: that of the model that wrote it.
        completion_ids: its token ids as sampled, EOS included; pads left out.

    Returns:
        Steps in order. Their texts put together are the response's text, their token spans cover all its ids.

    Raises:
        InputError: for a response without text, or a tokenizer whose pieces do not add up to the text.
    """
    text, ends = token_ends(tokenizer, completion_ids)
    if not text.strip():
        raise InputError(f"completion_ids: {len(completion_ids)} tokens hold no text; a chain has at least one step")
    begins = [0, *ends]  # token t starts at begins[t]; one more than there are tokens
    firsts, written = [0], len(text.rstrip())
    for place in step_starts(text)[1:]:
        first = bisect_left(begins, place)
        if begins[first] >= written:  # moved to the end of a token behind which there is no text
            break
        if not text[begins[firsts[-1]] : begins[first]].strip():  # moved as far as what ends the next step
            firsts.pop()
        firsts.append(first)
    bounds = zip(firsts, [*firsts[1:], len(ends)], strict=True)
    return [Step(text[begins[a] : begins[b]], begins[a], begins[b], a, b) for a, b in bounds]


def step_of(steps: Sequence[Step], token: int) -> int:
    """Index of the step a token belongs to.

    Raises:
        InputError: if the response has no such token.
    """
    last = steps[-1].token_end - 1 if steps else -1
    if not 0 <= token <= last:
        raise InputError(f"token: {token} is out of range; the response has tokens 0 to {last}")
    return next(index for index, step in enumerate(steps) if token < step.token_end)
