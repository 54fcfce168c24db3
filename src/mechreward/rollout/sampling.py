"""Sampling G responses a question with transformers' `generate`, or the rest of a response from any token on.

Choices:
- Log-probabilities are gathered while sampling, from the logits each token was drawn from (before temperature and
  top-p), so they cost no second forward and one step's [B, V] of memory, never [B, T, V].
- Rows are taken in the order of their length, so that a batch has little padding and ends at about one time. When half
  of a batch has ended and much is left, the other half goes back to the queue and joins rows like it, its tokens so far
  as part of the prompt: ended rows do not keep computing. What is drawn next depends only on the prefix, so the
  distribution stays the same.
- A cache with room (`models.cache`): transformers' growing one copies itself at every step.
- The model's own generation defaults (top-k 50, repetition penalty, ...) are set aside: the policy itself is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mechreward.errors import InputError
from mechreward.models import Limits, LoadedModel, context_length, eval_mode, unwrap, vocabulary_size
from mechreward.rollout.decoding import Plan, Row, extend
from mechreward.rollout.response import Response
from mechreward.tasks import Question


def sample_responses(
    loaded: LoadedModel,
    questions: Sequence[Question],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    chat: bool = False,
    on_batch: Callable[[list[Response]], None] | None = None,
) -> list[Response]:
    """Samples `n` responses to each question.

    Args:
        loaded: the policy; its mode and the global random state are left as they were.
        questions: their prompts are tokenised once, with the tokenizer's special tokens.
        n: responses a question.
        max_new_tokens: at most so many tokens a response, EOS included.
        temperature: 0 means greedy, and then `n` must be 1.
        top_p: nucleus mass in (0, 1].
        batch_size: rows decoded at a time. The same seed gives the same responses for the same batch size.
        seed: of the sampling.
        chat: puts each prompt into the tokenizer's chat template as the user's turn.
        on_batch: called with the responses that have ended, as they do; for progress bars and partial saving.

    Returns:
        Responses in the order of the questions, each question's samples together.

    Raises:
        InputError: naming a bad argument, an empty prompt, or a question that does not fit into the context.
    """
    _check_numbers(n, max_new_tokens, temperature, top_p, batch_size)
    prompts = tokenise_prompts(loaded, questions, max_new_tokens=max_new_tokens, chat=chat)
    plan = Plan(eos_ids(loaded), _pad_id(loaded), max_new_tokens, temperature, top_p)
    queue = [Row(q, sample, prompt) for q, prompt in enumerate(prompts) for sample in range(n)]
    done: dict[tuple[int, int], Response] = {}

    def keep(ended: list[Row]) -> None:
        fresh = [_response(loaded, questions[row.question].id, row, plan) for row in ended]
        done.update({(row.question, row.sample): r for row, r in zip(ended, fresh, strict=True)})
        if on_batch is not None:
            on_batch(fresh)

    _grow(unwrap(loaded.model), queue, plan, batch_size, seed, keep)
    return [done[key] for key in sorted(done)]


def continue_responses(
    loaded: LoadedModel,
    responses: Sequence[Response],
    starts: Sequence[int],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> list[list[Response]]:
    """Keeps the first `starts[i]` tokens of response i and draws the rest anew, `n` times.

    Token ids go in as they were sampled. A response kept up to its EOS, or to `max_new_tokens`, has nothing to draw.

    Args:
        starts: tokens kept of each response, 0 to its length; the same response may be listed more than once.
        max_new_tokens: at most so many tokens a completion, those kept included.
        n, temperature, top_p, batch_size, seed: as in `sample_responses`.
        streamer: transformers' `TextStreamer` or `TextIteratorStreamer`, for a single response: gets the prompt with
            what is kept of the response, then each token as it is drawn.

    Returns:
        For each response its `n` continuations: whole responses, with the kept tokens and their log-probabilities, not
        verified, whose `sample` counts from 0.

    Raises:
        InputError: naming a bad argument, a start that is out of range, a kept token that the model does not know, or a
            streamer for more than one row.
    """
    _check_numbers(n, max_new_tokens, temperature, top_p, batch_size)
    _check_starts(unwrap(loaded.model), responses, starts, max_new_tokens)
    names, prompts = [r.question_id for r in responses], [r.prompt_ids for r in responses]
    _check_prompts(unwrap(loaded.model), names, prompts, max_new_tokens)
    plan = Plan(eos_ids(loaded), _pad_id(loaded), max_new_tokens, temperature, top_p)
    rows = [
        Row(i, k, list(r.prompt_ids), list(r.completion_ids[:start]), list(r.logprobs[:start]))
        for i, (r, start) in enumerate(zip(responses, starts, strict=True))
        for k in range(n)
    ]
    check_streamer(streamer, len(rows))
    _grow(unwrap(loaded.model), rows, plan, batch_size, seed, lambda _: None, streamer)
    grown = [_response(loaded, responses[row.question].question_id, row, plan) for row in rows]
    return [grown[i * n : (i + 1) * n] for i in range(len(responses))]


def tokenise_prompts(
    loaded: LoadedModel, questions: Sequence[Question], *, max_new_tokens: int, chat: bool = False
) -> list[list[int]]:
    """The prompts' token ids, as `sample_responses` will read them.

    Raises:
        InputError: for an empty prompt, or one that leaves no room for `max_new_tokens` in the model's context.
    """
    prompts = [_prompt_ids(loaded, question, chat) for question in questions]
    _check_prompts(unwrap(loaded.model), [question.id for question in questions], prompts, max_new_tokens)
    return prompts


def check_streamer(streamer: BaseStreamer | None, texts: int) -> None:
    """Raises `InputError` if several texts were to be written to one streamer."""
    if streamer is not None and texts != 1:
        raise InputError(f"streamer: it writes one text, and {texts} are to be drawn; give one prompt and n = 1")


def _grow(
    model: PreTrainedModel,
    rows: Sequence[Row],
    plan: Plan,
    batch_size: int,
    seed: int,
    on_ended: Callable[[list[Row]], None],
    streamer: BaseStreamer | None = None,
) -> None:
    """Draws the rows' tokens until all have ended; changes them, and calls with those that have ended as they do."""
    queue = sorted((row for row in rows if not plan.ended(row)), key=lambda row: len(row.prompt) + len(row.ids))
    with torch.random.fork_rng(_cuda_devices(model)), eval_mode(model):
        torch.manual_seed(seed)
        while queue:
            batch, queue = queue[:batch_size], queue[batch_size:]
            extend(model, batch, plan, streamer)
            queue += [row for row in batch if not plan.ended(row)]
            on_ended([row for row in batch if plan.ended(row)])


