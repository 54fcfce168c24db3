"""The reward server over HTTP, against the reward read here by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.integrations.protocol import Row, tokenizer_hash
from mechreward.integrations.scorer import Scorer
from mechreward.integrations.server import create_app
from mechreward.reward import FeatureReward
from mechreward.sae import SAE
from mechreward.verifiers import gsm8k_exact_match

PROMPT, COMPLETION = [3, 9, 27], [5, 11, 40, 22, 8]


@pytest.fixture
def reward(sae_of_layer: Callable[..., SAE]) -> FeatureReward:
    return FeatureReward({3: 1.0, 7: -0.5, 11: 0.25}, sae_of_layer(1), aggregation="mean")


@pytest.fixture
def scorer(reward: FeatureReward, tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> Scorer:
    return Scorer(reward, tiny_llama, char_tokenizer, batch_size=4)


@pytest.fixture
def client(scorer: Scorer) -> Iterator[TestClient]:
    with TestClient(create_app(scorer, max_rows=8, max_bytes=4096)) as client:
        yield client


def by_hand(reward: FeatureReward, model: PreTrainedModel, prompt: list[int], completion: list[int]) -> list[float]:
    """Token rewards by transformers' own hidden states and the whole encoding."""
    with torch.no_grad():
        h_SD = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[2][0]
    acts_TF = reward.sae.encode(h_SD[len(prompt) :])
    return (acts_TF[:, 3] - 0.5 * acts_TF[:, 7] + 0.25 * acts_TF[:, 11]).tolist()


def test_token_rewards_are_the_models_own(client, reward, tiny_llama) -> None:
    longer = [*COMPLETION, 33, 12]
    rows = [
        {"prompt_ids": PROMPT, "completion_ids": COMPLETION},
        {"prompt_ids": PROMPT, "completion_ids": longer},
    ]
    reply = client.post("/v1/score", json={"rows": rows})
    assert reply.status_code == 200
    for score, completion in zip(reply.json()["scores"], (COMPLETION, longer), strict=True):
        tokens = by_hand(reward, tiny_llama, PROMPT, completion)
        assert any(abs(value) > 1e-3 for value in tokens)
        assert score["token_rewards"] == pytest.approx(tokens, abs=1e-5)
        assert score["features"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)
        assert score["score"] == score["features"] and score["outcome"] is None
    assert reply.json()["spec_hash"] == reward.spec_hash


def test_nothing_to_read_is_null_and_not_zero(client) -> None:
    rows = [{"prompt_ids": PROMPT, "completion_ids": []}, {"prompt_ids": PROMPT, "completion_ids": COMPLETION}]
    empty, full = client.post("/v1/score", json={"rows": rows}).json()["scores"]
    assert empty == {"score": None, "outcome": None, "features": None, "token_rewards": []}
    assert full["score"] is not None


def test_text_is_tokenised_as_the_trainer_would(client, char_tokenizer) -> None:
    prompt, completion = "2+2=", "4 ok"
    ids = [char_tokenizer(prompt)["input_ids"], char_tokenizer(completion, add_special_tokens=False)["input_ids"]]
    rows = [{"prompt": prompt, "completion": completion}, {"prompt_ids": ids[0], "completion_ids": ids[1]}]
    by_text, by_ids = client.post("/v1/score", json={"rows": rows}).json()["scores"]
    assert by_text == by_ids and len(by_text["token_rewards"]) == len(ids[1])


@pytest.mark.parametrize("mode", ["bounded", "sum"])
def test_outcome_and_features_are_combined_as_said(mode, reward, tiny_llama, char_tokenizer) -> None:
    scorer = Scorer(reward, tiny_llama, char_tokenizer, verifier=gsm8k_exact_match, mode=mode, weight=3.0)
    rows = [Row(prompt="2+2=", completion=f"#### {end}", answer="4") for end in ("4", "5")]
    right, wrong = scorer.score(scorer.read(rows))
    assert (right.outcome, wrong.outcome) == (1.0, 0.0)
    for found in (right, wrong):
        dense = 3.0 * found.features
        added = dense if mode == "sum" else 0.98 * 0.5 * dense / (0.5 + abs(dense))
        assert found.score == pytest.approx(found.outcome + added, abs=1e-9)
    assert math.isclose(right.features, wrong.features) is False


