"""Token colours, alignment with the completion, and the choice of rollouts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechreward.report.rollouts import choose, colour_scale, make_gallery, make_tokens, outcome_word, token_colour


@pytest.mark.parametrize(
    ("reward", "colour"),
    [
        (2.0, "rgba(0,128,108,0.600)"),
        (1.0, "rgba(0,128,108,0.300)"),
        (0.5, "rgba(0,128,108,0.150)"),
        (-1.0, "rgba(190,24,110,0.300)"),
        (-7.0, "rgba(190,24,110,0.600)"),
        (0.0, ""),
        (float("nan"), ""),
    ],
)
def test_colour_is_proportional_to_the_reward(reward: float, colour: str) -> None:
    assert token_colour(reward, 2.0) == colour


def test_scale_is_the_99th_percentile_of_the_rewards_that_are_not_zero() -> None:
    values = np.arange(1, 201) / 100
    assert colour_scale([values, -values, np.zeros(1000), np.array([np.nan])]) == 1.99
    assert colour_scale([np.zeros(4)]) == 1.0
    assert colour_scale([]) == 1.0


def test_white_space_that_no_token_carries_comes_from_the_completion() -> None:
    tokens = make_tokens(["12", "+", "7", "</s>"], [0.5, -0.25, 0.0, float("nan")], "12 + \n7", 0.5)
    assert [(t.gap, t.text) for t in tokens] == [("", "12"), (" ", "+"), (" \n", "7"), ("", "</s>")]
    assert [t.title for t in tokens] == ["+0.5", "-0.25", "+0", "no reward"]


def test_tokens_that_carry_their_own_white_space_get_no_gap() -> None:
    tokens = make_tokens(["a", " b", " a", "\n"], [0.0] * 4, "a b a\n", 1.0)
    assert "".join(t.gap + t.text for t in tokens) == "a b a\n"


def test_a_token_found_only_later_in_the_text_takes_nothing_along() -> None:
    tokens = make_tokens(["�", "x"], [0.0, 0.0], "é x", 1.0)
    assert "".join(t.gap + t.text for t in tokens) == "�x"


def test_a_reward_missing_for_a_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_tokens(["a", "b"], [0.1], "ab", 1.0)


def _frame(arms: list[str], outcomes: list[float | None]) -> pd.DataFrame:
    rows = [
        {"arm": arm, "step": step, "question_id": f"q{step}", "prompt": "p", "completion": "a b", "tokens": ["a", "b"],
         "token_rewards": [0.5, -1.0], "outcome": outcome, "feature_reward": -0.25}
        for step, (arm, outcome) in enumerate(zip(arms, outcomes, strict=True))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_choice_balances_arms_and_outcomes_and_spreads_over_steps() -> None:
    frame = _frame(["a"] * 100 + ["b"] * 100, ([1.0] * 90 + [0.0] * 10) * 2)
    chosen = choose(frame, 12)
    assert chosen.groupby(["arm", "outcome"]).size().tolist() == [3, 3, 3, 3]
    assert chosen[(chosen.arm == "a") & (chosen.outcome == 1.0)].step.tolist() == [0, 44, 89]
    assert chosen.step.is_monotonic_increasing


def test_choice_gives_a_small_group_s_places_to_the_others() -> None:
    chosen = choose(_frame(["a"] * 20, [1.0] * 19 + [0.0]), 10)
    assert chosen.outcome.value_counts().to_dict() == {1.0: 9, 0.0: 1}
    assert len(choose(_frame(["a"] * 5, [1.0] * 5), 10)) == 5


def test_gallery_holds_answers_scale_and_outcomes() -> None:
    gallery = make_gallery(_frame(["a", "a", "a"], [1.0, 0.0, None]), {"q0": "44"})
    assert (gallery.scale, gallery.total) == (1.0, 3)
    assert [(r.outcome, r.answer) for r in gallery.rollouts] == [("right", "44"), ("wrong", None), ("unjudged", None)]
    assert [t.colour for t in gallery.rollouts[0].tokens] == ["rgba(0,128,108,0.300)", "rgba(190,24,110,0.600)"]


def test_long_completions_and_prompts_are_cut_and_say_so() -> None:
    frame = _frame(["a"], [1.0])
    frame.at[0, "tokens"], frame.at[0, "token_rewards"], frame.at[0, "prompt"] = ["x"] * 700, [0.1] * 700, "p" * 3000
    rollout = make_gallery(frame, {}).rollouts[0]
    assert (len(rollout.tokens), rollout.left_out, len(rollout.prompt)) == (600, 100, 2002)


def test_outcome_words() -> None:
    assert [outcome_word(value) for value in (1.0, 0.0, -1.0, None)] == ["right", "wrong", "wrong", "unjudged"]
