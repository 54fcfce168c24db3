"""OpenRLHF's own executor with ours on top; run where OpenRLHF is installed (CONTRIBUTING.md), skipped elsewhere."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace

import pytest

pytest.importorskip("openrlhf")

import mechreward.integrations.openrlhf as ours
from mechreward.errors import InputError
from mechreward.integrations.protocol import Row
from mechreward.integrations.scorer import Scorer
from mechreward.integrations.server import create_app
from mechreward.reward import FeatureReward
from mechreward.verifiers import gsm8k_exact_match


class Engine:
    """In the place of vLLM."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    async def generate(self, *_: object, **__: object) -> SimpleNamespace:
        output = SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def executed(tokenizer, ids: list[int], label: str) -> dict:
    # As OpenRLHF loads it: the file, by its path.
    spec = importlib.util.spec_from_file_location("agent", ours.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    executor, sampling = module.AgentExecutor(), SimpleNamespace(max_tokens=32, logprobs=None)
    return asyncio.run(executor.execute("2+2=", label, sampling, 64, tokenizer, Engine(ids)))


@pytest.mark.parametrize("label,outcome", [("4", 1.0), ("5", 0.0)])
def test_the_ids_are_scored(label, outcome, sae_of_layer, tiny_llama, char_tokenizer, serve, monkeypatch) -> None:
    reward = FeatureReward({3: 1.0, 7: -0.5}, sae_of_layer(1))
    scorer = Scorer(reward, tiny_llama, char_tokenizer, verifier=gsm8k_exact_match)
    monkeypatch.setenv("MECHREWARD_URL", serve(create_app(scorer)))
    ids = [*char_tokenizer("#### 4", add_special_tokens=False)["input_ids"], 1]
    found = executed(char_tokenizer, ids, label)
    prompt_ids = char_tokenizer("2+2=", add_special_tokens=False)["input_ids"]
    assert found["observation_tokens"] == [*prompt_ids, *ids]
    row = Row(prompt_ids=prompt_ids, completion_ids=ids, prompt="2+2=", answer=label)
    [score] = scorer.score(scorer.read([row]))
    assert score.outcome == outcome == found["scores"]
    assert found["reward"] == pytest.approx(score.score, abs=1e-5) and found["reward"] != outcome
    assert found["extra_logs"] == {"outcome": outcome, "mechreward": pytest.approx(score.features, abs=1e-5)}


def test_a_reward_that_fails_is_an_error_and_not_a_line_in_a_log(
    sae_of_layer, tiny_llama, char_tokenizer, serve, monkeypatch
) -> None:
    scorer = Scorer(FeatureReward({3: 1.0}, sae_of_layer(1)), tiny_llama, char_tokenizer)
    monkeypatch.setenv("MECHREWARD_URL", serve(create_app(scorer)))
    with pytest.raises(InputError, match="answered 422"):
        executed(char_tokenizer, [99], "4")
    with pytest.raises(InputError, match="^score: a completion of 0 tokens"):
        executed(char_tokenizer, [], "4")
