"""HERO's strata: the formula's numbers, groups, and what no dense score may do (properties)."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.reward import CompositeReward, OutcomeReward
from mechreward.reward.strata import EPS, prompt_groups, stratified

OUTCOME = OutcomeReward(lambda _p, completion: {"right": True, "wrong": False}.get(completion))


def given_scores(scores: list[float | None]):
    def dense(prompts, completions, **_):  # noqa: ARG001
        return scores

    return dense


def composite(scores: list[float | None], **options) -> CompositeReward:
    return CompositeReward([given_scores(scores), OUTCOME], mode="stratified", **options)


def test_the_papers_formula_by_hand() -> None:
    # Wrong: d = 1, 3, 2 -> u = 0, 1, .5. Right: d = -4, 6 -> 0, 1. alpha = beta = .05.
    completions = ["wrong", "right", "wrong", "right", "wrong"]
    values = composite([1.0, -4.0, 3.0, 6.0, 2.0])(["p"] * 5, completions)
    u_wrong, u_right = 2 / (2 + 1e-6), 10 / (10 + 1e-6)
    assert values == pytest.approx(
        [-0.05, 0.95, -0.05 + 0.1 * u_wrong, 0.95 + 0.1 * u_right, -0.05 + 0.1 * u_wrong / 2], abs=1e-12
    )
    assert EPS == 1e-6


def test_bounds_and_weights_by_hand() -> None:
    scores, completions = [0.0, 1.0, 0.0, 1.0], ["wrong", "wrong", "right", "right"]
    values = composite(scores, alpha=0.2, beta=0.5)(["p"] * 4, completions)
    assert values == pytest.approx([-0.2, 0.2, 0.5, 1.5], abs=1e-5)
    # Weight 2 on outcomes of -1 and 3: -2 and 6, a gap of 8; a weight of -1 turns the dense order round.
    outcome = OutcomeReward(lambda _p, c: c == "right", true_reward=3.0, false_reward=-1.0)
    turned = CompositeReward([outcome, given_scores(scores)], weights=[2.0, -1.0], mode="stratified", alpha=0.1)
    assert turned(["p"] * 4, completions) == pytest.approx([-1.2, -2.8, 6.4, 5.6], abs=1e-5)


def test_a_stratum_of_one_is_at_its_lower_end() -> None:
    assert composite([7.0, -3.0])(["p", "p"], ["right", "wrong"]) == pytest.approx([0.95, -0.05])
    alone = CompositeReward([OUTCOME], mode="stratified")  # no dense part at all
    assert alone(["p", "p"], ["right", "wrong"]) == pytest.approx([0.95, -0.05])


def test_prompts_are_bounded_apart() -> None:
    scores = [0.0, 1.0, 100.0, 300.0]
    values = composite(scores)(["a", "a", "b", "b"], ["right"] * 4)
    assert values == pytest.approx([0.95, 1.05, 0.95, 1.05], abs=1e-6)
    joined = composite(scores)(["a"] * 4, ["right"] * 4)
    assert joined == pytest.approx([0.95, 0.95 + 0.1 / 300, 0.95 + 10 / 300, 1.05], abs=1e-6)
    # The same prompt twice in a row: only num_generations tells the groups apart.
    assert composite(scores, num_generations=2)(["a"] * 4, ["right"] * 4) == values


def test_none_stays_none_and_has_no_say() -> None:
    scores = [1.0, None, 500.0, math.nan, 3.0]
    values = composite(scores)(["p"] * 5, ["right", "right", "unjudged", "right", "right"])
    assert values[1:4] == [None, None, None]
    assert [values[0], values[4]] == pytest.approx([0.95, 1.05], abs=1e-6)


def test_groups() -> None:
    chat = [{"role": "user", "content": "q"}]
    assert list(prompt_groups(["a", "a", "b", "a"])) == [range(0, 2), range(2, 3), range(3, 4)]
    assert list(prompt_groups([chat, list(chat), "q"])) == [range(0, 2), range(2, 3)]
    assert list(prompt_groups(["a"] * 4, 2)) == [range(0, 2), range(2, 4)]
    assert list(prompt_groups([])) == list(prompt_groups([], 3)) == []


scores_of_a_group = st.lists(
    st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.booleans()), min_size=2, max_size=8
)


@settings(max_examples=200)
@given(scores_of_a_group, st.floats(0.001, 0.5), st.floats(0.001, 0.499), st.floats(-10, 10), st.floats(0.01, 10))
def test_wrong_never_outranks_right_and_order_follows_the_score(
    rows: list[tuple[float, bool]], alpha: float, beta: float, low: float, gap: float
) -> None:
    levels = (low, low + gap)
    outcomes = [levels[right] for _, right in rows]
    rewards = stratified(outcomes, [score for score, _ in rows], ["p"] * len(rows), levels, (alpha, beta))
    assert None not in rewards
    for (one, reward_one), (other, reward_other) in itertools.permutations(zip(rows, rewards, strict=True), 2):
        if one[1] and not other[1]:
            assert reward_one > reward_other
        if one[1] == other[1] and one[0] < other[0]:
            assert reward_one <= reward_other
    for (_, right), reward in zip(rows, rewards, strict=True):
        assert abs(reward - levels[right]) <= (beta if right else alpha) * gap * (1 + 1e-9) + 1e-12


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8, unique=True))
def test_different_scores_get_different_rewards(scores: list[int]) -> None:
    rewards = stratified([1.0] * len(scores), [float(s) for s in scores], ["p"] * len(scores), (0.0, 1.0), (0.05, 0.05))
    assert len(set(rewards)) == len(scores)
    assert min(rewards) == 0.95 and max(rewards) == pytest.approx(1.05, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: composite([1.0], alpha=0.5, beta=0.5), "alpha, beta: 0.5, 0.5 must be more than 0 and less than 1 in"),
        (lambda: composite([1.0], alpha=0.0), "alpha, beta: 0.0, 0.05 must be"),
        (lambda: composite([1.0], num_generations=0), "num_generations: 0 is not allowed"),
        (
            lambda: composite([1.0] * 3, num_generations=2)(["p"] * 3, ["right"] * 3),
            "num_generations: 3 rows are not whole groups of 2",
        ),
        (
            lambda: composite([1.0] * 4, num_generations=2)(["p", "p", "p", "q"], ["right"] * 4),
            "num_generations: rows 2 to 3 hold different prompts",
        ),
        (
            lambda: composite([1.0, math.inf])(["p"] * 2, ["right"] * 2),
            "rewards: the dense score of row 1 is infinite; mode 'stratified' needs finite ones",
        ),
        (
            lambda: CompositeReward([given_scores([1.0])], mode="stratified"),
            "mode 'stratified' needs exactly one OutcomeReward, there are 0",
        ),
        (
            lambda: CompositeReward([OUTCOME], weights=[-1.0], mode="stratified"),
            "weights: right is worth -1.0 more than wrong; mode 'stratified' needs more than 0",
        ),
        (
            lambda: composite([1.0])(["p", "p"], ["right"] * 2),
            "dense: returned 1 rewards for 2 completions",
        ),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