def _response(loaded: LoadedModel, question_id: str, row: Row, plan: Plan) -> Response:
    finish: Literal["eos", "length"] = "eos" if row.ids[-1] in plan.eos_ids else "length"
    text = loaded.tokenizer.decode(row.ids, skip_special_tokens=True)
    ids, logprobs = tuple(row.ids), tuple(row.logprobs)
    return Response(question_id, row.sample, tuple(row.prompt), ids, str(text), logprobs, finish)


def _prompt_ids(loaded: LoadedModel, question: Question, chat: bool) -> list[int]:
    if not chat:
        return list(loaded.tokenizer(question.prompt)["input_ids"])
    if loaded.tokenizer.chat_template is None:
        raise InputError(f"chat: the tokenizer of {loaded.name} has no chat template; sample without chat")
    turns = [{"role": "user", "content": question.prompt}]
    return list(loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def eos_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Every id that ends a response: the model's (chat models have several) and the tokenizer's.

    Raises:
        InputError: if there is none.
    """
    own = unwrap(loaded.model).generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    ids = tuple(sorted({i for i in [*listed, loaded.tokenizer.eos_token_id] if i is not None}))
    if not ids:
        raise InputError(f"tokenizer: that of {loaded.name} has no EOS token, so no response could end; set one")
    return ids


def _pad_id(loaded: LoadedModel) -> int:
    if loaded.tokenizer.pad_token_id is None:
        raise InputError(f"tokenizer: that of {loaded.name} has no pad token; load it with load_model, or set one")
    return int(loaded.tokenizer.pad_token_id)


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _check_numbers(n: int, max_new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: {value} is too small; it must be at least 1")
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"temperature: {temperature} is not allowed; it must be 0 (greedy) or a positive number")
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p: {top_p} is out of range; it must be above 0 and at most 1")
    if temperature == 0 and n != 1:
        raise InputError(f"n: {n} greedy responses to a question would all be the same; with temperature 0 n must be 1")


def _check_starts(
    model: PreTrainedModel, responses: Sequence[Response], starts: Sequence[int], max_new_tokens: int
) -> None:
    if len(responses) != len(starts):
        raise InputError(f"starts: {len(starts)} are given for {len(responses)} responses; give one each")
    limits = Limits.of(model)
    for response, start in zip(responses, starts, strict=True):
        most = min(len(response.completion_ids), max_new_tokens)
        if not 0 <= start <= most:
            where = f"a response to {response.question_id}"
            raise InputError(f"starts: {start} is out of range for {where}; allowed are 0 to {most}")
        wrong = limits.stray(response.completion_ids[:start]) if start else None
        if wrong is not None:
            raise InputError(f"responses: one to {response.question_id} {wrong}; continue responses of its own tokens")


def _check_prompts(
    model: PreTrainedModel, names: Sequence[str], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    context, vocabulary = context_length(model), vocabulary_size(model)
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise InputError(f"questions: the prompt of {name} has no tokens; it must have at least one")
        if context is not None and len(prompt) + max_new_tokens > context:
            longest = f"{len(prompt)} prompt tokens + {max_new_tokens} new ones"
            raise InputError(f"questions: {name} needs {longest}; the model reads at most {context}")
        if max(prompt) >= vocabulary:
            stray = f"token {max(prompt)} for {name}"
            raise InputError(f"tokenizer: it gave {stray}; the model knows 0 to {vocabulary - 1}; use the model's own")
