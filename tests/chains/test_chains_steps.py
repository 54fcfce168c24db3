"""Steps of sampled chains against the world that made them, and what holds for any tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.chains import Step, decompose, step_of, token_ends
from mechreward.errors import InputError
from mechreward.features.steps import step_ends
from mechreward.tiny.world import label_chain, write_chain

TEXTS = ["So x is 3.14. Then 2 + 3 = 5.\nMr. A eats. ", "好。naïve. Yes! ok\n\n1. a", "a. b. c\nd", "one line"]


def test_spans_of_characters_and_tokens_by_hand(char_tokenizer) -> None:
    ids = char_tokenizer("a1. b\nc", add_special_tokens=False)["input_ids"] + [char_tokenizer.eos_token_id]
    steps = decompose(char_tokenizer, ids)
    got = [(s.text, s.char_start, s.char_end, s.token_start, s.token_end) for s in steps]
    assert got == [("a1.", 0, 3, 0, 3), (" b\n", 3, 6, 3, 6), ("c", 6, 7, 6, 8)]
    assert [step_of(steps, t) for t in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("text", TEXTS)
def test_steps_lie_side_by_side_and_cover_the_response(tokenizers, kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    check_cover(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


@given(st.lists(st.integers(0, 319), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_steps_cover_any_ids(tokenizers, kind: str, ids: list[int]) -> None:
    if token_ends(tokenizers[kind], ids)[0].strip():
        check_cover(tokenizers[kind], ids)


def check_cover(tokenizer, ids: list[int]) -> None:
    steps = decompose(tokenizer, ids)
    text, ends = token_ends(tokenizer, ids)
    assert "".join(step.text for step in steps) == text
    assert (steps[0].token_start, steps[0].char_start) == (0, 0)
    assert (steps[-1].token_end, steps[-1].char_end) == (len(ids), len(text))
    for step, following in zip(steps, steps[1:], strict=False):
        assert (step.token_end, step.char_end) == (following.token_start, following.char_start)
    for step in steps:
        assert step.text == text[step.char_start : step.char_end]
        assert step.token_start < step.token_end
        assert step.text.strip()
        assert step.char_end == ends[step.token_end - 1]


def test_a_boundary_inside_a_token_moves_to_its_end(tokenizers) -> None:
    tokenizer = tokenizers["bytes"]
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.add_tokens(["b. c", ". ", "ee. f"])
    ids = tokenizer("ab. cd. e", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["a", "b. c", "d", ". ", "e"]
    assert [step.text for step in decompose(tokenizer, ids)] == ["ab. c", "d. ", "e"]
    tail = tokenizer("ab. cee. f", add_special_tokens=False)["input_ids"]
    assert [step.text for step in decompose(tokenizer, tail)] == [
        "ab. c",
        "ee. f",
    ]  # no empty step after the last token


@pytest.mark.parametrize("last", ["b. c", "。c"])
def test_what_is_behind_the_token_a_boundary_falls_into_is_no_step_without_text(tokenizers, last: str) -> None:
    bare = tokenizers["bytes"]
    tokenizer = type(bare)(tokenizer_object=bare.backend_tokenizer, eos_token="<|end|>")
    tokenizer.add_tokens([last])
    ids = tokenizer(f"a{last}", add_special_tokens=False)["input_ids"]
    for behind in ("<|end|>", " <|end|>", " \n"):
        whole = ids + tokenizer(behind, add_special_tokens=False)["input_ids"]
        text = f"a{last}" + behind.removesuffix("<|end|>")
        assert decompose(tokenizer, whole) == [Step(text, 0, len(text), 0, len(whole))]
    further = ids + tokenizer("\nd", add_special_tokens=False)["input_ids"]
    assert [step.text for step in decompose(tokenizer, further)] == [f"a{last}\n", "d"]


def test_chains_are_split_as_they_were_generated(sampled) -> None:
    n_steps = 0
    for response in sampled.responses:
        problem = sampled.problem(response)
        flips = label_chain(problem, response.text).flips
        if flips is None:
            continue
        want = [part.strip() for part in write_chain(problem, flips).replace(" . ", " .|").split("|")]
        steps = decompose(sampled.loaded.tokenizer, response.completion_ids)
        assert [step.text.strip() for step in steps] == want
        assert steps[-1].token_end == len(response.completion_ids)
        n_steps += len(steps)
    assert n_steps > 150


def test_the_mark_of_the_trainer_agrees_where_it_is_all_that_ends_a_step(char_tokenizer) -> None:
    ids = char_tokenizer("a b\nc=1\nd", add_special_tokens=False)["input_ids"]
    marked = step_ends(char_tokenizer, [ids], "\n")[0].nonzero().flatten().tolist()
    assert [step.token_end - 1 for step in decompose(char_tokenizer, ids)] == [*marked, len(ids) - 1]


def test_bad_input_is_one_sentence(char_tokenizer) -> None:
    with pytest.raises(InputError, match="^completion_ids: 0 tokens hold no text; a chain has at least one step$"):
        decompose(char_tokenizer, [])
    with pytest.raises(InputError, match="^completion_ids: 1 tokens hold no text"):
        decompose(char_tokenizer, [char_tokenizer.eos_token_id])
    steps = decompose(char_tokenizer, char_tokenizer("ab", add_special_tokens=False)["input_ids"])
    for token in (-1, 2):
        with pytest.raises(InputError, match=f"^token: {token} is out of range; the response has tokens 0 to 1$"):
            step_of(steps, token)
