"""Repairs against greedy decoding written out by hand, the numbers of a summary, and which half has a say in what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import pytest
from scipy.stats import binomtest

from mechreward.chains import Roller, decompose, step_of
from mechreward.errors import InputError
from mechreward.gates.statistics import mcnemar_p
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.steering import Cut, RepairConfig, Variant, find_cuts, kept_repairs, repair, repair_known, summarise
from mechreward.steering.repair import Attempt, load_repairs, save_repairs
from mechreward.steering.repair_known import set_edits, steering_features
from mechreward.tasks import Question, load_questions, split_questions
from mechreward.verifiers import Verdict, gsm8k_exact_match

FEATURES = {3: 4.0, 17: 3.0, 30: 0.0}
LENGTH = 14


def even(_prompt: str, completion: str, _answer: str) -> Verdict:
    return Verdict(len(completion) % 2 == 0, completion, "", True)


def change(acts_NF):
    for feature, value in FEATURES.items():
        acts_NF[:, feature] = value
    return acts_NF


@pytest.fixture
def roller(llama) -> Roller:
    return Roller(llama, [Question(f"q{i}", "x", "1") for i in range(3)], even, LENGTH, temperature=0.0)


def chains(roller: Roller) -> list[Response]:
    prompts = [(0, 10, 11), (0, 10, 11, 12, 13), (0, 40)]
    texts = ["ab. cd. e", "x. y. zz", "12\n3. 4"]
    ids = [roller.loaded.tokenizer(text)["input_ids"] for text in texts]
    return [
        Response(f"q{i}", i + 5, prompt, tuple(row), text, (-1.0,) * len(row), "length", False)
        for i, (prompt, row, text) in enumerate(zip(prompts, ids, texts, strict=True))
    ]


@pytest.fixture
def variant(llama, llama_sae) -> Variant:
    edited = Variant(llama, llama_sae)
    edited.set(FEATURES, mode="pin", unit="raw")
    return edited


@pytest.mark.parametrize("span", ["rest", "step"])
def test_arms_are_greedy_decoding_by_hand(span, roller, variant, hand, llama, llama_sae) -> None:
    wrong, cuts = chains(roller), [Cut(4), Cut(0), Cut(3, (0.5,))]
    attempts = repair(variant, roller, wrong, cuts, tries=1, span=span)
    moved = 0
    for response, cut, attempt in zip(wrong, cuts, attempts, strict=True):
        kept = [*response.completion_ids[: cut.token]]
        start = [*response.prompt_ids, *kept]
        plain = kept + hand.greedy(llama, llama_sae, lambda acts: acts, start, LENGTH - cut.token)
        steered = kept + hand.greedy(llama, llama_sae, change, start, LENGTH - cut.token, completion_only=True)
        if span == "step":
            steps = decompose(llama.tokenizer, steered)
            kept = steered[: steps[step_of(steps, cut.token)].token_end]
            rest = [*response.prompt_ids, *kept]
            if len(kept) < LENGTH and kept[-1] != 1:
                steered = kept + hand.greedy(llama, llama_sae, lambda acts: acts, rest, LENGTH - len(kept))
        assert [list(r.completion_ids) for r in attempt.arms["resampled"]] == [plain]
        assert [list(r.completion_ids) for r in attempt.arms["steered"]] == [steered]
        assert attempt.arms["random"][0].completion_ids[: cut.token] == response.completion_ids[: cut.token]
        assert (attempt.wrong, attempt.cut, json.loads(attempt.edits)) == (response, cut, variant.json())
        for arm in attempt.arms.values():
            assert arm[0].correct == (len(arm[0].text) % 2 == 0)
        moved += plain != steered
    assert moved
    assert any(a.arms["random"][0].completion_ids != a.arms["steered"][0].completion_ids for a in attempts)


def attempt(question: str, rights: dict[str, Sequence[bool]]) -> Attempt:
    wrong = Response(question, 7, (0,), (4, 5, 6), "wrong", (-1.0,) * 3, "eos", False)
    arms = {
        arm: [
            replace(wrong, sample=k, correct=right, completion_ids=(4, 10 + k), text=f"{arm}{k}")
            for k, right in enumerate(row)
        ]
        for arm, row in rights.items()
    }
    return Attempt(wrong, Cut(1, (0.5, 0.05, 0.9)), "{}", arms)


def cases() -> list[Attempt]:
    yes, no, late = (True, True), (False, False), (False, True)
    steered = [late] * 6 + [yes, no, no]
    resampled = [no] * 5 + [yes, yes, late, no]
    return [
        attempt(f"q{i}", {"steered": s, "resampled": r, "random": no})
        for i, (s, r) in enumerate(zip(steered, resampled, strict=True))
    ]


def test_summary_in_exact_numbers() -> None:
    found = summarise(cases())
    assert (found["n_chains"], found["n_questions"]) == (9, 9)
    arms = found["arms"]
    assert [arms[arm]["repaired"] for arm in ("steered", "resampled", "random")] == [7, 3, 0]
    assert arms["steered"]["share"] == pytest.approx(7 / 9)
    # Wilson's interval by its formula: z = 1.959964.
    assert arms["steered"]["interval"] == pytest.approx([0.45259, 0.93678], abs=1e-4)
    assert [arms[arm]["tries"]["share"] for arm in arms] == pytest.approx([8 / 18, 5 / 18, 0.0])
    assert arms["steered"]["tries"]["n"] == 18
    against = found["steered_against"]
    # 5 chains only steering repairs, 1 only drawing again.
    assert against["resampled"]["mcnemar_p"] == pytest.approx(binomtest(1, 6).pvalue)
    assert against["random"]["mcnemar_p"] == pytest.approx(binomtest(0, 7).pvalue)
    assert against["resampled"]["tries"]["difference"] == pytest.approx(3 / 18)
    assert against["random"]["tries"]["difference"] == pytest.approx(8 / 18)
    with pytest.raises(InputError, match="2 before and 1 after"):
        mcnemar_p([True, False], [True])


def test_only_verified_repairs_by_steering_are_kept(tmp_path) -> None:
    kept = kept_repairs(cases())
    assert [one.question_id for one in kept] == [f"q{i}" for i in range(7)]
    assert [one.repaired_text for one in kept] == ["steered1"] * 6 + ["steered0"]
    assert {one.sample for one in kept} == {7} and {one.cut for one in kept} == {1}
    pair = kept[0].pair()
    assert (pair.right_ids, pair.wrong_ids, pair.wrong_scores) == ((4, 11), (4, 5, 6), (0.5, 0.05, 0.9))
    save_repairs(tmp_path / "r.parquet", kept)
    assert load_repairs(tmp_path / "r.parquet") == kept
    (tmp_path / "half.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:200])
    for name in ("half.parquet", "none.parquet"):
        with pytest.raises(InputError, match="not a whole Parquet file"):
            load_repairs(tmp_path / name)


def test_bad_input(roller, variant, llama, llama_sae) -> None:
    wrong, cuts = chains(roller), [Cut(0)] * 3
    with pytest.raises(InputError, match="variant: it has no edits"):
        repair(Variant(llama, llama_sae), roller, wrong, cuts)
    with pytest.raises(InputError, match="span: 'all' is not known; use one of step, rest"):
        repair(variant, roller, wrong, cuts, tries=1, span="all")
    with pytest.raises(InputError, match="2 are given for 3 responses"):
        repair(variant, roller, wrong, cuts[:2], tries=1)
    with pytest.raises(InputError, match="has correct=True"):
        repair(variant, roller, [replace(wrong[0], correct=True)], cuts[:1], tries=1)
    with pytest.raises(InputError, match="critical: 'guess' is not known"):
        find_cuts(roller, wrong, "guess")
    with pytest.raises(InputError, match="q0 has no worked solution; use critical rollouts or contrast"):
        find_cuts(roller, wrong, "solution")
    with pytest.raises(InputError, match="tries: 0 is too small"):
        RepairConfig(tries=0)
    with pytest.raises(InputError, match="when: 'never' is not known"):
        RepairConfig(when="never")


@pytest.fixture(scope="module")
def known(reasoner):
    questions = load_questions("tiny:easy", limit=40, seed=3)
    drawn = sample_responses(reasoner, questions, n=6, max_new_tokens=80, seed=1)
    return questions, verify_responses(drawn, questions, gsm8k_exact_match)


def test_each_half_is_steered_by_what_the_other_half_has_shown(known, reasoner, reasoner_sae) -> None:
    questions, responses = known
    roller = Roller(reasoner, questions, gsm8k_exact_match, 80, seed=2)
    config = RepairConfig(critical="solution", tries=2, chains=8, n_features=4, pooling="step_end:.")
    attempts = repair_known(roller, reasoner_sae, responses, config)
    assert 4 <= len(attempts) <= 8 and len({a.wrong.question_id for a in attempts}) == len(attempts)
    halves = split_questions(questions, 0.5, 2)
    for half, other in (halves, halves[::-1]):
        mine = {question.id for question in half}
        (edits,) = {a.edits for a in attempts if a.wrong.question_id in mine}
        others = [r for r in responses if r.question_id in {question.id for question in other}]
        expected = Variant(reasoner, reasoner_sae, where="completion")
        expected.calibrate(others)
        right, wrong = steering_features(expected, others, config)
        expected.set(dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0), mode="pin")
        assert json.loads(edits) == expected.json() and right and not set(right) & set(wrong)
    for a in attempts:
        # The cut stands before the first wrong step: what is kept agrees with the solution, the next step does not.
        solution = next(q.solution for q in questions if q.id == a.wrong.question_id)
        head = reasoner.tokenizer.decode(a.wrong.completion_ids[: a.cut.token])
        assert solution.startswith(head) and not solution.startswith(decompose_first(reasoner, a))
        for tries in a.arms.values():
            assert [t.sample for t in tries] == [0, 1]
            assert all(t.completion_ids[: a.cut.token] == a.wrong.completion_ids[: a.cut.token] for t in tries)


def decompose_first(reasoner, a: Attempt) -> str:
    steps = decompose(reasoner.tokenizer, a.wrong.completion_ids)
    return reasoner.tokenizer.decode(a.wrong.completion_ids[: steps[step_of(steps, a.cut.token)].token_end])


def test_steering_under_a_condition(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.calibrate(chains(Roller(llama, [], even, LENGTH)))
    fired = [int(i) for i in range(48) if variant.scales.p99_F[i] > 0][:3]
    set_edits(variant, fired[:1], fired[1:], RepairConfig(when="wrong", strength=0.5))
    (rule,) = variant.rules
    assert rule.condition.features() == set(fired[1:]) and rule.features() == set(fired)
    assert {edit.feature: edit.value for edit in rule.edits} == {fired[0]: 0.5, fired[1]: 0.0, fired[2]: 0.0}
    with pytest.raises(InputError, match="when: wrong needs features of wrong chains"):
        set_edits(Variant(llama, llama_sae), fired[:1], [], RepairConfig(when="wrong"))


def test_nothing_to_repair(known, reasoner, reasoner_sae) -> None:
    questions, responses = known
    roller = Roller(reasoner, questions, gsm8k_exact_match, 80)
    with pytest.raises(InputError, match="none of .* is wrong with a critical token"):
        repair_known(roller, reasoner_sae, [r for r in responses if r.correct], RepairConfig())
    stray = replace(responses[0], question_id="u1")
    with pytest.raises(InputError, match="question u1 is not among the KNOWN questions"):
        repair_known(roller, reasoner_sae, [stray], RepairConfig())


def test_without_features_no_critical_token_is_looked_for(known, reasoner, reasoner_sae, monkeypatch) -> None:
    questions, responses = known
    roller = Roller(reasoner, questions, gsm8k_exact_match, 80)
    few = responses[: 6 * 6]
    room = import_module("mechreward.steering.repair_known")
    monkeypatch.setattr(room, "find_cuts", lambda *_, **__: pytest.fail("rollouts before features"))
    with pytest.raises(InputError, match="features: "):
        repair_known(roller, reasoner_sae, few, RepairConfig())
