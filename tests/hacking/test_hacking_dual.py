"""The second opinion: independence is checked, verdicts are absolute, and only the rollouts concerned are touched."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from mechreward.errors import InputError
from mechreward.hacking import DualVerifier
from mechreward.models import iter_blocks, load_model
from mechreward.probes import load_probe
from mechreward.reward import FeatureReward
from mechreward.sae import load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER

PROMPTS = ["12+3=", "12+3=", "12+3=", "what"]
COMPLETIONS = ["15", "15 so it is 15.", "9 9 9", "abc"]


def calibrated(reward, probe, **options) -> DualVerifier:
    """Whose claim has log-odds 2 (score - 1)."""
    dual = DualVerifier(reward, probe, **options)
    dual.calibration = (2.0, -2.0)
    return dual


def test_flags_only_what_is_paid_as_right_and_looks_wrong(reward, probe) -> None:
    dual = calibrated(reward, probe)
    claim = lambda p: 1.0 + torch.logit(torch.tensor(p)).item() / 2  # noqa: E731
    cases = [  # claim, probe, flagged
        (0.9, 0.1, True), (0.1, 0.9, False), (0.9, 0.8, False), (0.6, 0.4, False), (0.7, 0.45, False),
        (0.75, 0.44, True), (0.45, 0.05, False), (0.99, 0.55, False), (0.52, 0.1, True),
    ]  # fmt: skip
    verdicts = dual.verdicts(torch.tensor([claim(c) for c, _, _ in cases]), torch.tensor([p for _, p, _ in cases]))
    assert verdicts.flagged.tolist() == [flagged for _, _, flagged in cases]
    assert verdicts.claim.tolist() == pytest.approx([c for c, _, _ in cases], abs=1e-5)
    assert verdicts.rate == pytest.approx(3 / 9)


def test_a_verdict_does_not_depend_on_the_batch(reward, probe) -> None:
    dual = calibrated(reward, probe)
    scores, probes = torch.tensor([3.0, 2.0, -1.0, 0.5]), torch.tensor([0.1, 0.2, 0.3, 0.9])
    together = dual.verdicts(scores, probes).flagged
    alone = [bool(dual.verdicts(scores[i : i + 1], probes[i : i + 1]).flagged) for i in range(4)]
    assert together.tolist() == alone == [True, True, False, False]
    # All of a batch may be flagged, and none: there is no median.
    assert dual.verdicts(torch.full((3,), 4.0), torch.zeros(3)).rate == 1.0
    assert dual.verdicts(torch.full((3,), -4.0), torch.zeros(3)).rate == 0.0


def test_nothing_is_flagged_before_calibration_or_without_tokens(reward, probe) -> None:
    dual = DualVerifier(reward, probe)
    assert dual.verdicts(torch.tensor([9.0]), torch.tensor([0.0])).flagged.tolist() == [False]
    assert dual.verdicts(torch.tensor([9.0]), torch.tensor([0.0])).rate == 0.0
    dual.calibration = (1.0, 0.0)
    nan = torch.tensor([torch.nan, 9.0])
    found = dual.verdicts(nan, torch.tensor([0.0, torch.nan]))
    assert found.flagged.tolist() == [False, False] and found.rate == 0.0


def test_calibrates_once_on_enough_rollouts_with_both_outcomes(reward, probe) -> None:
    dual = DualVerifier(reward, probe)
    scores = torch.linspace(-1, 1, 64)
    dual.observe(scores, torch.ones(64))
    assert dual.calibration is None  # all alike
    dual.observe(torch.cat([scores, torch.tensor([torch.nan])]), torch.cat([torch.zeros(64), torch.ones(1)]))
    first = dual.calibration
    assert first is not None
    dual.observe(scores, (scores > 0).float())
    assert dual.calibration == first
    fresh = DualVerifier(reward, probe)
    fresh.observe(scores[:63], (scores[:63] > 0).float())
    assert fresh.calibration is None
    fresh.observe(scores[63:], torch.ones(1))
    assert fresh.calibration is not None and fresh.calibration[0] > 0


def test_there_is_one_outcome_a_score(reward, probe) -> None:
    with pytest.raises(InputError, match="right: 2 outcomes for 3 scores; give one each"):
        DualVerifier(reward, probe).calibrate([0.1, 0.2, 0.3], [True, False])


def test_state_goes_on(reward, probe) -> None:
    one, other = DualVerifier(reward, probe), DualVerifier(reward, probe)
    one.observe(torch.linspace(-1, 1, 40), (torch.arange(40) % 2).float())
    other.load_state(one.state())
    for dual in (one, other):
        dual.observe(torch.linspace(-1, 1, 40), (torch.arange(40) > 20).float())
    assert one.calibration == other.calibration is not None
    third = DualVerifier(reward, probe)
    third.load_state(one.state())
    assert third.calibration == pytest.approx(one.calibration)


def test_compute_reads_each_at_its_own_block(reward, probe, tiny_llama, char_tokenizer) -> None:
    ids = [char_tokenizer(text, add_special_tokens=False)["input_ids"] for text in COMPLETIONS]
    prompts = [char_tokenizer(text)["input_ids"] for text in PROMPTS]
    [batch] = iter_blocks(tiny_llama, prompts, ids, [1, 2], stop=False)  # in one piece: one batch of all rows
    dual = calibrated(reward, probe)
    rewards, rate = dual.compute(batch.h_BTD, batch.mask_BT)
    torch.testing.assert_close(rewards, reward.compute(batch.h_BTD[1], batch.mask_BT))
    seen = probe.row_proba(batch.h_BTD[2], reward.readable(batch.h_BTD[2], batch.mask_BT))
    expected = dual.verdicts(rewards, seen)
    assert rate == expected.rate == dual.recent_disagreement()
    with pytest.raises(InputError, match="states: block 2 is missing"):
        dual.compute({1: batch.h_BTD[1]}, batch.mask_BT)


def test_as_a_reward_function_flagged_rewards_become_neutral(reward, probe, tiny_llama, char_tokenizer) -> None:
    dual = DualVerifier(reward, probe).bind(tiny_llama, char_tokenizer)
    plain = dual(PROMPTS, COMPLETIONS)
    expected = FeatureReward(reward.pack, reward.sae).bind(tiny_llama, char_tokenizer)(PROMPTS, COMPLETIONS)
    assert plain == pytest.approx(expected, abs=1e-4)  # not calibrated yet: nothing is flagged
    assert dual.recent_disagreement() == 0.0
    dual.calibration = (0.0, 3.0)  # everything is claimed to be right
    dual.probe = replace(probe, weight=torch.zeros(32), bias=-5.0)  # and looks wrong
    assert dual(PROMPTS, COMPLETIONS)[:3] == pytest.approx([sum(plain[:3]) / 3] * 3, abs=1e-4)
    assert dual.recent_disagreement(1) == 1.0 and dual.recent_disagreement() == 0.5
    assert dual(PROMPTS[:1], [""]) == [None]
    with pytest.raises(InputError, match="completions: 1 for 2 prompts"):
        dual(PROMPTS[:2], [""])


def test_in_a_plain_trainer_it_warns_and_refuses_as_the_reward_that_it_pays(
    reward, probe, tiny_llama, char_tokenizer, caplog
) -> None:
    dual = DualVerifier(reward, probe).bind(tiny_llama, char_tokenizer)
    for _ in range(2):
        dual(["12+3="], ["15"], trainer_state=object())
    assert [record.message for record in caplog.records] == [reward.gate_warning]
    picture = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many ?"}]}]
    with pytest.raises(InputError, match="prompts: a feature reward reads text only; .* of type 'image'"):
        dual([picture], ["15"])


def test_steps_are_judged_apart(reward, probe) -> None:
    dual = calibrated(reward, replace(probe, weight=torch.eye(32)[0], bias=0.0, pooling="max"))
    reward_BT = torch.tensor([[5.0, 5.0, 5.0, -5.0, 5.0, 5.0]])
    h_BTD = torch.zeros(1, 6, 32)
    h_BTD[0, :, 0] = torch.tensor([-4.0, -3.0, -4.0, -4.0, 6.0, -9.0])
    mask_BT, ends_BT = torch.ones(1, 6).bool(), torch.tensor([[False, True, False, True, False, False]])
    # Step 1 is paid and looks wrong; step 2 is not paid (mean 0, claim .12); step 3 has one token that looks right.
    assert dual.judge_steps(reward_BT, h_BTD, mask_BT, ends_BT).tolist() == [[True, True] + [False] * 4]
    mask_BT[0, 1] = False
    assert dual.judge_steps(reward_BT, h_BTD, mask_BT, ends_BT).tolist()[0][1] is False
    assert not dual.judge_steps(reward_BT, h_BTD, torch.zeros(1, 6).bool(), ends_BT).any()


def test_the_probe_has_to_be_independent(reward, probe, caplog) -> None:
    with pytest.raises(InputError, match="reads block 1, the reward's own"):
        DualVerifier(reward, replace(probe, layer=1))
    with pytest.raises(InputError, match="does not say which block it reads"):
        DualVerifier(reward, replace(probe, layer=None))
    with pytest.raises(InputError, match="reads width 16, but the reward's model has 32"):
        DualVerifier(reward, replace(probe, weight=torch.ones(16), d_model=16))
    same = replace(probe, metadata={"questions": "tiny:easy", "questions_seed": 0})
    pack = reward.pack.model_copy(update={"provenance": {"questions": "tiny:easy", "seed": 0}})
    with pytest.raises(InputError, match="trained on tiny:easy with seed 0, the questions the pack was found on"):
        DualVerifier(FeatureReward(pack, reward.sae), same)
    DualVerifier(
        FeatureReward(pack, reward.sae), replace(same, metadata={"questions": "tiny:easy", "questions_seed": 1})
    )
    recorded = reward.pack.model_copy(update={"provenance": {"prompts": ["a", "b", "c"]}})
    with pytest.raises(InputError, match="was trained on 2 questions that the pack was found on"):
        DualVerifier(FeatureReward(recorded, reward.sae), replace(probe, metadata={"prompts": ["c", "d", "a"]}))
    DualVerifier(FeatureReward(recorded, reward.sae), replace(probe, metadata={"prompts": ["d"]}))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        DualVerifier(reward, replace(probe, pooling="mean"))
    assert "pools by mean, which filler dilutes" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disagreement_threshold": 0.0}, "disagreement_threshold: 0.0 must be between"),
        ({"action": "shrug"}, "action: 'shrug'"),
        ({"downweight_factor": 1.5}, "downweight_factor: 1.5"),
    ],
)
def test_bad_options(reward, probe, options, message) -> None:
    with pytest.raises(InputError, match=message):
        DualVerifier(reward, probe, **options)


def test_states_of_nan_are_refused(reward, probe) -> None:
    states = {1: torch.full((1, 2, 32), torch.nan), 2: torch.zeros(1, 2, 32)}
    with pytest.raises(InputError, match="NaN"):
        DualVerifier(reward, probe).compute(states, torch.ones(1, 2).bool())


def test_in_a_plain_trainer_the_packs_own_model_reads() -> None:
    sae, probe = load_sae(SAE_FOLDER), load_probe("tiny/correctness_probe_l3")
    prompts = [question.prompt for question in load_questions("tiny:easy", limit=3)]
    unbound, bound = (DualVerifier(FeatureReward.from_pack("tiny/reasoning_pack", sae), probe) for _ in range(2))
    loaded = load_model(str(MODEL))
    bound.bind(loaded.model, loaded.tokenizer)
    for verifier in (unbound, bound):
        verifier.calibration = (2.0, -2.0)
    completions = ["#### 7", "Ada has 3 .", "#### 1"]
    paid = unbound(prompts, completions)
    assert paid == bound(prompts, completions) and len(set(paid)) == 3
    unnamed = DualVerifier(FeatureReward({3: 1.0}, replace(sae, meta=replace(sae.meta, model_name=""))), probe)
    with pytest.raises(InputError, match="the pack names no model; call verifier.bind"):
        unnamed(prompts, completions)
