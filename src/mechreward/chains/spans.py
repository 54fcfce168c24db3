"""Which characters of a response each of its tokens wrote, for any tokenizer, from the token ids alone.

Ids are decoded one more at a time, each time from the start of the token before, so that a decoder that treats the
first token of a text apart (SentencePiece drops its leading space) does so only where it did in the whole. Text that
still ends in the replacement character is held back until the bytes of its character are complete: tokens that wrote
only some of those bytes are empty, and the one that completes the character has it. Special tokens are skipped, as in
`Response.text`, and are empty too.

So the spans lie side by side and cover the text: token t wrote `text[start_t:end_t]`, and `end_t == start_(t+1)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no whole character."""


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of the ids, and for each token the place in it where what the token wrote ends.

    Args:
        ids: of a completion, as sampled; may be empty.

    Returns:
        The text, which is `tokenizer.decode(ids, skip_special_tokens=True)`, and one place a token, never falling.

    Raises:
        InputError: if the tokenizer rewrites text it has written, so that tokens have no place in it.
    """
    text = _decode(tokenizer, ids)
    written, ends = _ends_by_windows(tokenizer, ids)
    if written != text.rstrip(INCOMPLETE):
        ends = _ends_by_prefixes(tokenizer, ids, text)
    return text, [*ends[:-1], len(text)] if ends else []


def _ends_by_windows(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """What the pieces add up to, and where each ends in that."""
    written, ends = "", []
    before, after = 0, 0  # ids[before:after] is context: decoded again, its text is written already
    for t in range(len(ids)):
        known = _decode(tokenizer, ids[before:after])
        now = _decode(tokenizer, ids[before : t + 1])
        fresh = now.rstrip(INCOMPLETE).removeprefix(known)
        ends.append(len(written) + len(fresh))
        if fresh and not now.endswith(INCOMPLETE):
            written += fresh
            before, after = after, t + 1
    return written, ends


def _ends_by_prefixes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """The same from whole prefixes, in quadratic time, where bytes that are no characters rewrite what is before them.

    SentencePiece's decoders do: one wrong byte turns all bytes of its run into replacement characters.
    """
    ends, end = [], 0
    for t in range(len(ids)):
        prefix = _decode(tokenizer, ids[: t + 1])
        shared = len(commonprefix([prefix, text]))
        if INCOMPLETE not in (text[shared : shared + 1], prefix[shared : shared + 1]) and shared < len(prefix):
            name = type(tokenizer).__name__
            raise InputError(
                f"tokenizer: {name} decodes {len(ids)} tokens to {text[:40]!r} but the first {t + 1} of them to "
                f"{prefix[:40]!r}; steps need a tokenizer that never rewrites what is written"
            )
        end = max(end, shared)
        ends.append(end)
    return ends


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
