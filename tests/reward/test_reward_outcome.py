"""OutcomeReward: both verifier forms, the answer column, chats, and errors that are not swallowed."""

from __future__ import annotations

import pytest

from mechreward.errors import InputError
from mechreward.reward import OutcomeReward
from mechreward.verifiers import gsm8k_exact_match


def test_answer_column_is_read_row_by_row() -> None:
    reward = OutcomeReward(verifier=gsm8k_exact_match)
    completions = ["so 3\n#### 3", "#### 4", "#### 3"]
    assert reward(["q", "q", "q"], completions, answer=["3", "3", "4"]) == [1.0, 0.0, 0.0]


def test_two_argument_verifier_with_and_without_answer_column() -> None:
    reward = OutcomeReward(lambda prompt, completion: prompt in completion, true_reward=2.0, false_reward=-1.0)
    assert reward(["a", "b"], ["xax", "xax"]) == [2.0, -1.0]
    assert reward(["a", "b"], ["xax", "xax"], answer=["z", "z"]) == [2.0, -1.0]


def test_library_verifier_in_the_two_argument_form_reads_gold_from_the_prompt() -> None:
    reward = OutcomeReward(gsm8k_exact_match)
    assert reward(["2+2? #### 4", "2+2? #### 5"], ["#### 4", "#### 4"]) == [1.0, 0.0]


def test_chat_completions_are_judged_by_the_assistants_words() -> None:
    seen = []
    reward = OutcomeReward(lambda prompt, completion, answer: seen.append((prompt, completion, answer)) or True)
    chat = [
        {"role": "assistant", "content": "one"},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": "2"},
    ]
    assert reward([[{"role": "user", "content": "q"}]], [chat], answer=[7]) == [1.0]
    assert seen == [("q", "one\n2", 7)]


def test_a_verifier_that_needs_answers_says_which_column() -> None:
    reward = OutcomeReward(lambda _prompt, completion, answer: completion == answer)
    with pytest.raises(InputError, match="answer: the verifier compares with it, and the dataset has no such column"):
        reward(["p"], ["c"])


def test_what_cannot_be_judged_is_none() -> None:
    reward = OutcomeReward(lambda _p, c, _a: None if c == "?" else c == "y")
    assert reward(["p"] * 4, ["y", "n", "?", "y"], answer=["a", "a", "a", None]) == [1.0, 0.0, None, None]


def test_a_broken_verifier_stops_the_run() -> None:
    def broken(_prompt: str, _completion: str, _answer: str) -> bool:
        raise ZeroDivisionError("verifier")

    with pytest.raises(ZeroDivisionError, match="verifier"):
        OutcomeReward(broken)(["p"], ["c"], answer=["a"])


def test_lengths_must_match() -> None:
    reward = OutcomeReward(lambda _p, _c: True)
    with pytest.raises(InputError, match="completions: 1 for 2 prompts"):
        reward(["p", "p"], ["c"])
    with pytest.raises(InputError, match="answer: 3 for 2 prompts"):
        reward(["p", "p"], ["c", "c"], answer=["1", "2", "3"])


def test_name_is_what_trl_logs() -> None:
    assert OutcomeReward(gsm8k_exact_match, name="right").__name__ == "right"


def test_an_asynchronous_verifier_is_refused() -> None:
    async def judge(_prompt: str, _completion: str) -> bool:
        return False

    with pytest.raises(InputError, match="is asynchronous, and would judge all answers right"):
        OutcomeReward(judge)


@pytest.mark.parametrize("field", ["true_reward", "false_reward"])
def test_rewards_are_finite(field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: nan is not allowed; it must be a finite number"):
        OutcomeReward(lambda *_: True, **{field: float("nan")})
