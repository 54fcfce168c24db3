"""Critical tokens by rollouts: on scripted chances, where every verdict is known, and on the bundled reasoner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mechreward.chains import Roller, Step, Tally, decompose, rollout_critical
from mechreward.chains.rollout_critical import first_lost
from mechreward.errors import InputError
from mechreward.rollout import Response
from mechreward.tiny.world import label_chain
from mechreward.verifiers import gsm8k_exact_match

STEPS = [Step("x", 0, 3, 0, 3), Step("x", 3, 7, 3, 7), Step("x", 7, 9, 7, 9)]
WRONG = Response("q", 0, (1,), tuple(range(9)), "x", (0.0,) * 9, "eos", correct=False)


class Scripted(Roller):
    """A roller whose n-th rollout from a start is right as its script says; counts what is drawn."""

    def __init__(self, rights: dict[int, list[int]]) -> None:
        object.__setattr__(self, "rights", rights)  # by start, the numbers of the rollouts that are right
        object.__setattr__(self, "drawn", {})

    def tally(self, _: object, starts: list[int], n: int, salt: int = 0) -> list[Tally]:
        for start in starts:
            assert self.drawn.get(start, 0) == salt
            self.drawn[start] = salt + n
        return [Tally(sum(salt <= k < salt + n for k in self.rights.get(start, [])), n) for start in starts]


def critical(rights: dict[int, list[int]], n: int = 20, reset: float = 0.1):
    roller = Scripted(rights)
    (lost,) = rollout_critical(roller, [WRONG], [STEPS], n=n, reset=reset)
    return lost, roller.drawn


def test_the_first_token_without_a_right_rollout() -> None:
    lost, drawn = critical({3: [0, 1, 2], 4: [0], 5: [19], 6: []})
    assert (lost.token, lost.step) == (5, 1)  # the prefix of 6 tokens ends with token 5
    assert [t.right for t in lost.step_ends] == [3, 0, 0]
    # The step's end is settled by the first round, 4 by the first too, 5 needs all; 7 and 9 have none right in all 20.
    assert drawn == {3: 8, 7: 20, 9: 20, 4: 8, 5: 20, 6: 20}


def test_a_lost_step_whose_last_token_lost_it() -> None:
    lost, drawn = critical({3: [0, 1, 2], 4: [0], 5: [0], 6: [0]})
    assert (lost.token, lost.step) == (6, 1)
    lost, _ = critical({})
    assert (lost.token, lost.step) == (0, 0)


def test_a_later_place_takes_back_what_was_found() -> None:
    assert critical({7: [0, 9, 19], 8: [1]})[0].step == 2  # 3 of 20 is more than a tenth
    assert critical({7: [0, 9]})[0].step == 0  # 2 of 20 is not
    assert critical({3: [0], 7: [0, 1]}, reset=0.05)[0].step == 2
    assert critical({9: [0, 1, 2]})[0] is None


def test_first_lost_by_hand() -> None:
    def first(*rights: int) -> int | None:
        return first_lost([Tally(right, 64) for right in rights], 3.0)

    assert [first(5, 0, 0), first(0, 3, 0), first(0, 4, 0), first(1, 2, 3), first(0, 4)] == [1, 0, 2, None, None]


def test_rollouts_find_the_first_wrong_step_of_the_bundled_reasoner(sampled) -> None:
    truth = {}  # the shortest response that goes wrong at each step where one does
    for response in sorted(sampled.responses, key=lambda r: len(r.completion_ids)):
        chain = label_chain(sampled.problem(response), response.text)
        if response.correct is False and chain.flips:
            truth.setdefault(chain.first_wrong_step, response)
    assert len(truth) >= 2
    wrong = list(truth.values())
    chains = [decompose(sampled.loaded.tokenizer, r.completion_ids) for r in wrong]
    roller = Roller(sampled.loaded, sampled.questions, gsm8k_exact_match, max_new_tokens=192, batch_size=128)
    lost = rollout_critical(roller, wrong, chains, n=16)
    assert [place and place.step for place in lost] == list(truth)
    for response, steps, place in zip(wrong, chains, lost, strict=True):
        # The coin falls at the operator: after it all rollouts are wrong, before it all 16 are now and then.
        words = [sampled.loaded.tokenizer.decode([token]).strip() for token in response.completion_ids]
        step = steps[place.step]
        assert place.token <= next(t for t in range(step.token_start, step.token_end) if words[t] in ("+", "-"))


def test_bad_input_is_one_sentence() -> None:
    right = replace(WRONG, correct=True)
    with pytest.raises(InputError, match="^responses: one to q has correct=True; give wrong, verified ones$"):
        rollout_critical(Scripted({}), [right], [STEPS])
    with pytest.raises(InputError, match="^responses: one to q has correct=None"):
        rollout_critical(Scripted({}), [replace(WRONG, correct=None)], [STEPS])
    with pytest.raises(InputError, match="^n: 0 is too small"):
        rollout_critical(Scripted({}), [WRONG], [STEPS], n=0)
    with pytest.raises(InputError, match="^reset: 1.0 is out of range"):
        rollout_critical(Scripted({}), [WRONG], [STEPS], reset=1.0)
