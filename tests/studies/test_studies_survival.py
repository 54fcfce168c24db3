"""What Gate 3 is told: rewards of the right model, the probe of another block, canaries by one threshold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mechreward.errors import InputError
from mechreward.features import load_pack
from mechreward.gates import Answer, Evaluation, Survival
from mechreward.hacking import AdversarialSuite
from mechreward.inputs import Inputs, prepare
from mechreward.models import LoadedModel, iter_residuals, load_model, norm_outliers
from mechreward.probes import LinearProbe, load_probe, save_probe
from mechreward.reward import FeatureReward
from mechreward.reward.feature_reward import read_tokens
from mechreward.stages import verified
from mechreward.studies import survival as room
from mechreward.studies.capability import Score
from mechreward.studies.config import make_study
from mechreward.studies.survival import (
    PROBE,
    check_measurable,
    check_some_right,
    load_held_out,
    measure,
    paid_canaries,
    read_answers,
)
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


def test_what_could_not_be_measured_is_found_before_anything_is_sampled(inputs: Inputs, tmp_path: Path) -> None:
    assert check_measurable(make_study(**SMALL, panel=("tiny:easy",)), inputs) is None
    narrow, deep = (str(tmp_path / f"{name}.safetensors") for name in ("narrow", "deep"))
    save_probe(LinearProbe(torch.ones(5), 0.0, 5, "narrow", layer=3), narrow)
    save_probe(replace(load_probe(PROBE), layer=99), deep)
    for change, sentence in (
        ({"probe": str(tmp_path / "none.safetensors")}, "^probe: .*none is neither a file"),
        ({"probe": narrow}, "^probe: narrow reads width 5, but tiny has 128$"),
        ({"probe": deep}, "^probe: 99 is out of range; the model has blocks 0 to "),
        ({"panel": ("tiny:easy", "tiny:hard")}, "^panel: .*tiny:hard"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_measurable(make_study(**(SMALL | change)), inputs)
    with pytest.raises(InputError, match="it must be another one"):
        check_measurable(make_study(**SMALL), replace(inputs, layer=load_probe(PROBE).layer))


def test_a_start_without_a_right_answer_is_found_before_training() -> None:
    check_some_right(Evaluation(step=0, correct={"a": 0.5, "b": 0.0}))
    with pytest.raises(InputError, match="^questions: the starting model has no answer right"):
        check_some_right(Evaluation(step=0, correct={"a": 0.0, "b": 0.0}))


def test_ends_of_steps_are_those_of_the_text(inputs: Inputs, reward: FeatureReward) -> None:
    """A reward pooled at full stops, against the mean of its tokens that hold one, and of the last."""
    stops = FeatureReward(reward.pack.model_copy(update={"pooling": "step_end:."}), reward.sae)
    given = verified(inputs, inputs.loaded, inputs.split.unknown[:2], 2, 5, lambda _: None)
    answers = read_answers(given, stops, inputs.loaded, inputs.loaded, None)
    assert len(answers) == len(given)
    for one, answer in zip(given, answers, strict=True):
        [(reward_BT, mask_BT)] = read_tokens(
            [stops], inputs.loaded.model, [list(one.prompt_ids)], [list(one.completion_ids)]
        )
        ends = {t for t, token in enumerate(one.completion_ids) if "." in inputs.loaded.tokenizer.decode([token])}
        paid = [float(reward_BT[0, t]) for t in ends | {len(one.completion_ids) - 1} if mask_BT[0, t]]
        assert len(paid) > 1 and answer.live == answer.frozen == pytest.approx(np.mean(paid), abs=1e-4)


def test_answers_without_a_readable_token_are_left_out_and_massive_ones_are_not_probed(
    inputs: Inputs, reward: FeatureReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = verified(inputs, inputs.loaded, inputs.split.unknown[:3], 1, 5, lambda _: None)
    inner, seen = room.pool, []

    def pool(reward_BT: torch.Tensor, *rest: object) -> torch.Tensor:
        pooled = inner(reward_BT, *rest)
        pooled[1] = torch.nan
        return pooled

    def outliers(_: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        seen.append(mask_BT)
        return mask_BT & (torch.arange(mask_BT.shape[1]) > 2)

    monkeypatch.setattr(room, "pool", pool)
    monkeypatch.setattr(room, "norm_outliers", outliers)
    probe = load_probe(PROBE)
    found = read_answers(given, reward, inputs.loaded, inputs.loaded, probe)
    assert [answer.question for answer in found] == [given[0].question_id, given[2].question_id]
    for one, answer in zip((given[0], given[2]), found, strict=True):
        [batch] = iter_residuals(
            inputs.loaded.model, [list(one.prompt_ids)], [list(one.completion_ids)], probe.layer or 0
        )
        late = batch.mask_BT & (torch.arange(batch.mask_BT.shape[1]) > 2)
        assert answer.probe == pytest.approx(float(probe.row_proba(batch.h_BTD, late)[0]), abs=1e-4)
    assert seen


def test_the_panel_is_asked_of_both_models_as_the_settings_say(
    inputs: Inputs, reward: FeatureReward, other: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def scores(model: LoadedModel, sources: object, verifier: object, **options: object) -> dict[str, Score]:
        asked.append((model, sources, verifier, options))
        return {"a": Score(0.5 if model is other else 0.75, 0.1)}

    more = {"panel_questions": 3, "temperature": 0.7, "seed": 8, "prompt_format": "Q {question}", "panel": ("a",)}
    config = make_study(**(SMALL | more))
    monkeypatch.setattr(room, "panel_scores", scores)
    monkeypatch.setattr(room, "verified", lambda *_: [])
    monkeypatch.setattr(room, "paid_canaries", lambda *_: None)
    right = Answer(question="q", correct=True, live=1.0, frozen=2.0, probe=None)
    monkeypatch.setattr(room, "read_answers", lambda *_: (right,))
    found = measure(config, inputs, other, reward, inputs.split.unknown, 7, 5)
    options = {
        "n_questions": 3, "max_new_tokens": 60, "prompt_format": "Q {question}", "temperature": 0.7, "seed": 8,
    }  # fmt: skip
    assert asked == [(model, ("a",), inputs.verifier, options) for model in (inputs.loaded, other)]
    assert (found.panel["a"].before, found.panel["a"].after) == (0.75, 0.5)


def test_the_threshold_is_the_median_reward_of_the_starting_model_s_right_answers(
    inputs: Inputs, reward: FeatureReward, other: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[LoadedModel, float]] = []

    def answers(_given: object, _reward: object, live: LoadedModel, *_: object) -> tuple[Answer, ...]:
        rows = [(True, 9.0), (True, 2.0), (True, 1.0), (False, 50.0)] if live is inputs.loaded else [(True, 99.0)]
        return tuple(Answer(question="q", correct=ok, live=7.0, frozen=paid, probe=None) for ok, paid in rows)

    monkeypatch.setattr(room, "read_answers", answers)
    monkeypatch.setattr(room, "verified", lambda *_: [])
    monkeypatch.setattr(room, "paid_canaries", lambda _reward, model, _questions, bar: asked.append((model, bar)))
    measure(make_study(**SMALL), inputs, other, reward, inputs.split.unknown, 7, 5)
    assert asked == [(inputs.loaded, 2.0), (other, 2.0)]
