"""Sampling G responses a question with transformers' `generate`, token ids and log-probabilities kept.

Choices:
- Log-probabilities are gathered while sampling, from the logits each token was drawn from (before temperature and
  top-p), so they cost no second forward and one step's [B, V] of memory, never [B, T, V].
- Rows are taken in the order of their length, so that a batch has little padding and ends at about one time. When half
  of a batch has ended and much is left, the other half goes back to the queue and joins rows like it, its tokens so far
  as part of the prompt: ended rows do not keep computing. What is drawn next depends only on the prefix, so the
  distribution stays the same.
- A static cache without compilation: a growing one copies itself at every step, which took most of the time on a CPU.
- The model's own generation defaults (top-k 50, repetition penalty, ...) are set aside: the policy itself is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from mechreward.errors import InputError
from mechreward.models import LoadedModel, context_length, eval_mode, unwrap, vocabulary_size
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
    model = unwrap(loaded.model)
    plan = Plan(_eos_ids(loaded), _pad_id(loaded), max_new_tokens, temperature, top_p)
    prompts = tokenise_prompts(loaded, questions, max_new_tokens=max_new_tokens, chat=chat)
    queue = [Row(q, sample, prompt) for q, prompt in enumerate(prompts) for sample in range(n)]
    queue.sort(key=lambda row: len(row.prompt))
    done: dict[tuple[int, int], Response] = {}
    with torch.random.fork_rng(_cuda_devices(model)), eval_mode(model):
        torch.manual_seed(seed)
        while queue:
            rows, queue = queue[:batch_size], queue[batch_size:]
            extend(model, rows, plan)
            ended = [row for row in rows if plan.ended(row)]
            queue += [row for row in rows if not plan.ended(row)]
            fresh = [_response(loaded, questions[row.question].id, row, plan) for row in ended]
            done.update({(row.question, row.sample): r for row, r in zip(ended, fresh, strict=True)})
            if on_batch is not None:
                on_batch(fresh)
    return [done[key] for key in sorted(done)]


def tokenise_prompts(
    loaded: LoadedModel, questions: Sequence[Question], *, max_new_tokens: int, chat: bool = False
) -> list[list[int]]:
    """The prompts' token ids, as `sample_responses` will read them.

    Raises:
        InputError: for an empty prompt, or one that leaves no room for `max_new_tokens` in the model's context.
    """
    prompts = [_prompt_ids(loaded, question, chat) for question in questions]
    _check_prompts(unwrap(loaded.model), questions, prompts, max_new_tokens)
    return prompts


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


def _eos_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Every id that ends a response: the model's (chat models have several) and the tokenizer's."""
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


def _check_prompts(
    model: PreTrainedModel, questions: Sequence[Question], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    context, vocabulary = context_length(model), vocabulary_size(model)
    for question, prompt in zip(questions, prompts, strict=True):
        if not prompt:
            raise InputError(f"questions: the prompt of {question.id} has no tokens; it must have at least one")
        if context is not None and len(prompt) + max_new_tokens > context:
            longest = f"{len(prompt)} prompt tokens + {max_new_tokens} new ones"
            raise InputError(f"questions: {question.id} needs {longest}; the model reads at most {context}")
        if max(prompt) >= vocabulary:
            stray = f"token {max(prompt)} for {question.id}"
            raise InputError(f"tokenizer: it gave {stray}; the model knows 0 to {vocabulary - 1}; use the model's own")
