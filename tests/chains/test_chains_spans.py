"""Token spans against the text they wrote, for each kind of tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mechreward.chains import token_ends
from mechreward.errors import InputError

KINDS = ["bytes", "pieces", "characters"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_the_text_it_added(tokenizers, kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer("so 12 + 3 = 15", add_special_tokens=False)["input_ids"]
    text, ends = token_ends(tokenizer, ids)
    assert text == tokenizer.decode(ids) == "so 12 + 3 = 15"
    # For plain text decoding every prefix gives the same places.
    assert ends == [len(tokenizer.decode(ids[: t + 1])) for t in range(len(ids))]
    assert len(set(ends)) > 5


@given(st.lists(st.integers(0, 329), max_size=30))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_spans_cover_the_text_of_any_ids(tokenizers, kind: str, ids: list[int]) -> None:
    tokenizer = tokenizers[kind]
    ids = [i % len(tokenizer) for i in ids]
    text, ends = token_ends(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert ends == sorted(ends) and len(ends) == len(ids)
    assert ends[-1:] == ([len(text)] if ids else [])


@given(st.text(alphabet="abc 1.\n好é→🙂", max_size=30))
@settings(max_examples=100, deadline=None)
def test_characters_of_several_bytes_belong_to_the_token_that_completes_them(tokenizers, text: str) -> None:
    tokenizer = tokenizers["bytes"]
    ids = tokenizer(text)["input_ids"]
    found, ends = token_ends(tokenizer, ids)
    assert found == text
    for t, end in enumerate(ends):
        whole = tokenizer.decode(ids[: t + 1])
        assert text[:end] == (whole if "\ufffd" not in whole else whole[: whole.index("\ufffd")])


def test_special_tokens_are_empty(tokenizers) -> None:
    tokenizer = tokenizers["bytes"]
    body = tokenizer("a b")["input_ids"]
    end = tokenizer.eos_token_id
    text, ends = token_ends(tokenizer, [end, *body, end])
    assert text == "a b"
    assert (ends[0], ends[-2], ends[-1]) == (0, 3, 3)
    assert token_ends(tokenizer, []) == ("", [])


def test_bytes_that_nothing_completes_belong_to_the_last_token(tokenizers) -> None:
    tokenizer = tokenizers["bytes"]
    first = tokenizer.convert_tokens_to_ids("å")  # the first byte of 好, which has three
    ids = [*tokenizer("ab")["input_ids"], first]
    text, ends = token_ends(tokenizer, ids)
    assert text == "ab\ufffd" and ends[-2:] == [2, 3]


def test_a_tokenizer_whose_pieces_do_not_add_up_is_refused() -> None:
    broken = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    # It rewrites what is already there once another token follows.
    broken.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("aab", "c")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=broken, unk_token="<unk>")
    with pytest.raises(
        InputError, match=r"^tokenizer: \w+ decodes 3 tokens to 'c' but the first 1 of them to 'a'; steps"
    ):
        token_ends(tokenizer, [0, 0, 1])


def test_one_wrong_byte_rewrites_its_run(tokenizers) -> None:
    """SentencePiece's decoder: bytes of `é` are a character until a byte follows that is none."""
    tokenizer = tokenizers["pieces"]
    byte = tokenizer.convert_tokens_to_ids
    good = [byte("<0xC3>"), byte("<0xA9>")]
    assert token_ends(tokenizer, good) == ("é", [0, 1])
    text, ends = token_ends(tokenizer, [*good, byte("<0x80>"), byte("1")])
    assert text == "\ufffd\ufffd\ufffd1" and ends == [1, 1, 3, 4]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("text", ["so  12 + 3\n好é 7 → ok", "a 🙂🙂 b. c"])
def test_ordinary_text_needs_no_second_look(tokenizers, kind: str, text: str, monkeypatch) -> None:
    """The way that decodes whole prefixes takes quadratic time: only bytes that are no characters are worth it."""
    monkeypatch.setattr("mechreward.chains.spans._ends_by_prefixes", None)
    ids = tokenizers[kind](text, add_special_tokens=False)["input_ids"]
    found, ends = token_ends(tokenizers[kind], ids)
    assert found == text and ends[-1] == len(text)
