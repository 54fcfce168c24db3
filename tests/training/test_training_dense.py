"""What the user passes as rewards, split into dense and scalar parts, and the options of the dense part."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from transformers import TrainerState

from mechreward.errors import InputError
from mechreward.reward import CompositeReward, FeatureReward, LinearAnnealSchedule, OutcomeReward, WeightSchedule
from mechreward.sae import SAE, SAEMeta
from mechreward.training.dense import DenseConfig, load_outcome_rms, no_outcome, save_outcome_rms, split_rewards

META = SAEMeta(release="r", sae_id="i", layer=0, model_name="", hook_name="h")
TINY = SAE(
    architecture="relu",
    W_enc_DF=torch.eye(2),
    b_enc_F=torch.zeros(2),
    W_dec_FD=torch.eye(2),
    b_dec_D=torch.zeros(2),
    meta=META,
)
DENSE, OTHER = FeatureReward({0: 1.0}, TINY), FeatureReward({1: 1.0}, TINY, name="other")
RIGHT, FORMAT = OutcomeReward(lambda _p, _c: True), OutcomeReward(lambda _p, _c: True, name="format")


def test_a_composite_is_split_with_its_weights() -> None:
    parts = split_rewards(CompositeReward([DENSE, RIGHT, FORMAT], weights=[0.1, 1.0, 0.25]), None)
    assert (parts.dense, parts.dense_weights) == ([DENSE], [0.1])
    assert (parts.scalar, parts.scalar_weights) == ([RIGHT, FORMAT], [1.0, 0.25])
    assert parts.share == pytest.approx(0.1 / 1.25)


def test_a_bare_list_has_the_default_share() -> None:
    parts = split_rewards([DENSE, RIGHT], None)
    assert (parts.dense_weights, parts.scalar_weights, parts.share) == ([1.0], [1.0], 0.1)
    assert split_rewards(CompositeReward([DENSE, RIGHT]), None).share == 0.1
    assert split_rewards(DENSE, None).scalar == []


def test_reward_weights_and_nested_composites_multiply() -> None:
    inner = CompositeReward([OTHER, FORMAT], weights=[3.0, 2.0])
    parts = split_rewards([CompositeReward([inner, RIGHT], weights=[0.5, 1.0]), DENSE], [2.0, -0.5])
    assert (parts.dense, parts.dense_weights) == ([OTHER, DENSE], [3.0, -0.5])
    assert (parts.scalar, parts.scalar_weights) == ([FORMAT, RIGHT], [2.0, 2.0])
    assert parts.scalar_from == [0, 0] and split_rewards([DENSE, RIGHT, FORMAT], None).scalar_from == [1, 2]
    assert split_rewards(None, None).scalar == []  # TRL's environments may pay all there is
    assert parts.share == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
    ("rewards", "share"),
    [
        ([DENSE, CompositeReward([RIGHT, FORMAT], weights=[1.0, 0.2])], 0.1),
        ([DENSE, CompositeReward([RIGHT, no_outcome], weights=[1.0, 0.2], mode="bounded")], 0.1),
        (CompositeReward([DENSE, CompositeReward([RIGHT, FORMAT], weights=[1.0, 0.2])]), 0.1),
        (CompositeReward([CompositeReward([DENSE, RIGHT], weights=[0.5, 1.0])]), 0.5),
        ([CompositeReward([CompositeReward([DENSE], weights=[0.25]), RIGHT])], 0.25),
    ],
)
def test_only_weights_beside_features_imply_a_share(rewards, share) -> None:
    assert split_rewards(rewards, None).share == pytest.approx(share)


def test_weights_that_imply_no_share_are_told(caplog) -> None:
    for rewards, weights in (([DENSE], [0.5]), ([DENSE, RIGHT], [0.5, 0.0]), ([DENSE, OTHER], [1.0, 3.0])):
        parts = split_rewards(rewards, weights)
        assert parts.share == 0.1
        parts.check_share(0.3)
        assert not caplog.records, "lambda was chosen"
        parts.check_share(None)
        assert caplog.records.pop().getMessage().startswith("reward_weights: no other reward has a weight")
        caplog.clear()
    for rewards, weights in (([DENSE], None), ([DENSE, RIGHT], [0.5, 1.0]), ([RIGHT], [0.0])):
        split_rewards(rewards, weights).check_share(None)
    assert not caplog.records


def test_a_composite_without_features_stays_whole() -> None:
    bounded = CompositeReward([RIGHT, lambda **_: [0.0]], mode="bounded")
    assert split_rewards([bounded, DENSE], None).scalar == [bounded]


@pytest.mark.parametrize("mode", ["bounded", "stratified"])
def test_a_bound_on_whole_completions_is_refused(mode: str) -> None:
    with pytest.raises(InputError, match=f"both: mode '{mode}' has no meaning for token rewards; use mode 'sum'"):
        split_rewards(CompositeReward([DENSE, RIGHT], mode=mode, name="both"), None)
    assert split_rewards(CompositeReward([RIGHT], mode=mode), None).dense == []


def test_a_normalization_is_refused() -> None:
    ranked = FeatureReward({0: 1.0}, TINY, normalization="rank", name="ranked")
    with pytest.raises(InputError, match="ranked: its normalization acts on whole completions"):
        split_rewards([CompositeReward([ranked]), RIGHT], None)
    assert split_rewards([FeatureReward({0: 1.0}, TINY, normalization="none")], None).dense


def test_lambda_is_a_number_a_schedule_or_implied() -> None:
    assert DenseConfig().weight_at(3, 10, implied=0.25) == 0.25
    assert DenseConfig(weight=0.0).weight_at(3, 10, implied=0.25) == 0.0
    schedule = DenseConfig(weight=LinearAnnealSchedule(0.2, 0.6))
    assert [schedule.weight_at(step, 4, implied=9.0) for step in (0, 1, 4)] == pytest.approx([0.2, 0.3, 0.6])


def test_a_schedule_of_ones_own_is_checked() -> None:
    @dataclass(frozen=True)
    class Falling(WeightSchedule):
        kind: str = field(default="falling", init=False)

        def __call__(self, step: int, total_steps: int) -> float:
            return 1.0 - step / total_steps * 2

    falling = DenseConfig(weight=Falling())
    assert falling.weight_at(1, 4, implied=0.0) == 0.5
    with pytest.raises(InputError, match="weight: -0.5 is not allowed"):
        falling.weight_at(3, 4, implied=0.0)


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(InputError, match="reward_weights: 1 for 2 reward functions"):
        split_rewards([DENSE, RIGHT], [1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, "weight: -0.1 is not allowed; a weight must be a number of 0 or more"),
        ({"weight": float("nan")}, "weight: nan is not allowed"),
        ({"gamma": 2.0}, "gamma: 2.0 is outside"),
        ({"credit": "step", "step_end": ""}, "step_end: is empty"),
        ({"read_batch_size": 0}, "read_batch_size: 2, 0 must be at least 0 and 1"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DenseConfig(**options)


def test_the_carried_number_survives_the_trainer_state(tmp_path) -> None:
    state = TrainerState()
    assert load_outcome_rms(state) == 1.0
    save_outcome_rms(state, 0.1 + 0.2)
    state.save_to_json(str(tmp_path / "s.json"))
    assert load_outcome_rms(TrainerState.load_from_json(str(tmp_path / "s.json"))) == 0.1 + 0.2


def test_the_placeholder_is_zero_and_named() -> None:
    assert no_outcome(prompts=["a", "b"], completions=["c", "d"]) == [0.0, 0.0]
    assert no_outcome.__name__ == "no_outcome"
