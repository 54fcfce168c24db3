"""Where steps end: token texts by a character tokenizer, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features.steps import last_of_steps, last_token, step_ends


def test_tokens_that_hold_the_mark(char_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [char_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a\nb", "\n\n", "", "x=1.y")]
    assert step_ends(char_tokenizer, ids, "\n").int().tolist() == [
        [0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert step_ends(char_tokenizer, ids, ".")[3].int().tolist() == [0, 0, 0, 1, 0]
    assert step_ends(char_tokenizer, [[], []], ".").shape == (2, 0)
    assert step_ends(char_tokenizer, [], ".").shape == (0, 0)


def test_a_mark_over_two_tokens_is_not_found(char_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = char_tokenizer("a\n\nb", add_special_tokens=False)["input_ids"]
    assert not step_ends(char_tokenizer, [ids], "\n\n").any()


def test_what_is_known_is_not_decoded_again(char_tokenizer: PreTrainedTokenizerFast) -> None:
    a, newline = char_tokenizer("a\n", add_special_tokens=False)["input_ids"]
    known: dict[int, bool] = {}
    step_ends(char_tokenizer, [[a, newline, a]], "\n", known)
    assert known == {a: False, newline: True}
    known[a] = True  # had it been decoded again, this would be overwritten
    assert step_ends(char_tokenizer, [[a]], "\n", known).tolist() == [[True]]


def test_the_last_token_ends_the_last_step() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    ends = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1]]).bool()
    assert last_of_steps(mask, ends).int().tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert last_token(mask).tolist() == [1, 2, -1]
    assert last_token(mask[:, :0]).tolist() == [-1, -1, -1]


def test_a_step_whose_mark_is_masked_ends_before_it() -> None:
    """A line break of massive norm, or one in a tool's output, still parts two steps."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    ends = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0]]).bool()
    assert last_of_steps(mask, ends).int().tolist() == [[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]
    assert last_of_steps(mask[:, :0], ends[:, :0]).shape == (3, 0)


def test_an_empty_mark_is_named(char_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="step_end: is empty"):
        step_ends(char_tokenizer, [[5]], "")
