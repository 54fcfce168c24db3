"""The sparse reward: was the answer right?

Works with every trainer that calls `reward(prompts, completions, **columns)`. The gold answer comes from the dataset
column `answer`; verifiers of two arguments (the seed's form) are given prompt and completion only. What a verifier
raises is raised: a broken verifier must stop a run, not score it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from mechreward.errors import InputError
from mechreward.reward.batch import Text, check_lengths, is_async
from mechreward.verifiers import as_text


class OutcomeReward:
    """`true_reward` for a right completion, `false_reward` for a wrong one, None where it cannot be judged.

    Args:
        verifier: `(prompt, completion, answer) -> Verdict | bool | None`, or the same with two arguments.
        true_reward: reward of a right answer.
        false_reward: reward of a wrong answer.
        name: how trainers log it.

    Raises:
        InputError: if the verifier cannot be called, or is asynchronous, or a reward is not finite.
    """

    def __init__(
        self,
        verifier: Callable[..., Any],
        true_reward: float = 1.0,
        false_reward: float = 0.0,
        name: str = "outcome_reward",
    ) -> None:
        if not callable(verifier):
            raise InputError(f"verifier: {verifier!r} cannot be called; give a function (prompt, completion, answer)")
        if is_async(verifier):
            raise InputError(f"verifier: {verifier!r} is asynchronous, and would judge all answers right; it must wait")
        for field, value in (("true_reward", true_reward), ("false_reward", false_reward)):
            if not math.isfinite(value):
                raise InputError(f"{field}: {value} is not allowed; it must be a finite number")
        self.verifier = verifier
        self.true_reward = float(true_reward)
        self.false_reward = float(false_reward)
        self.name = self.__name__ = name
        self._takes_answer = _takes(verifier, 3)
        self._needs_answer = self._takes_answer and not _takes(verifier, 2)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any] | None = None, **_: Any
    ) -> list[float | None]:
        """One reward a completion; of chat completions the assistant's own messages are judged, as plain text.

        Raises:
            InputError: if the lengths of prompts, completions and answers differ, or the verifier needs the answers.
        """
        check_lengths(prompts, completions)
        if answer is None and self._needs_answer:
            raise InputError("answer: the verifier compares with it, and the dataset has no such column")
        if answer is None:
            return [self._score(p, c) for p, c in zip(prompts, completions, strict=True)]
        if len(answer) != len(prompts):
            raise InputError(f"answer: {len(answer)} for {len(prompts)} prompts; give one each")
        return [
            None if a is None else self._score(p, c, a) for p, c, a in zip(prompts, completions, answer, strict=True)
        ]

    def _score(self, prompt: Text, completion: Text, *answer: Any) -> float | None:
        arguments = answer if self._takes_answer else ()
        verdict = self.verifier(as_text(prompt), as_text(completion, roles=("assistant",)), *arguments)
        if verdict is None:
            return None
        return self.true_reward if verdict else self.false_reward


def _takes(verifier: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(verifier).bind(*range(arguments))
    except TypeError:
        return False
    return True
