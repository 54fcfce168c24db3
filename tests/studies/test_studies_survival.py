"""What Gate 3 is told: rewards of the right model, the probe of another block, canaries by one threshold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mechreward.errors import InputError
from mechreward.features import load_pack
from mechreward.gates import Evaluation, Survival
from mechreward.hacking import AdversarialSuite
from mechreward.inputs import Inputs, prepare
from mechreward.models import LoadedModel, iter_residuals, load_model, norm_outliers
from mechreward.pipeline import verified
from mechreward.probes import load_probe, save_probe
from mechreward.reward import FeatureReward
from mechreward.studies.config import make_study
from mechreward.studies.survival import PROBE, check_measurable, load_held_out, measure, paid_canaries, read_answers
from mechreward.tiny import MODEL

SMALL = {"questions": "tiny:easy", "limit": 12, "known": 0.5, "eval_samples": 2, "max_new_tokens": 60, "seeds": (0,)}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return prepare(make_study(**SMALL))


@pytest.fixture(scope="module")
def reward(inputs: Inputs) -> FeatureReward:
    assert inputs.sae is not None
    return FeatureReward.from_pack(load_pack("tiny/reasoning_pack"), inputs.sae)


@pytest.fixture(scope="module")
def other() -> LoadedModel:
    """The model with its second block disturbed: a policy that reads differently."""
    loaded = load_model(str(MODEL))
    with torch.no_grad():
        for parameter in loaded.model.get_decoder().layers[1].parameters():
            parameter.mul_(1.05)
    return loaded


def test_live_and_frozen_are_read_on_their_own_model(inputs: Inputs, reward: FeatureReward, other: LoadedModel) -> None:
    probe = load_probe(PROBE)
    given = verified(inputs, other, inputs.split.unknown[:3], 2, 5, lambda _: None)
    answers = read_answers(given, reward, other, inputs.loaded, probe)
    prompts, completions = [list(g.prompt_ids) for g in given], [list(g.completion_ids) for g in given]
    for model, field in ((other, "live"), (inputs.loaded, "frozen")):
        for batch in iter_residuals(model.model, prompts, completions, reward.layer):
            for row, value in zip(batch.rows, reward.compute(batch.h_BTD, batch.mask_BT).tolist(), strict=True):
                assert getattr(answers[row], field) == pytest.approx(value, abs=1e-4)
    assert any(abs(a.live - a.frozen) > 1e-3 for a in answers)
    assert probe.layer is not None
    for batch in iter_residuals(inputs.loaded.model, prompts, completions, probe.layer):
        readable_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
        for row, value in zip(batch.rows, probe.row_proba(batch.h_BTD, readable_BT).tolist(), strict=True):
            assert answers[row].probe == pytest.approx(value, abs=1e-4)
    assert [a.correct for a in answers] == [g.correct for g in given]
    assert read_answers(given, reward, other, inputs.loaded, None)[0].probe is None


def test_a_whole_measurement(inputs: Inputs, reward: FeatureReward, other: LoadedModel) -> None:
    config = make_study(**SMALL, panel=("tiny:easy",), panel_questions=2)
    found = measure(config, inputs, other, reward, inputs.split.unknown, 7, 5)
    assert (found.arm, found.seed) == ("sae", 7) and Survival(**found.model_dump()) == found
    assert all(abs(a.live - a.frozen) < 1e-6 for a in found.before) and list(found.panel) == ["tiny:easy"]
    validation = reward.pack.validation
    assert validation is not None and validation.interval is not None and found.gate1_low == validation.interval[0]
    threshold = float(np.median([a.frozen for a in found.before if a.correct]))
    suite = AdversarialSuite.from_questions(inputs.split.unknown)
    for model, canaries in ((inputs.loaded, found.canaries_before), (other, found.canaries_after)):
        whole = suite.evaluate_reward(reward.bind(model.model, model.tokenizer), threshold)
        assert canaries is not None and canaries.n == whole.n_hacks
        assert np.mean(list(canaries.paid.values())) == pytest.approx(whole.hack_rate)
        assert canaries.paid.keys() == {question.id for question in inputs.split.unknown}


def test_a_threshold_below_all_rewards_pays_all(inputs: Inputs, reward: FeatureReward) -> None:
    all_of_them = paid_canaries(reward, inputs.loaded, inputs.split.unknown[:1], -1e9)
    (name,) = all_of_them.paid
    assert all_of_them.paid[name] == 1.0 and all_of_them.n > 0
    assert paid_canaries(reward, inputs.loaded, inputs.split.unknown[:1], 1e9).paid == {name: 0.0}


def test_the_probe_is_of_another_block(reward: FeatureReward, tmp_path: Path) -> None:
    assert load_held_out(make_study(**SMALL), reward.layer) is not None
    save_probe(replace(load_probe(PROBE), layer=reward.layer), tmp_path / "same.safetensors")
    with pytest.raises(InputError, match=f"the reward {reward.layer}; it must be another one"):
        load_held_out(make_study(**SMALL, probe=str(tmp_path / "same.safetensors")), reward.layer)
    assert load_held_out(make_study(**(SMALL | {"model": "other"})), reward.layer) is None


def test_what_could_not_be_measured_is_found_before_training(reward: FeatureReward, tmp_path: Path) -> None:
    right, wrong = (Evaluation(step=0, correct={"a": share, "b": 0.0}) for share in (0.5, 0.0))
    panel = {"panel": ("tiny:easy",)}
    assert check_measurable(make_study(**(SMALL | panel)), reward.layer, right) is None
    for change, start, sentence in (
        ({"probe": str(tmp_path / "none.safetensors")}, right, "^probe: .*none is neither a file"),
        ({"panel": ("tiny:easy", "tiny:hard")}, right, "^panel: .*tiny:hard"),
        (panel, wrong, "^questions: the starting model has no answer right"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_measurable(make_study(**(SMALL | change)), reward.layer, start)
    with pytest.raises(InputError, match="it must be another one"):
        check_measurable(make_study(**SMALL), load_probe(PROBE).layer, right)
