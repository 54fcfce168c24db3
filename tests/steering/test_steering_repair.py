"""Repairs against greedy decoding written out by hand, the numbers of a summary, and which half has a say in what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from mechreward.chains import ContrastiveConfig, Lost, Roller, decompose, step_of
from mechreward.errors import InputError
from mechreward.features import ContrastTable, NoFeatures
from mechreward.gates import accuracy_interval
from mechreward.gates.statistics import mcnemar_p
from mechreward.rollout import Response, continue_responses, sample_responses, verify_responses
from mechreward.steering import Cut, RepairConfig, Variant, find_cuts, kept_repairs, repair, repair_known, summarise
from mechreward.steering.program import random_rows
from mechreward.steering.repair import Attempt, _step_end, load_repairs, save_repairs
from mechreward.steering.repair_known import set_edits, steering_features, wrong_chains
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
    with pytest.raises(InputError, match="solution needs worked solutions, and question q0 has none; use rollouts or"):
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


def test_a_response_without_text_has_no_cut(roller, known, reasoner) -> None:
    wrong = chains(roller)
    silent = replace(wrong[0], completion_ids=(1,), logprobs=(-1.0,), text="", finish="eos")
    plain = find_cuts(roller, wrong, "rollouts", rollouts=1)
    assert find_cuts(roller, [silent, *wrong], "rollouts", rollouts=1) == [None, *plain]
    assert find_cuts(roller, [silent], "rollouts", rollouts=1) == [None]
    questions, responses = known
    on_tiny = Roller(reasoner, questions, gsm8k_exact_match, 80)
    lost = [response for response in responses if not response.correct][:2]
    silent = replace(lost[0], completion_ids=(reasoner.tokenizer.eos_token_id,), logprobs=(-1.0,), text="")
    cuts = find_cuts(on_tiny, [lost[0], silent, lost[1]], "solution")
    assert cuts == [find_cuts(on_tiny, lost[:1], "solution")[0], None, find_cuts(on_tiny, lost[1:], "solution")[0]]
    assert any(cuts)


def test_one_question_is_compared_with_nothing() -> None:
    found = summarise(cases()[:1])
    assert found["n_questions"] == 1 and found["steered_against"] == {"resampled": None, "random": None}
    assert found["arms"]["steered"]["repaired"] == 1


def test_intervals_of_tries_are_clustered_by_question() -> None:
    found, attempts = summarise(cases()), cases()
    right = [bool(r.correct) for a in attempts for r in a.arms["resampled"]]
    questions = [a.wrong.question_id for a in attempts for _ in a.arms["resampled"]]
    by_question, each = accuracy_interval(right, questions), accuracy_interval(right, [str(i) for i in range(18)])
    assert found["arms"]["resampled"]["tries"]["interval"] == [by_question.low, by_question.high]
    assert (by_question.low, by_question.high) != (each.low, each.high)


def test_repairs_of_other_columns_are_refused(tmp_path) -> None:
    path = tmp_path / "r.parquet"
    save_repairs(path, kept_repairs(cases()))
    pd.read_parquet(path).assign(mood="good").to_parquet(path)
    with pytest.raises(InputError, match="^repairs: .* has the columns .*'mood'.*; it must have"):
        load_repairs(path)


def test_a_try_without_text_has_nothing_more_to_write(roller) -> None:
    silent = replace(chains(roller)[0], completion_ids=(1,), logprobs=(-1.0,), text="")
    assert _step_end(roller, silent, 0) == 1


def test_the_random_arm_is_the_edits_along_random_rows_of_the_seed(roller, variant, hand, llama, llama_sae) -> None:
    seeded = replace(roller, seed=7)
    turned = llama_sae.W_dec_FD.clone()
    turned[sorted(FEATURES)] = random_rows(llama_sae, sorted(FEATURES), 7)
    along = replace(llama_sae, W_dec_FD=turned)
    for a in repair(variant, seeded, chains(roller), [Cut(4), Cut(0), Cut(3)], tries=1, span="rest"):
        kept = [*a.wrong.completion_ids[: a.cut.token]]
        start = [*a.wrong.prompt_ids, *kept]
        wanted = kept + hand.greedy(llama, along, change, start, LENGTH - len(kept), completion_only=True)
        assert [list(r.completion_ids) for r in a.arms["random"]] == [wanted]


def test_tries_are_drawn_with_the_seed_of_the_roller(roller, variant) -> None:
    seeded = replace(roller, seed=7, temperature=1.0)
    wrong, starts = chains(roller), [4, 0, 3]
    drawn = continue_responses(roller.loaded, wrong, starts, n=2, max_new_tokens=LENGTH, temperature=1.0, seed=7)
    for a, group in zip(repair(variant, seeded, wrong, [Cut(t) for t in starts], tries=2), drawn, strict=True):
        assert [r.completion_ids for r in a.arms["resampled"]] == [r.completion_ids for r in group]


def test_a_condition_holds_where_any_feature_of_wrong_chains_fires_by_a_tenth(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.calibrate(chains(Roller(llama, [], even, LENGTH)))
    first, second, third = [int(i) for i in range(48) if variant.scales.p99_F[i] > 0][:3]
    set_edits(variant, [first], [second, third], RepairConfig(when="wrong"))
    shares = {first: [9, 0, 0, 0, 0], second: [0, 0.09, 0.11, 0, 0.5], third: [0, 0.09, 0, 0.11, 0.5]}
    acts = {f: torch.tensor(row) * variant.scales.unit(f) for f, row in shares.items()}
    assert variant.rules[0].condition.holds(acts).tolist() == [False, False, True, True, True]


def test_features_of_both_kinds_are_chosen_apart(llama, llama_sae, monkeypatch) -> None:
    """The largest effects are all of wrong answers; none of right ones is cut away for them."""
    room = import_module("mechreward.steering.repair_known")
    effects = [-9.0, -8.0, -7.0, -6.0, 2.0, 1.5, 1.0, 3.0]
    columns = {"id": range(8), "effect": effects, "q_value": 0.01, "stability": [1.0] * 7 + [0.1], "scale": 1.0}
    tables = [ContrastTable(pd.DataFrame(columns), 9, 9, 90, method="contrast")]
    monkeypatch.setattr(room, "discover", lambda *_, **__: tables[-1])
    variant, choose = Variant(llama, llama_sae), steering_features
    assert choose(variant, [], RepairConfig(n_features=4)) == ([4, 5], [0, 1])
    assert choose(variant, [], RepairConfig(n_features=3)) == ([4, 5], [0])
    assert choose(variant, [], RepairConfig(n_features=1)) == ([4], [])
    tables.append(replace(tables[0], frame=tables[0].frame.assign(effect=[-abs(effect) for effect in effects])))
    with pytest.raises(NoFeatures, match="^features: all 7 that are significant and stable go with wrong answers"):
        choose(variant, [], RepairConfig(n_features=2))


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"span": "x"}, "span: 'x' is not known"),
        ({"critical": "x"}, "critical: 'x' is not known"),
        ({"strength": -1.0}, "strength: -1.0 is not allowed"),
        ({"pooling": "zzz"}, "pooling: 'zzz' is not one of"),
    ],
)
def test_settings_of_a_repair_are_checked_when_they_are_made(field, sentence) -> None:
    with pytest.raises(InputError, match=f"^{sentence}"):
        RepairConfig(**field)


def test_no_more_chains_are_tried_than_asked_for(llama) -> None:
    questions = [Question(f"q{i}", f"x{i}", "1") for i in range(12)]
    roller = Roller(llama, questions, even, LENGTH)
    halves = [{q.id for q in half} for half in split_questions(questions, 0.5, 0)]
    wrong = [Response(q.id, k, (0,), (4, k), "w", (-1.0,) * 2, "eos", False) for q in questions for k in (1, 2)]
    for most, wanted in ((1, (1, 0)), (2, (1, 1)), (5, (3, 2)), (99, (6, 6))):
        found = wrong_chains(roller, wrong, most)
        assert tuple(map(len, found)) == wanted
        assert all(
            r.question_id in ids and r.sample == 1 for side, ids in zip(found, halves, strict=True) for r in side
        )
    few = [r for r in wrong if r.question_id in halves[1]]
    assert tuple(map(len, wrong_chains(roller, few, 5))) == (0, 5)


def test_what_is_asked_for_reaches_the_arms(known, reasoner, reasoner_sae, monkeypatch) -> None:
    questions, responses = known
    room = import_module("mechreward.steering.repair_known")
    asked = []

    def cuts(_roller, wrong, critical, **options):
        asked.append((critical, options["rollouts"], options["contrastive"]))
        assert {r.question_id for r in wrong}.isdisjoint(r.question_id for r in options["others"])
        return [None, *[Cut(0)] * (len(wrong) - 1)]

    def repaired(_variant, _roller, wrong, cuts, **options):
        asked.append(options)
        return [Attempt(response, cut, "{}", {}) for response, cut in zip(wrong, cuts, strict=True)]

    monkeypatch.setattr(room, "_steered_by", lambda *_: Variant(reasoner, reasoner_sae))
    monkeypatch.setattr(room, "find_cuts", cuts)
    monkeypatch.setattr(room, "repair", repaired)
    contrastive = ContrastiveConfig(epochs=3)
    config = RepairConfig(critical="contrast", rollouts=5, contrastive=contrastive, tries=7, span="rest", chains=6)
    tried = repair_known(Roller(reasoner, questions, even, 80), reasoner_sae, responses, config)
    assert asked == [("contrast", 5, contrastive), {"tries": 7, "span": "rest"}] * 2 and len(tried) == 4
    for response in (a.wrong for a in tried):
        lost = [r for r in responses if r.question_id == response.question_id and r.correct is False]
        assert response == lost[0]


def test_a_cut_by_contrast_is_the_first_token_below_a_tenth_with_all_its_scores(roller, monkeypatch) -> None:
    room, asked = import_module("mechreward.steering.cuts"), []
    scores = [[0.5, 0.1, 0.0999, 0.01], [0.2, 0.3], [0.05, 0.9]]

    class Pair:
        def scores(self, told):
            asked.append(told)
            return scores[: len(told)]

    @contextmanager
    def pair(*given):
        asked.append(given)
        yield Pair()

    monkeypatch.setattr(room, "contrastive_pair", pair)
    wrong, config = chains(roller), ContrastiveConfig(epochs=3)
    silent = replace(wrong[0], completion_ids=(1,), logprobs=(-1.0,), text=" ")
    others = [replace(wrong[0], question_id="q9")]
    cuts = find_cuts(roller, [wrong[0], silent, *wrong[1:]], "contrast", others=others, contrastive=config)
    assert cuts == [Cut(2, tuple(scores[0])), None, None, Cut(0, tuple(scores[2]))]
    assert asked == [(roller.loaded, others, config), wrong]


def test_rollouts_a_place_are_as_many_as_asked_for(roller, monkeypatch) -> None:
    room, asked = import_module("mechreward.steering.cuts"), []

    def lost(_roller, told, steps, n):
        asked.append((len(told), len(steps), n))
        return [None, Lost(4, 1, ()), Lost(0, 0, ())]

    monkeypatch.setattr(room, "rollout_critical", lost)
    assert find_cuts(roller, chains(roller), "rollouts", rollouts=5) == [None, Cut(4), Cut(0)]
    assert asked == [(3, 3, 5)]


def test_what_was_not_verified_is_no_wrong_chain(llama) -> None:
    questions = [Question(f"q{i}", f"x{i}", "1") for i in range(4)]
    given = [Response(q.id, 0, (0,), (4, 5), "w", (-1.0,) * 2, "eos", None) for q in questions]
    assert wrong_chains(Roller(llama, questions, even, LENGTH), given, 9) == ([], [])


def test_solutions_are_missed_before_anything_is_read(llama, llama_sae, monkeypatch) -> None:
    room = import_module("mechreward.steering.repair_known")
    monkeypatch.setattr(room, "_steered_by", lambda *_: pytest.fail("features before solutions"))
    questions = [Question(f"q{i}", f"x{i}", "1") for i in range(4)]
    given = [Response(q.id, 0, (0,), (4, 5), "w", (-1.0,) * 2, "eos", False) for q in questions]
    with pytest.raises(InputError, match="^critical: solution needs worked solutions, and question q0 has none"):
        repair_known(Roller(llama, questions, even, LENGTH), llama_sae, given, RepairConfig(critical="solution"))


@pytest.mark.parametrize("name", ["rollouts", "tries", "n_features", "chains"])
def test_counts_of_a_repair_are_at_least_1_and_its_strength_is_finite(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: 0 is too small; it must be at least 1$"):
        RepairConfig(**{name: 0})
    for bad in (0.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="^strength: .* is not allowed; it must be above 0, and finite$"):
            RepairConfig(strength=bad)


def test_tries_are_drawn_in_the_batches_of_the_roller(roller, variant, monkeypatch) -> None:
    room, asked = import_module("mechreward.steering.repair"), []

    def draw(loaded, responses, starts, **options):
        asked.append((options["batch_size"], options["max_new_tokens"], options["n"]))
        return continue_responses(loaded, responses, starts, **options)

    monkeypatch.setattr(room, "continue_responses", draw)
    repair(variant, replace(roller, batch_size=2, temperature=1.0), chains(roller), [Cut(4), Cut(0), Cut(3)], tries=2)
    assert asked == [(2, LENGTH, 2), (2, LENGTH, 1), (2, LENGTH, 2), (2, LENGTH, 2), (2, LENGTH, 1)]


def test_a_step_that_cannot_be_written_anew_ends_where_it_was_cut(roller) -> None:
    response = chains(roller)[0]
    assert _step_end(roller, response, len(response.completion_ids)) == len(response.completion_ids)
    assert [_step_end(roller, response, cut) for cut in (0, 4)] == [3, 7]
