"""Labels of steps: rollouts against draws of our own, solutions against the world's truth."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from decimal import Decimal

import pytest

from mechreward.chains import Roller, Tally, decompose, first_wrong, label_by_rollouts, label_by_solution
from mechreward.chains.labels import equations
from mechreward.errors import InputError
from mechreward.rollout import continue_responses, verify_responses
from mechreward.tiny.world import label_chain, make_problem, write_chain
from mechreward.verifiers import gsm8k_exact_match


def test_soft_and_hard_labels_and_wilsons_interval() -> None:
    tally = Tally(2, 8)
    assert (tally.hard, tally.soft, Tally(1, 8).hard, Tally(0, 8).hard) == (True, 0.25, True, False)
    # Wilson's formula by hand.
    z, n, p = 1.959964, 8, 0.25
    centre, half = (
        (p + z * z / 16) / (1 + z * z / 8),
        z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n),
    )
    assert tally.interval() == pytest.approx((centre - half, centre + half), abs=1e-5)
    wide, narrow = tally.interval(0.99), tally.interval(0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def roller_of(world, seed: int = 0) -> Roller:
    return Roller(world.loaded, world.questions, gsm8k_exact_match, max_new_tokens=64, seed=seed)


def test_labels_are_shares_of_right_continuations(easy) -> None:
    responses = easy.responses[1:3]
    chains = [decompose(easy.loaded.tokenizer, r.completion_ids) for r in responses]
    labels = label_by_rollouts(roller_of(easy, seed=5), responses, chains, n=3)
    places = [(i, step.token_end) for i, steps in enumerate(chains) for step in steps]
    rows, ends = [responses[i] for i, _ in places], [end for _, end in places]
    groups = continue_responses(easy.loaded, rows, ends, n=3, max_new_tokens=64, seed=5)
    judged = [verify_responses(group, easy.questions, gsm8k_exact_match) for group in groups]
    assert [tally for row in labels for tally in row] == [Tally(sum(r.correct for r in group), 3) for group in judged]
    assert [len(row) for row in labels] == [len(steps) for steps in chains]
    for response, row in zip(responses, labels, strict=True):
        # The one coin is thrown in the first step: all is settled after it.
        assert [tally.right for tally in row] == [3 * response.correct] * len(row)


def test_before_the_coin_some_rollouts_are_right_and_the_salt_decides_which(easy) -> None:
    rows = [easy.responses[0]] * 6
    one, other = (roller_of(easy).tally(rows, [0] * 6, 4, salt=salt) for salt in (0, 1))
    assert one == roller_of(easy).tally(rows, [0] * 6, 4) and one != other
    assert 3 <= sum(tally.right for tally in one + other) <= 45
    assert all(tally.total == 4 for tally in one)


def test_a_right_and_a_wrong_chain_against_a_solution() -> None:
    solution = "20 + 5 = 25. Then 25 - 2 = 23.\nThe answer is 23."
    assert label_by_solution(["5 + 20 = 25.", "Good.", "25 - 2 = $23.", "So 23."], solution) == [True, None, True, True]
    labels = label_by_solution(["20 - 5 = 15.", "15 - 2 = 13.", "So 13."], solution)
    assert labels == [False, False, False] and first_wrong(labels) == 0
    # In order: what was passed does not count again, and a value has to come from the same numbers.
    assert label_by_solution(["25 - 2 = 23", "20 + 5 = 25"], solution) == [True, False]
    assert label_by_solution(["22 + 3 = 25"], solution) == [False]
    assert label_by_solution(["it is 25"], solution) == [True]
    assert label_by_solution(["20 + 5 = 25 and 25 - 2 = 24"], solution) == [False]
    assert label_by_solution(["x = 25"], "It is 25.") == [True]
    assert label_by_solution(["20 + 5 = 25", "20 + 5 = 26"], "It is 25. Then 27") == [True, False]
    assert label_by_solution(["30 - 7 = 23"], solution) == [False]  # though the solution ends on the bare 23
    assert first_wrong([True, None, True]) is None and first_wrong([None, False, False]) == 1


def test_equations_are_read_as_written() -> None:
    found = equations("1,200 + 2.5 = 1,202.5, so 3 * 3 = $9; x = -4")
    values = [(sorted(map(str, dict(e.numbers))), e.value) for e in found]
    assert values == [(["1200", "2.5"], Decimal("1202.5")), (["3"], Decimal(9)), ([], Decimal(-4))]
    assert dict(found[1].numbers) == {Decimal(3): 2}
    assert [e.value for e in equations("from 3 to 7 apples")] == [7]
    assert equations("none") == []
    for written in ("3 - 8 = −5", "3 - 8 = -$5", "3 - 8 = $-5", "3 - 8 = \\$-5.", "3 − 8 = - 5"):
        assert equations(written) == equations("3 - 8 = -5")
    assert equations(".5 * 1 = .5") == equations("0.5 * 1 = 0.5")


def test_a_typographic_minus_is_no_mistake() -> None:
    assert label_by_solution(["3 - 8 = −5."], "3 - 8 = -5") == [True]


def test_a_long_line_without_an_equation_takes_no_long_time() -> None:
    started = time.process_time()
    assert equations("the " * 20_000) == []
    assert [e.value for e in equations("2 = 2 " + "1 " * 20_000)] == [2]
    assert time.process_time() - started < 2  # a minute where every character begins a search of its own


def test_the_first_wrong_step_is_the_worlds() -> None:
    rng = random.Random(3)
    hits = 0
    for _ in range(200):
        problem = make_problem("long", rng)
        text = write_chain(problem, tuple(rng.random() < 0.5 for _ in problem.days))
        steps = [part.strip() for part in text.replace(" . ", " .|").split("|")]
        found = first_wrong(label_by_solution(steps, write_chain(problem, (False,) * 3)))
        hits += found == label_chain(problem, text).first_wrong_step
    assert hits >= 198


def test_bad_input_is_one_sentence(easy) -> None:
    roller = roller_of(easy)
    response = easy.responses[0]
    steps = decompose(easy.loaded.tokenizer, response.completion_ids)
    with pytest.raises(InputError, match="^chains: 0 are given for 1 responses; give one each$"):
        label_by_rollouts(roller, [response], [])
    with pytest.raises(InputError, match="^chains: that of a response to q0 has no steps; decompose it first$"):
        label_by_rollouts(roller, [response], [[]])
    shorter = replace(response, completion_ids=response.completion_ids[:-1])
    with pytest.raises(InputError, match=r"^chains: one for q0 has \d+ tokens, its response \d+; decompose that very"):
        label_by_rollouts(roller, [shorter], [steps])
    with pytest.raises(InputError, match="^steps: the chain has none; decompose the response first$"):
        label_by_solution([], "1")
    with pytest.raises(InputError, match="^solution: 'no number' has no number to compare with"):
        label_by_solution(["1"], "no number")
