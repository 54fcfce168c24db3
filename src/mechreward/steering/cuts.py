"""Where a wrong chain of thought is cut to be written anew: before its critical token, found in one of three ways.

`rollouts` is the ground truth for the policy and dear; `contrast` (cDPO's s_t) needs right and wrong responses to other
questions; `solution` compares with a worked solution and cuts before the first wrong step. See `chains`. A response
without text has no step, and so no critical token in any of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mechreward.chains import (
    ContrastiveConfig,
    Roller,
    contrastive_pair,
    decompose,
    first_below,
    first_wrong,
    label_by_solution,
    rollout_critical,
)
from mechreward.errors import InputError
from mechreward.rollout import Response
from mechreward.tasks import Question

Critical = Literal["rollouts", "contrast", "solution"]
THRESHOLD = 0.1
"""s_t below it marks a critical token."""


@dataclass(frozen=True)
class Cut:
    """The first `token` tokens are kept."""

    token: int
    scores: tuple[float, ...] = ()
    """s_t of every token, where the way of finding it gives them."""


def find_cuts(
    roller: Roller,
    wrong: Sequence[Response],
    critical: str,
    *,
    others: Sequence[Response] = (),
    rollouts: int = 16,
    contrastive: ContrastiveConfig | None = None,
) -> list[Cut | None]:
    """The cut of each wrong response; None where no critical token is found, as in one without text.

    Args:
        critical: `rollouts`, `contrast` or `solution`.
        others: verified responses to other questions, for `contrast`.
        rollouts: rollouts a place, for `rollouts`.

    Raises:
        InputError: for an unknown way, or a question without a solution; as `chains` says of each way.
    """
    check_critical(critical)
    told = [response for response in wrong if response.text.strip()]
    if not told:
        return [None] * len(wrong)
    if critical == "solution":
        found = [_by_solution(roller, response) for response in told]
    elif critical == "contrast":
        with contrastive_pair(roller.loaded, others, contrastive) as pair:
            scores = pair.scores(told)
        places = [first_below(row, THRESHOLD) for row in scores]
        found = [None if t is None else Cut(t, tuple(row)) for t, row in zip(places, scores, strict=True)]
    else:
        chains = [decompose(roller.loaded.tokenizer, response.completion_ids) for response in told]
        lost = rollout_critical(roller, told, chains, n=rollouts)
        found = [None if one is None else Cut(one.token) for one in lost]
    cuts = iter(found)
    return [next(cuts) if response.text.strip() else None for response in wrong]


def check_critical(critical: str, questions: Sequence[Question] = ()) -> None:
    """Raises:
    InputError: for an unknown way to find the critical token, or `solution` for a question without a worked one.
    """
    if critical not in get_args(Critical):
        raise InputError(f"critical: {critical!r} is not known; use one of {', '.join(get_args(Critical))}")
    bare = next((question.id for question in questions if question.solution is None), None)
    if critical == "solution" and bare is not None:
        raise InputError(
            f"critical: solution needs worked solutions, and question {bare} has none; use rollouts or contrast"
        )


def _by_solution(roller: Roller, response: Response) -> Cut | None:
    question = next(q for q in roller.questions if q.id == response.question_id)
    check_critical("solution", [question])
    assert question.solution is not None
    steps = decompose(roller.loaded.tokenizer, response.completion_ids)
    step = first_wrong(label_by_solution([one.text for one in steps], question.solution))
    return None if step is None else Cut(steps[step].token_start)