def test_ids_beside_a_prompt_show_it_to_the_verifier(reward, tiny_llama, char_tokenizer) -> None:
    seen = []

    def verifier(prompt, completion, answer):
        seen.append((prompt, completion, answer))
        return gsm8k_exact_match(prompt, completion, answer)

    ids = char_tokenizer("#### 7", add_special_tokens=False)["input_ids"]
    scorer = Scorer(reward, tiny_llama, char_tokenizer, verifier=verifier)
    row = Row(prompt_ids=PROMPT, completion_ids=[*ids, char_tokenizer.eos_token_id], prompt="shown", answer=7)
    [score] = scorer.score(scorer.read([row]))
    assert seen == [("shown", "#### 7", 7)] and score.outcome == 1.0
    assert len(score.token_rewards) == len(ids) + 1


REFUSED = {
    "unknown field": ({"rows": [{"prompt_ids": [3], "completion_ids": [4], "gold": 1}]}, "rows.0.gold: "),
    "no rows": ({"rows": []}, "rows: [] is not allowed"),
    "half the ids": ({"rows": [{"prompt_ids": [3], "prompt": "a", "completion": "b"}]}, "rows.0: prompt_ids and"),
    "neither": ({"rows": [{"prompt": "a"}]}, "rows.0: prompt_ids: give the ids"),
    "text beside ids": (
        {"rows": [{"prompt_ids": [3], "completion_ids": [4], "completion": "b"}]},
        "rows.0: completion",
    ),
    "not ids": ({"rows": [{"prompt_ids": [3], "completion_ids": [True]}]}, "rows.0.completion_ids.0: True is not"),
    "negative": ({"rows": [{"prompt_ids": [3], "completion_ids": [-1]}]}, "rows.0.completion_ids.0: -1 is not"),
    "unknown token": ({"rows": [{"prompt_ids": [3], "completion_ids": [64]}]}, "completion_ids: row 0 holds token 64"),
    "too long": ({"rows": [{"prompt_ids": [3], "completion_ids": [4] * 600}]}, "completion_ids: row 0 has 601 tokens"),
    "too many": ({"rows": [{"prompt_ids": [3], "completion_ids": [4]}] * 9}, "rows: 9 are too many; a request may"),
    "image": (
        {"rows": [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "b"}]},
        "prompts: a feature reward reads text only",
    ),
}


@pytest.mark.parametrize("body,said", REFUSED.values(), ids=REFUSED)
def test_a_row_that_cannot_be_scored_is_refused_in_one_sentence(client, body, said) -> None:
    reply = client.post("/v1/score", json=body)
    assert reply.status_code == 422 and set(reply.json()) == {"error"}
    assert reply.json()["error"].startswith(said), reply.json()["error"]


def test_bodies_are_bounded_before_they_are_read(client) -> None:
    reply = client.post("/v1/score", content=b"[" * 5000)
    assert reply.status_code == 413 and reply.json()["error"].startswith("Content-Length: 5000 bytes are too many")
    reply = client.post("/v1/score", content=iter([b"{}"]))
    assert reply.status_code == 411
    reply = client.post("/v1/score", content=b"{", headers={"Content-Type": "application/json"})
    assert reply.status_code == 422 and "JSON" in reply.json()["error"]


