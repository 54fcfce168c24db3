"""Rewards that cannot be trained on are errors that name the reward; None and NaN are no reward at all."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from mechreward.errors import InputError
from mechreward.reward import FeatureReward
from mechreward.training import DenseConfig
from mechreward.training.checks import check_batch, check_rewards, check_scalar_rewards, check_token_rewards

NAN, INF = math.nan, math.inf


def gives(value: float | None, row: int = 5):
    """A reward function that gives `value` for one row, and a length for the others."""

    def scored(completion_ids, **_) -> list[float | None]:
        return [value if i == row else float(len(ids)) for i, ids in enumerate(completion_ids)]

    return scored


@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_scalar_reward_names_its_function_and_row(value, tmp_path, model, char_tokenizer, make) -> None:
    trainer = make(tmp_path, model, [gives(1.0), gives(value)], char_tokenizer)
    trainer.reward_func_names = ["fine", "broken"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"broken: gave completion 5 a reward of {value}; a reward must be finite"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("alone", [True, False])
def test_nan_is_none_and_says_nothing_of_its_row(alone, tmp_path, model, sae, char_tokenizer, make, score) -> None:
    advantages = []
    for value in (NAN, None):
        rewards = [FeatureReward({3: 1.0}, sae), gives(value), *([] if alone else [gives(2.0)])]
        trainer = make(tmp_path, copy.deepcopy(model), rewards, char_tokenizer, dense=DenseConfig(weight=0.0))
        torch.manual_seed(0)
        advantages.append(score(trainer)["advantages"])
    assert torch.equal(*advantages) and advantages[0].isfinite().all()
    assert (advantages[0][5] == 0) == alone, "a row without any reward has no outcome advantage"
    trainer = make(tmp_path, copy.deepcopy(model), rewards, char_tokenizer)
    assert score(trainer)["advantages"].isfinite().all()


def test_a_feature_reward_that_overflows_is_named(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    huge = FeatureReward({3: 3e38, 7: -3e38}, sae, name="huge")
    trainer = make(tmp_path, model, [FeatureReward({3: 1.0}, sae), huge, gives(1.0)], char_tokenizer)
    with pytest.raises(InputError, match=r"huge: gave token \d+ of completion \d+ a reward of -?(inf|nan); all must"):
        score(trainer)


def test_scalar_rewards_by_hand() -> None:
    check_scalar_rewards(torch.tensor([[1.0, NAN], [NAN, -3e38]]), ["a", "b"])
    with pytest.raises(InputError, match="b: gave completion 1 a reward of inf"):
        check_scalar_rewards(torch.tensor([[1.0, 0.0], [NAN, INF]]), ["a", "b"])


def test_token_rewards_by_hand(sae) -> None:
    reward, mask = FeatureReward({3: 1.0}, sae, name="mine"), torch.tensor([[True, True], [True, False]])
    check_token_rewards(reward, torch.tensor([[1.0, 2.0], [3.0, NAN]]), mask)
    for value in (NAN, INF, -INF):
        with pytest.raises(InputError, match=f"mine: gave token 1 of completion 0 a reward of {value}"):
            check_token_rewards(reward, torch.tensor([[1.0, value], [3.0, 0.0]]), mask)


def test_a_layer_the_model_lacks_is_named_before_training(tmp_path, model, sae_of_layer, char_tokenizer, make) -> None:
    with pytest.raises(InputError, match=r"layer: 4 .*0.*3"):
        make(tmp_path, model, [FeatureReward({3: 1.0}, sae_of_layer(4)), gives(1.0)], char_tokenizer)
    check_rewards([FeatureReward({3: 1.0}, sae_of_layer(3))], model, trains=False)


def test_batches_by_hand() -> None:
    none_BT, one_BT = torch.zeros(2, 3).bool(), torch.tensor([[True, False, False], [False] * 3])
    check_batch({}, one_BT, first=True, longest=3)
    check_batch({}, none_BT, first=False, longest=3)
    with pytest.raises(InputError, match="max_completion_length: all completions of the first batch ran into 3 tokens"):
        check_batch({}, none_BT, first=True, longest=3)
    with pytest.raises(InputError, match="images: dense rewards read text only"):
        check_batch({"pixel_values": torch.zeros(1)}, one_BT, first=False, longest=3)


def test_only_a_reward_that_trains_needs_its_gate(model, sae, caplog) -> None:
    reward = FeatureReward({3: 1.0}, sae)
    check_rewards([reward], model, trains=False)
    assert not caplog.records
    check_rewards([reward, reward], model, trains=True)
    assert sum("carries no passed gate" in message for message in caplog.messages) == 2


@pytest.mark.parametrize(
    ("found_on", "policy", "told"),
    [
        ("org/base-4b", "org/base-4b", False),
        ("org/Base-4B", "/models/base-4b", False),
        ("org/base-4b", "org/other-4b", True),
        ("/models/smol/q4.gguf", "/models/smol", False),
        ("", "org/other-4b", False),
    ],
)
def test_a_pack_of_another_model_is_told(found_on, policy, told, model, sae, caplog, monkeypatch) -> None:
    reward = FeatureReward({3: 1.0}, replace(sae, meta=replace(sae.meta, model_name=found_on)))
    monkeypatch.setattr(model, "name_or_path", policy, raising=False)
    check_rewards([reward], model, trains=False)
    assert [f"were found on {found_on} and the policy is {policy}" in m for m in caplog.messages] == [True] * told


def test_trajectory_credit_of_a_pack_that_pools_otherwise_is_told(model, sae, caplog) -> None:
    for aggregation, told in (("mean", 0), ("per_token", 0), ("last_16", 1)):
        caplog.clear()
        rewards = [FeatureReward({3: 1.0}, sae, aggregation=aggregation)]
        check_rewards(rewards, model, trains=True, credit="trajectory")
        assert sum("pays the mean" in m and m.endswith("last_16") for m in caplog.messages) == told
        check_rewards(rewards, model, trains=True, credit="step")
        assert sum("pays the mean" in m for m in caplog.messages) == told


def test_processing_classes_go_with_their_reward_functions(tmp_path, model, sae, char_tokenizer, make) -> None:
    first, second = copy.deepcopy(char_tokenizer), copy.deepcopy(char_tokenizer)
    trainer = make(
        tmp_path, model, [gives(1.0), FeatureReward({3: 1.0}, sae), gives(2.0)], char_tokenizer,
        reward_processing_classes=[first, None, second],
    )  # fmt: skip
    assert [one is other for one, other in zip(trainer.reward_processing_classes, (first, second), strict=True)] == [
        True, True,
    ]  # fmt: skip
    with pytest.raises(InputError, match="reward_processing_classes: 1 for 3 reward functions; give one each"):
        make(
            tmp_path, model, [gives(1.0), FeatureReward({3: 1.0}, sae), gives(2.0)], char_tokenizer,
            reward_processing_classes=[first],
        )  # fmt: skip
