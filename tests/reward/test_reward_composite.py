"""CompositeReward: sums, None, the bound that keeps outcomes in charge, and what it logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.reward import CompositeReward, FeatureReward, OutcomeReward, feature_reward
from mechreward.reward.composite import bounded
from mechreward.sae import SAE, SAEMeta


def constant(values: list[float | None], name: str = "dense"):
    def reward(prompts, completions, **_):
        assert len(prompts) == len(completions)
        return values

    reward.__name__ = name
    return reward


RIGHT = OutcomeReward(lambda _p, completion: completion == "right")
PROMPTS, COMPLETIONS = ["p", "p", "p"], ["right", "wrong", "right"]


def test_weighted_sum() -> None:
    composite = CompositeReward([constant([1.0, 2.0, -3.0]), RIGHT], weights=[0.1, 2.0])
    assert composite(PROMPTS, COMPLETIONS) == pytest.approx([2.1, 0.2, 1.7])
    assert CompositeReward([constant([1.0, 2.0, -3.0]), RIGHT])(PROMPTS, COMPLETIONS) == [2.0, 2.0, -2.0]


@pytest.mark.parametrize("mode", ["sum", "bounded", "stratified"])
def test_none_and_nan_stay_none(mode: str) -> None:
    composite = CompositeReward([constant([None, 2.0, math.nan]), RIGHT], mode=mode)
    values = composite(PROMPTS, COMPLETIONS)
    assert values[0] is None and values[2] is None and values[1] is not None


def test_bounded_by_hand() -> None:
    composite = CompositeReward([constant([1.0, 3.0, -1.0]), RIGHT], weights=[1.0, 2.0], mode="bounded")
    # gap 2, half 1: .98 * d / (1 + |d|)
    assert composite(PROMPTS, COMPLETIONS) == pytest.approx([2 + 0.49, 0.98 * 0.75, 2 - 0.49])


@given(
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 10),
)
def test_bounded_never_lets_wrong_outrank_right(
    dense_right: float, dense_wrong: float, low: float, gap: float, weight: float
) -> None:
    outcome = OutcomeReward(lambda _p, c: c == "right", true_reward=low + gap, false_reward=low)
    composite = CompositeReward([constant([dense_right, dense_wrong]), outcome], weights=[1.0, weight], mode="bounded")
    right, wrong = composite(["p", "p"], ["right", "wrong"])
    assert right > wrong


def test_bounded_keeps_the_order_of_what_is_added() -> None:
    squashed = [bounded(d, 1.0) for d in (-math.inf, -5.0, -0.1, 0.0, 0.1, 5.0, math.inf)]
    assert squashed == sorted(squashed) and len(set(squashed)) == 7
    assert squashed[3] == 0.0 and bounded(1e-6, 1.0) == pytest.approx(0.98e-6, rel=1e-4)


def test_component_means_go_to_trl() -> None:
    logged = {}
    composite = CompositeReward([constant([1.0, None, 5.0], "features"), RIGHT], name="both")
    composite(PROMPTS, COMPLETIONS, log_metric=lambda name, value: logged.update({name: value}))
    assert logged == {"both/features/mean": 3.0, "both/outcome_reward/mean": pytest.approx(2 / 3)}
    assert composite.__name__ == "both"


def test_a_callable_object_goes_by_its_class() -> None:
    class Constant:
        def __call__(self, **_) -> list[float]:
            return [2.0]

    logged = {}
    CompositeReward([Constant()])(["p"], ["c"], log_metric=lambda name, value: logged.update({name: value}))
    assert logged == {"composite_reward/Constant/mean": 2.0}


def test_columns_reach_every_component() -> None:
    seen = []
    composite = CompositeReward([lambda **columns: seen.append(columns) or [0.0]])
    composite(["p"], ["c"], answer=["4"], completion_ids=[[1]])
    assert seen == [{"prompts": ["p"], "completions": ["c"], "answer": ["4"], "completion_ids": [[1]]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": []}, "rewards: the list is empty"),
        ({"rewards": [RIGHT], "weights": [1.0, 2.0]}, "weights: 2 for 1 rewards"),
        ({"rewards": [RIGHT], "weights": [float("nan")]}, r"weights: \[nan\] are not allowed; each must"),
        ({"rewards": [RIGHT], "mode": "hero"}, "mode: 'hero' is not one of sum, bounded, stratified"),
        ({"rewards": [constant([0.0])], "mode": "bounded"}, "exactly one OutcomeReward, there are 0"),
        ({"rewards": [RIGHT, RIGHT], "mode": "bounded"}, "exactly one OutcomeReward, there are 2"),
        ({"rewards": [RIGHT], "weights": [-1.0], "mode": "bounded"}, "right is worth -1.0 more than wrong"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompositeReward(**arguments)


def test_features_of_one_model_share_it(tiny_llama, char_tokenizer, tmp_path: Path, monkeypatch) -> None:
    loads: list[str] = []
    read = feature_reward.load_model

    def load(name: str, **options: Any) -> Any:
        loads.append(str(name))
        return read(name, **options)

    monkeypatch.setattr(feature_reward, "load_model", load)
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    for name in names:
        tiny_llama.save_pretrained(name)
        char_tokenizer.save_pretrained(name)
    rewards = [feature_of(names[0], 1), feature_of(names[1], 1), feature_of(names[0], 2)]
    composite = CompositeReward([*rewards, constant([1.0])])
    (paid,) = composite(["ab"], ["cd"])
    assert sorted(loads) == names
    assert rewards[0]._bound[0] is rewards[2]._bound[0] is not rewards[1]._bound[0]
    bound = CompositeReward(
        [CompositeReward([feature_of("", 1)]), feature_of("", 1), feature_of("", 2), constant([1.0])]
    ).bind(tiny_llama, char_tokenizer)
    assert bound(["ab"], ["cd"]) == pytest.approx([paid])


def feature_of(model_name: str, layer: int) -> FeatureReward:
    g = torch.Generator().manual_seed(layer)
    W_DF = torch.randn(32, 12, generator=g)
    meta = SAEMeta(release="r", sae_id="i", layer=layer, model_name=model_name, hook_name="h")
    return FeatureReward({3: 1.0, 5: -2.0}, SAE("relu", W_DF, torch.zeros(12), W_DF.T, torch.zeros(32), meta))


def test_a_component_of_another_length_is_named() -> None:
    with pytest.raises(InputError, match="short: returned 2 rewards for 3 completions"):
        CompositeReward([constant([1.0, 2.0], "short")])(PROMPTS, COMPLETIONS)


def test_an_asynchronous_component_is_named() -> None:
    async def judge(**_) -> list[float]:
        return [1.0]

    class Judge:
        async def __call__(self, **_) -> list[float]:
            return [1.0]

    for reward, name in ((judge, "judge"), (Judge(), "Judge")):
        with pytest.raises(InputError, match=f"{name}: is asynchronous; .* beside composite_reward"):
            CompositeReward([RIGHT, reward])(["p"], ["c"])
