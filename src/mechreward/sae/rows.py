"""Rows of token ids to train an SAE on: from texts, from questions with their solutions, from the model's own answers.

A row is (prompt ids, completion ids); completion tokens are read. A *document* is the list of rows that came from one
text or one question: what is only measured on is set aside by document, so that no prompt is on both sides. A text
becomes one row a window of the context (padded when it is read: each state is what the reward would see), or rows are
packed: joined with EOS between them and cut into full rows, which spends nothing on pads and lets attention cross from
one document into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.tasks import Question

Row = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, completion ids)"""
Document = list[Row]
"""Rows that stay together on one side of the split."""

HELD_OUT_EVERY = 20
"""One document in so many is kept out of training and measured on."""


def text_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None = None
) -> list[Document]:
    """One document a text, in windows of at most `max_tokens`.

    The first token of a window is its prompt and is not read: BOS where the tokenizer adds one, which then stands in
    front of every window. A window of fewer than two tokens is left out.
    """
    ids = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return [_windows(row, max_tokens, tokenizer.bos_token_id) for row in ids]


def question_documents(
    loaded: LoadedModel, questions: Sequence[Question], *, max_tokens: int | None = None, chat: bool = False
) -> list[Document]:
    """One document a question: its prompt and, where there is one, its worked solution after a space.

    With `chat` both go through the chat template, as the user's and the assistant's turn.

    Raises:
        InputError: if `chat` is asked of a tokenizer without a chat template.
    """
    tokenizer = loaded.tokenizer
    if not chat:
        texts = [f"{q.prompt} {q.solution}" if q.solution else q.prompt for q in questions]
        return text_documents(tokenizer, texts, max_tokens)
    if tokenizer.chat_template is None:
        raise InputError(f"chat: the tokenizer of {loaded.name} has no chat template; train without chat")
    return [_windows(_chat_ids(tokenizer, question), max_tokens, tokenizer.bos_token_id) for question in questions]


def with_answers(
    documents: Sequence[Document], questions: Sequence[Question], responses: Sequence[Response]
) -> list[Document]:
    """Adds to each question's document the model's own answers; of these only the answer is read, not the prompt
    again."""
    answers: dict[str, Document] = {question.id: [] for question in questions}
    for response in responses:
        answers[response.question_id].append((response.prompt_ids, response.completion_ids))
    return [[*document, *answers[question.id]] for document, question in zip(documents, questions, strict=True)]


def set_aside(documents: Sequence[Document]) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows of one document in 20 to measure on.

    Raises:
        InputError: if there are fewer than 20 documents.
    """
    if len(documents) < HELD_OUT_EVERY:
        raise InputError(
            f"rows: {len(documents)} are too few to train and measure an SAE on; at least {HELD_OUT_EVERY} are needed"
        )
    training = [row for at, document in enumerate(documents) if at % HELD_OUT_EVERY for row in document]
    held_out = [row for document in documents[::HELD_OUT_EVERY] for row in document]
    if not training or not held_out:
        raise InputError("rows: no document has two tokens or more; longer ones are needed")
    return training, held_out


def packed(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Row]:
    """The rows' tokens, each row closed by EOS, joined and cut into rows of `max_tokens`; the first token of each is
    not read. A remainder of fewer than two tokens is left out.

    Raises:
        InputError: if the tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("packed: the tokenizer has no EOS token to put between documents; leave packed off")
    ids = [token for prompt, completion in rows for token in _closed([*prompt, *completion], eos)]
    return _windows(ids, max_tokens, None)


def _closed(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1] == eos else [*ids, eos]


def _windows(ids: Sequence[int], max_tokens: int | None, bos: int | None) -> Document:
    return [(window[:1], window[1:]) for window in _cut(list(ids), max_tokens, bos) if len(window) > 1]


def _cut(ids: list[int], max_tokens: int | None, bos: int | None) -> Iterator[list[int]]:
    """Windows of at most `max_tokens`; where the text begins with BOS, every window does."""
    if max_tokens is None:
        yield ids
        return
    front = ids[:1] if ids and ids[0] == bos else []
    step = max_tokens - len(front)
    for start in range(len(front), len(ids), step):
        yield front + ids[start : start + step]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    turns = [{"role": "user", "content": question.prompt}]
    if question.solution:
        turns.append({"role": "assistant", "content": question.solution})
    return list(tokenizer.apply_chat_template(turns, return_dict=False))
