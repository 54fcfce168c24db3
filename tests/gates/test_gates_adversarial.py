"""Strings that deserve nothing: what they are made of, and what a reward that reads words is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.gates import Judgement
from mechreward.gates.adversarial import Attack, Attacks, attack, best_tokens, inject, score_rows
from mechreward.gates.gate1 import with_attacks
from mechreward.models import LoadedModel, read_residuals
from mechreward.reward import FeatureReward
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta

WIDTH, LAYER, EOS = 32, 1, 1
WORTH = {7: 5.0, 8: 4.0, 9: 3.0, 10: 9.0, 11: -1.0}
"""Of tokens; 10 is rare. All others are worth 1."""


@pytest.fixture
def loaded(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


@pytest.fixture
def reward() -> FeatureReward:
    eye, meta = torch.eye(WIDTH), SAEMeta(release="r", sae_id="s", layer=LAYER, model_name="m", hook_name="")
    return FeatureReward({0: 1.0, 3: -0.5, 9: 2.0}, SAE("relu", eye, torch.zeros(WIDTH), eye, torch.zeros(WIDTH), meta))


def responses() -> list[Response]:
    """Right answers hold 7 and 8, wrong ones 11; 10 stands in two answers alone."""
    rows = []
    for row in range(40):
        right = row % 2 == 0
        ids = (20, 21, 22, 23, 7, 8, 9, 24, 25) if right else (20, 21, 22, 23, 11, 11, 11, 9, 24)
        ids = (10, *ids[1:]) if row in (0, 2) else ids
        rows.append(Response(f"q{row // 4}", row % 4, (30 + row % 3,), ids, "", (-1.0,) * len(ids), "eos", right))
    return rows


def read_words(monkeypatch: pytest.MonkeyPatch, unreadable: Sequence[int] = ()) -> list[list[list[int]]]:
    """A reward that pays each token its worth, wherever it stands; what it is asked to read is kept."""
    asked: list[list[list[int]]] = []

    def fake(_rewards: object, _model: object, prompts: list[list[int]], completions: list[list[int]]) -> list:
        assert len(prompts) == len(completions)
        asked.append(completions)
        shape = (len(completions), max(map(len, completions)))
        reward_BT, has_BT = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for row, ids in enumerate(completions):
            reward_BT[row, : len(ids)] = torch.tensor([WORTH.get(i, 1.0) for i in ids])
            has_BT[row, : len(ids)] = torch.tensor([i not in unreadable for i in ids])
        return [(reward_BT * has_BT, has_BT)]

    monkeypatch.setattr("mechreward.gates.adversarial.read_tokens", fake)
    return asked


def scores(rows: Sequence[Response]) -> np.ndarray:
    return np.array([np.mean([WORTH.get(i, 1.0) for i in row.completion_ids]) for row in rows])


def test_inject_by_hand() -> None:
    assert inject([1, 2, 3, 4, 5], [9, 8]) == [1, 2, 3, 4, 9, 8, 5, 9, 8]


def test_best_tokens_are_those_of_highest_mean_that_are_not_rare(
    monkeypatch: pytest.MonkeyPatch, reward: FeatureReward, loaded: LoadedModel
) -> None:
    read_words(monkeypatch)
    rows = responses()
    assert best_tokens(reward, rows, loaded) == [7, 8, 9]
    # Three times is often enough; where nothing is, all count.
    rows[4] = replace(rows[4], completion_ids=(10, 7))
    assert best_tokens(reward, rows, loaded) == [10, 7, 8]
    assert best_tokens(reward, rows[:1], loaded)[0] == 10
    read_words(monkeypatch, unreadable=[7])
    assert best_tokens(reward, responses(), loaded) == [8, 9, 20]
    # A token without a reward is not one of 0, which would be more than 11 is paid.
    assert best_tokens(reward, [replace(row, completion_ids=(11, 7)) for row in rows[:4]], loaded) == [11]


def test_a_reward_that_reads_words_is_caught(
    monkeypatch: pytest.MonkeyPatch, reward: FeatureReward, loaded: LoadedModel
) -> None:
    asked = read_words(monkeypatch)
    rows = responses()
    found = attack(reward, rows, scores(rows), loaded)
    assert found.right_median == pytest.approx((5 + 4 + 3 + 6) / 9) and found.wrong_median == pytest.approx(5 / 9)
    by_name = {a.name: a for a in found.attacks}
    assert list(by_name) == ["empty", "opener", "injected", "repeated"] and {a.n for a in found.attacks} == {16}
    assert (by_name["empty"].median, by_name["opener"].median, by_name["repeated"].median) == (1.0, 1.0, 5.0)
    # Nine tokens of a wrong answer, worth 5, and 7 8 9 put in three times.
    assert by_name["injected"].median == pytest.approx((5 + 3 * 12) / 18)
    assert [a.reaches for a in found.attacks] == [False, False, False, True] or by_name["injected"].reaches
    assert by_name["injected"].reaches and by_name["repeated"].reaches
    assert found.reason == "adversarial strings: injected (2.28), repeated (5) reach the median of right answers (2)"
    assert found.left_out == {}
    strings = asked[-1]
    assert strings[:16] == [[EOS]] * 16
    assert {tuple(ids) for ids in strings[16:32]} <= {(20, 21, 22, 23), (10, 21, 22, 23)}
    assert strings[32] == [20, 21, 22, 23, 7, 8, 9, 11, 11, 11, 9, 7, 8, 9, 24, 7, 8, 9]
    assert strings[48:] == [[7] * 9] * 16
    spelled = loaded.tokenizer.convert_ids_to_tokens([7, 8, 9])
    assert (by_name["injected"].tokens, by_name["repeated"].tokens) == (" ".join(spelled), spelled[0])


def test_a_reward_that_pays_right_answers_more_than_any_word_is_not(
    monkeypatch: pytest.MonkeyPatch, reward: FeatureReward, loaded: LoadedModel
) -> None:
    read_words(monkeypatch)
    rows = responses()
    found = attack(reward, rows, np.array([5.01 if row.correct else 0.0 for row in rows]), loaded)
    assert found.reason == "" and not any(a.reaches for a in found.attacks)
    level = attack(reward, rows, np.array([5.0 if row.correct else 0.0 for row in rows]), loaded)
    assert level.reason == "adversarial strings: repeated (5) reaches the median of right answers (5)"


def test_the_opening_of_a_short_answer_is_no_attack(
    monkeypatch: pytest.MonkeyPatch, reward: FeatureReward, loaded: LoadedModel
) -> None:
    """Of an answer of three tokens the opener is the answer: right ones would be compared with themselves."""
    asked = read_words(monkeypatch)
    short = [replace(row, completion_ids=row.completion_ids[4:7], logprobs=row.logprobs[4:7]) for row in responses()]
    found = attack(reward, short, scores(short), loaded)
    assert [a.name for a in found.attacks] == ["empty", "injected", "repeated"]
    assert found.left_out == {"opener": "no right answer has more than 8 tokens"}
    # One right answer is long enough: it alone gives an opener, and one of eight tokens does not.
    rows = [*short, responses()[0], replace(responses()[2], completion_ids=(20, 21, 22, 23, 7, 8, 9, 24))]
    found = attack(reward, rows, scores(rows), loaded)
    assert {a.name: a.n for a in found.attacks}["opener"] == 1 and found.left_out == {}
    assert [10, 21, 22, 23] in asked[-1]


def test_a_string_without_a_readable_token_is_paid_nothing(
    monkeypatch: pytest.MonkeyPatch, reward: FeatureReward, loaded: LoadedModel
) -> None:
    read_words(monkeypatch, unreadable=[EOS])
    rows = responses()
    empty = attack(reward, rows, scores(rows), loaded).attacks[0]
    assert (empty.median, empty.reaches) == (-np.inf, False)


def test_strings_are_scored_by_the_reward_itself(reward: FeatureReward, loaded: LoadedModel) -> None:
    rows = [(response, list(response.completion_ids)) for response in responses()[:6]]
    prompts, completions = [list(r.prompt_ids) for r, _ in rows], [ids for _, ids in rows]
    h_BTD, mask_BT = read_residuals(loaded.model, prompts, completions, LAYER)
    np.testing.assert_allclose(score_rows(reward, rows, loaded), reward.compute(h_BTD, mask_BT), rtol=1e-4, atol=1e-5)


REACHED = Attacks(1.0, 0.0, (Attack("empty", 2.0, 16, reaches=True),))


def test_the_verdict_with_attacks() -> None:
    passed, failed = Judgement("pass", "good"), Judgement("fail", "bad")
    held = Attacks(1.0, 0.0, (Attack("empty", 0.5, 16, reaches=False),))
    assert with_attacks(passed, held) == passed and with_attacks(passed, None) == passed
    words = "adversarial strings: empty (2) reaches the median of right answers (1)"
    assert with_attacks(passed, REACHED) == Judgement("fail", words)
    assert with_attacks(failed, REACHED) == Judgement("fail", f"bad; {words}")
    assert with_attacks(Judgement("inconclusive", "few", 900), REACHED) == Judgement("fail", words, None)
