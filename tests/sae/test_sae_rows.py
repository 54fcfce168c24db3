"""Rows from texts, questions and answers, token by token; what is set aside; packing."""

from __future__ import annotations

from copy import deepcopy

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.sae.rows import packed, question_documents, set_aside, text_documents, with_answers
from mechreward.tasks import Question
from mechreward.tiny.language import make_tokenizer

BOS, EOS = 0, 1
QUESTIONS = [Question("a", "1+2=", "3", "1+2=3"), Question("b", "2+2=", "4")]


@pytest.fixture
def loaded(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


def spelled(tokenizer: PreTrainedTokenizerFast, document: list) -> list[tuple[str, str]]:
    return [(tokenizer.decode(prompt), tokenizer.decode(completion)) for prompt, completion in document]


def test_a_text_becomes_windows_whose_first_token_is_not_read(char_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = text_documents(char_tokenizer, ["12+3=15", "", "7", "ab"])
    assert [spelled(char_tokenizer, d) for d in documents] == [[("1", "2+3=15")], [], [], [("a", "b")]]
    (cut,) = text_documents(char_tokenizer, ["12+3=15"], max_tokens=3)
    # The last window, of one token, has nothing to read.
    assert spelled(char_tokenizer, cut) == [("1", "2+"), ("3", "=1")]
    assert text_documents(char_tokenizer, []) == []


def test_every_window_begins_with_bos_where_the_tokenizer_adds_one() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("1 2 3 4 5")["input_ids"]
    assert (ids[0], len(ids)) == (tokenizer.bos_token_id, 6)
    (document,) = text_documents(tokenizer, ["1 2 3 4 5"], max_tokens=3)
    assert document == [(ids[:1], ids[1:3]), (ids[:1], ids[3:5]), (ids[:1], ids[5:])]


def test_questions_with_their_solutions(loaded: LoadedModel) -> None:
    documents = question_documents(loaded, QUESTIONS)
    assert [spelled(loaded.tokenizer, d) for d in documents] == [[("1", "+2= 1+2=3")], [("2", "+2=")]]
    with pytest.raises(InputError, match="chat: the tokenizer of tiny has no chat template"):
        question_documents(loaded, QUESTIONS, chat=True)


def test_questions_as_turns_of_a_chat(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '#' }}{% endfor %}"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    documents = question_documents(loaded, QUESTIONS, chat=True, max_tokens=9)
    assert [spelled(loaded.tokenizer, d) for d in documents] == [
        [("u", ":1+2=#a:"), ("1", "+2=3#")],
        [("u", ":2+2=#")],
    ]


def test_answers_join_their_question_and_are_read_without_the_prompt(loaded: LoadedModel) -> None:
    answers = [
        Response(name, n, (5, 6), (7 + n, EOS), "", (0.0, 0.0), "eos") for name, n in [("b", 0), ("b", 1), ("a", 0)]
    ]
    documents = question_documents(loaded, QUESTIONS)
    joined = with_answers(documents, QUESTIONS, answers)
    assert joined[0] == [*documents[0], ((5, 6), (7, EOS))]
    assert joined[1] == [*documents[1], ((5, 6), (7, EOS)), ((5, 6), (8, EOS))]
    assert [len(document) for document in documents] == [1, 1]


def test_whole_documents_are_set_aside() -> None:
    documents = [[([at], [at, row]) for row in range(2)] for at in range(41)]
    training, held_out = set_aside(documents)
    assert held_out == [([at], [at, row]) for at in (0, 20, 40) for row in range(2)]
    assert len(training) == 2 * 38
    assert not {tuple(prompt) for prompt, _ in training} & {(0,), (20,), (40,)}
    with pytest.raises(InputError, match="rows: 19 are too few"):
        set_aside(documents[:19])
    with pytest.raises(InputError, match="no document has two tokens"):
        set_aside([[]] * 30)


def test_packed_rows_are_full_and_hold_every_token(loaded: LoadedModel) -> None:
    rows = [([10, 11], [12, EOS]), ([20], [21, 22]), ([30], [31, 32, 33, 34])]
    joined = [10, 11, 12, EOS, 20, 21, 22, EOS, 30, 31, 32, 33, 34, EOS]
    cut = packed(rows, loaded.tokenizer, 4)
    assert [[*prompt, *completion] for prompt, completion in cut] == [joined[i : i + 4] for i in (0, 4, 8, 12)]
    assert [len(prompt) for prompt, _ in cut] == [1] * 4
    assert len(packed(rows, loaded.tokenizer, 13)) == 1  # the fourteenth token stands alone


def test_packing_needs_an_eos(char_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = deepcopy(char_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="packed: the tokenizer has no EOS token"):
        packed([([1], [2])], tokenizer, 4)