def test_without_the_secret_nothing_is_told(scorer) -> None:
    body = {"rows": [{"prompt_ids": PROMPT, "completion_ids": COMPLETION}]}
    with TestClient(create_app(scorer, token="hush")) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer hus"}, {"Authorization": "hush"}):
            for method, path in (
                ("POST", "/v1/score"),
                ("GET", "/v1/spec"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
            ):
                assert client.request(method, path, json=body, headers=headers).status_code == 401
        assert client.post("/v1/score", json=body, headers={"Authorization": "Bearer hush"}).status_code == 200


def test_another_reward_or_tokenizer_than_is_meant_is_refused(client, reward, char_tokenizer) -> None:
    rows = [{"prompt_ids": PROMPT, "completion_ids": COMPLETION}]
    meant = {"spec_hash": reward.spec_hash, "tokenizer_hash": tokenizer_hash(char_tokenizer)}
    assert client.post("/v1/score", json={"rows": rows, **meant}).status_code == 200
    for name in meant:
        reply = client.post("/v1/score", json={"rows": rows, **meant, name: "0" * 64})
        assert reply.status_code == 409 and reply.json()["error"].startswith(f"{name}: 000")


def test_spec_says_what_is_served(client, reward) -> None:
    spec = client.get("/v1/spec").json()
    assert spec["spec_hash"] == reward.spec_hash and spec["feature_ids"] == [3, 7, 11] and spec["layer"] == 1
    assert spec["gate_passed"] is False and spec["verifier"] is None and spec["max_rows"] == 8


def test_metrics_count_what_was_read(client) -> None:
    rows = [{"prompt_ids": PROMPT, "completion_ids": COMPLETION}, {"prompt_ids": PROMPT, "completion_ids": [5]}]
    client.post("/v1/score", json={"rows": rows})
    lines = dict(line.split() for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert lines["mechreward_rows_total"] == "2" and lines["mechreward_tokens_total"] == "6"
    assert lines["mechreward_forwards_total"] == "1" and float(lines["mechreward_forward_seconds_total"]) > 0
    assert lines["mechreward_waiting_rows"] == "0" and lines["mechreward_failures_total"] == "0"


def test_a_verifier_wants_answers(reward, tiny_llama, char_tokenizer) -> None:
    scorer = Scorer(reward, tiny_llama, char_tokenizer, verifier=gsm8k_exact_match)
    with TestClient(create_app(scorer)) as client:
        rows = [{"prompt": "a", "completion": "b", "answer": "4"}, {"prompt": "a", "completion": "b"}]
        reply = client.post("/v1/score", json={"rows": rows})
    assert reply.status_code == 422 and reply.json()["error"].startswith("answer: row 1 has none")


@pytest.mark.parametrize(
    "options,field", [({"mode": "mean"}, "mode"), ({"weight": 0.0}, "weight"), ({"weight": math.nan}, "weight")]
)
def test_bad_options(options, field, reward, tiny_llama, char_tokenizer) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        Scorer(reward, tiny_llama, char_tokenizer, **options)


def test_a_score_does_not_depend_on_its_company(reward, tiny_llama, char_tokenizer) -> None:
    normalised = FeatureReward(reward.pack, reward.sae, normalization="zscore")
    with pytest.raises(ValueError, match="^normalization: "):
        Scorer(normalised, tiny_llama, char_tokenizer)


def test_the_hash_of_a_tokenizer_knows_its_ids(char_tokenizer) -> None:
    vocabulary = char_tokenizer.get_vocab()

    class Other:
        def get_vocab(self) -> dict[str, int]:
            first, second = sorted(vocabulary, key=vocabulary.__getitem__)[10:12]
            return {**vocabulary, first: vocabulary[second], second: vocabulary[first]}

    assert tokenizer_hash(Other()) != tokenizer_hash(char_tokenizer)


def test_an_answer_that_cannot_be_judged_is_worth_nothing_known(reward, tiny_llama, char_tokenizer) -> None:
    scorer = Scorer(reward, tiny_llama, char_tokenizer, verifier=lambda *_: None)
    [score] = scorer.score(scorer.read([Row(prompt="2+2=", completion="4", answer="4")]))
    assert score.score is None and score.outcome is None and score.features is not None


def test_a_token_of_massive_norm_is_null_and_not_counted(reward, tiny_llama, char_tokenizer, monkeypatch) -> None:
    def without_second(_: FeatureReward, __: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return mask_BT & (torch.arange(mask_BT.shape[1]) != 1)

    monkeypatch.setattr(FeatureReward, "readable", without_second)
    scorer = Scorer(reward, tiny_llama, char_tokenizer)
    [score] = scorer.score(scorer.read([Row(prompt_ids=PROMPT, completion_ids=COMPLETION)]))
    tokens = by_hand(reward, tiny_llama, PROMPT, COMPLETION)
    assert score.token_rewards[1] is None and tokens[1] != 0
    rest = [value for place, value in enumerate(tokens) if place != 1]
    assert [value for value in score.token_rewards if value is not None] == pytest.approx(rest, abs=1e-5)
    assert score.features == pytest.approx(sum(rest) / len(rest), abs=1e-5)


def test_step_ends_are_found_in_what_was_sampled(reward, tiny_llama, char_tokenizer) -> None:
    steps = FeatureReward(reward.pack, reward.sae, aggregation="step_end")
    scorer = Scorer(steps, tiny_llama, char_tokenizer)
    ids = char_tokenizer("ab\ncd\nef", add_special_tokens=False)["input_ids"]
    ends = [place for place, token in enumerate(ids) if "\n" in char_tokenizer.decode([token])] + [len(ids) - 1]
    assert len(ends) == 3
    tokens = by_hand(reward, tiny_llama, PROMPT, ids)
    [score] = scorer.score(scorer.read([Row(prompt_ids=PROMPT, completion_ids=ids)]))
    assert score.features == pytest.approx(sum(tokens[place] for place in ends) / 3, abs=1e-5)
    assert abs(score.features - sum(tokens) / len(tokens)) > 1e-3
