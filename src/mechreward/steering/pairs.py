"""A right response to a question, and where there is one the wrong response it should win against: what is trained on.

`check_known` keeps UNKNOWN out: a pair has to be of a KNOWN question by its id, and must not have the prompt of an
UNKNOWN one. Whatever trains on pairs calls it first.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import Response, tokenise_prompts
from mechreward.tasks import QuestionSplit


@dataclass(frozen=True)
class Pair:
    """Token ids as they were sampled; EOS included where there was one."""

    question_id: str
    prompt_ids: tuple[int, ...]
    right_ids: tuple[int, ...]
    wrong_ids: tuple[int, ...] = ()
    """Empty where there is none: enough for SFT."""
    wrong_scores: tuple[float, ...] = ()
    """s_t of each token of `wrong_ids`, in [0, 1], low for critical ones (`chains.ContrastivePair.scores`)."""


def rejection_pairs(responses: Sequence[Response], n: int, seed: int = 0) -> list[Pair]:
    """`n` right responses as they were sampled, the rest rejected: what repairs have to do better than.

    Questions take turns, in a seeded order, so that easy ones do not crowd out the others; no response comes twice.

    Raises:
        InputError: if there are fewer than `n` right responses.
    """
    rng = random.Random(seed)
    by_question: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        if response.correct:
            by_question[response.question_id].append(response)
    n_right = sum(map(len, by_question.values()))
    if not 1 <= n <= n_right:
        raise InputError(f"n: {n} right responses are wanted; allowed are 1 to the {n_right} there are")
    order = rng.sample(sorted(by_question), len(by_question))
    queues = [rng.sample(by_question[name], len(by_question[name])) for name in order]
    longest = max(map(len, queues))
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return [Pair(r.question_id, r.prompt_ids, r.completion_ids) for r in turns[:n]]


def check_known(pairs: Sequence[Pair], split: QuestionSplit, loaded: LoadedModel, *, chat: bool = False) -> None:
    """Raises:
    InputError: naming the first pair that is not of a KNOWN question, or whose prompt is that of an UNKNOWN one.
    """
    known, unknown = {q.id for q in split.known}, {q.id for q in split.unknown}
    for pair in pairs:
        if pair.question_id in unknown or pair.question_id not in known:
            side = "UNKNOWN" if pair.question_id in unknown else "on neither side"
            raise InputError(f"pairs: question {pair.question_id} is {side}; only KNOWN questions may be trained on")
    prompts = tokenise_prompts(loaded, split.unknown, max_new_tokens=1, chat=chat)
    kept_out = {tuple(ids): question.id for ids, question in zip(prompts, split.unknown, strict=True)}
    for pair in pairs:
        if pair.prompt_ids in kept_out:
            raise InputError(
                f"pairs: that of {pair.question_id} has the prompt of UNKNOWN question {kept_out[pair.prompt_ids]}; "
                "only KNOWN questions may be trained on"
            )
