"""Conditions, handles, rules and programs: by hand, and against decode differences on every kind of SAE."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.steering import Feature, FeatureGroup, Variant
from mechreward.steering.conditions import condition_from_json
from mechreward.steering.edits import Edit, make_edits
from mechreward.steering.features import feature_ids, strengths
from mechreward.steering.hook import Prefixes, unnested
from mechreward.steering.program import compile_rules, random_rows

F, G = Feature(3), Feature(5)
ACTS = {3: torch.tensor([0.0, 0.6, 0.5, 2.0]), 5: torch.tensor([0.05, 0.05, 0.5, 3.0])}
TRUTHS = [
    (F > 0.5, [0, 1, 0, 1]),
    (F >= 0.5, [0, 1, 1, 1]),
    (F < 0.5, [1, 0, 0, 0]),
    (F <= 0.5, [1, 0, 1, 0]),
    (F > G, [0, 1, 0, 0]),
    ((F > 0.5) & (G < 0.1), [0, 1, 0, 0]),
    ((F > 0.5) | (G < 0.1), [1, 1, 0, 1]),
    (~(F > 0.5) & ((G > 0.1) | (F < 0.1)), [1, 0, 1, 0]),
    ((F > 0.5) | (G > 0.1) & (F < 0.1), [0, 1, 0, 1]),
]


@pytest.mark.parametrize(("condition", "truth"), TRUTHS, ids=[str(condition) for condition, _ in TRUTHS])
def test_conditions_by_hand(condition, truth) -> None:
    assert condition.holds(ACTS).int().tolist() == truth
    assert condition_from_json(json.loads(json.dumps(condition.to_json()))) == condition
    doubled = condition.scaled(lambda feature: {3: 2.0, 5: 2.0}[feature])
    assert doubled.holds({key: 2 * value for key, value in ACTS.items()}).int().tolist() == truth
    assert condition_from_json(json.loads(json.dumps(doubled.to_json()))) == doubled


def test_each_side_has_its_own_unit() -> None:
    scaled = (F > G).scaled(lambda feature: {3: 1.0, 5: 0.1}[feature])
    assert scaled.holds({3: torch.tensor([0.6]), 5: torch.tensor([0.05])}).tolist() == [True]
    assert scaled.holds({3: torch.tensor([0.4]), 5: torch.tensor([0.05])}).tolist() == [False]
    assert scaled.features() == {3, 5} and ((F > 1) | ~(G > 2)).features() == {3, 5}


def test_what_python_would_drop_is_refused() -> None:
    with pytest.raises(InputError, match="no truth value"):
        _ = 0.1 < F < 0.5
    with pytest.raises(InputError, match="no truth value"):
        _ = (F > 0.5) and (G > 0.5)
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="no threshold"):
            F > bad  # noqa: B015, SIM300
    for bad in ({"every": []}, {"left": [3, 1.0], "op": "=", "right": 1.0}, {"not": 3}, {"some": [], "x": 1}, None):
        with pytest.raises(InputError, match="condition:"):
            condition_from_json(bad)


def test_groups_are_ordered_sets() -> None:
    a, b = (FeatureGroup(tuple(map(Feature, ids))) for ids in ([4, 2, 4, 9], [9, 1, 2]))
    assert a.ids == [4, 2, 9] and (a | b).ids == [4, 2, 9, 1] and (a & b).ids == [2, 9] and (a - b).ids == [4]
    assert a.pick([2, 0]).ids == [9, 4] and a[1:].ids == [2, 9] and len(a) == 3


@pytest.mark.parametrize("named", [-1, 48, [3, 48], (5, -2)])
def test_features_out_of_range(named) -> None:
    with pytest.raises(InputError, match=r"is not a feature of this SAE; ids go from 0 to 47"):
        feature_ids(named, 48)


def test_strengths() -> None:
    assert strengths([3, F, Feature(7)], 2, 48) == {3: 2.0, 7: 2.0}
    assert strengths({F: 1.5, 4: 2.0}, None, 48) == {3: 1.5, 4: 2.0}
    for bad in (({3: 1.0, F: 2.0}, None), ({3: 1.0}, 2.0), (3, None), (3, math.nan), ([], 1.0), (3, math.inf)):
        with pytest.raises(InputError):
            strengths(*bad, 48)


KINDS = [
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"input_norm": "layer_norm"}),
    ("topk", {"input_norm": "constant_norm_rescale", "rescale_acts_by_decoder_norm": True}),
    ("relu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("gated", {"input_norm": "layer_norm"}),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_change_is_a_difference_of_decodings(kind, llama, hand) -> None:
    """Nudge 7 and 30, pin 3, halve 11, then under a condition pin 7 and scale 11: rule after rule, on what was left."""
    sae = hand.make_sae(llama, kind[0], **kind[1])
    variant = Variant(llama, sae)
    variant.set({7: 1.5, 30: -0.5}, unit="raw")
    variant.set(3, 2.0, mode="pin", unit="raw")
    variant.set(11, 0.5, mode="scale")
    variant.set_when(variant.feature(20) > 0.1, 7, 0.25, mode="scale", unit="raw")
    variant.set_when(variant.feature(20) <= 0.1, {11: 4.0, 7: 9.0}, mode="pin", unit="raw")
    h_ND = torch.randn(60, 32, generator=torch.Generator().manual_seed(2)) * 2
    if kind[1].get("input_norm", "none") == "none":
        h_ND = h_ND * sae.W_dec_FD.std() / 1.2
    acts_NF = sae.encode(h_ND)
    wanted_NF = acts_NF.clone()
    for before, after in zip(acts_NF, wanted_NF, strict=True):
        after[7] += 1.5
        after[30] -= 0.5
        after[3] = 2.0
        after[11] *= 0.5
        if before[20] > 0.1:
            after[7] *= 0.25
        else:
            after[11], after[7] = 4.0, 9.0
    assert 3 < (acts_NF[:, 20] > 0.1).sum() < 57
    program = compile_rules(sae, variant.rules)
    wanted_ND = sae.decode(wanted_NF, h_ND) - sae.decode(acts_NF, h_ND)
    got_ND = program.change(h_ND, program.acts(h_ND))
    torch.testing.assert_close(got_ND, wanted_ND, rtol=1e-3, atol=1e-4 * float(wanted_ND.abs().max()))
    back = program.change(h_ND, program.acts(h_ND)) + compile_rules(sae, variant.rules, (), "wrong_sign").change(
        h_ND, program.acts(h_ND)
    )
    assert back.abs().max() <= 1e-4 * wanted_ND.abs().max()


def test_a_nudge_of_a_normalised_sae_depends_on_the_residual(llama, hand) -> None:
    sae = hand.make_sae(llama, input_norm="layer_norm")
    variant = Variant(llama, sae)
    variant.set(3, 2.0, unit="raw")
    program = compile_rules(sae, variant.rules)
    assert program.read == () and program.constant_D is None
    h_ND = torch.randn(4, 32) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    wanted_ND = 2.0 * sae.W_dec_FD[3] * h_ND.std(-1, keepdim=True)
    torch.testing.assert_close(program.change(h_ND, program.acts(h_ND)), wanted_ND, rtol=1e-4, atol=1e-4)


def test_rules_that_hold_everywhere_are_run_as_one(llama, llama_sae) -> None:
    """Until a condition comes between them; the vectors are added up."""
    variant = Variant(llama, llama_sae)
    one, two = torch.arange(32.0), torch.ones(32)
    variant.set(3, 2.0, mode="pin", unit="raw")
    variant.add_vector(one)
    variant.set(11, 0.5, mode="scale")
    variant.add_vector(two)
    variant.set_when(variant.feature(20) > 0.1, 3, 7.0, unit="raw")
    variant.set(20, 1.0, unit="raw")
    variant.add_vector(three := torch.arange(32.0).flip(0), variant.feature(20) > 0.1, unit="raw")
    program = compile_rules(llama_sae, variant.rules)
    assert [step.condition is None for step in program.steps] == [True, False, True, False]
    torch.testing.assert_close(program.steps[0].vector_D, one + two)
    h_ND = torch.randn(40, 32, generator=torch.Generator().manual_seed(3)) * llama_sae.W_dec_FD.std() * 2
    f_NF = llama_sae.encode(h_ND)
    held_N = f_NF[:, 20] > 0.1
    assert 0 < held_N.sum() < 40
    change = {3: 2.0 - f_NF[:, 3] + 7.0 * held_N, 11: -0.5 * f_NF[:, 11], 20: torch.ones(40)}
    wanted_ND = (
        one
        + two
        + held_N[:, None] * three
        + sum(delta_N[:, None] * llama_sae.W_dec_FD[f] for f, delta_N in change.items())
    )
    torch.testing.assert_close(program.change(h_ND, program.acts(h_ND)), wanted_ND, rtol=1e-4, atol=1e-4)


def test_a_nudge_is_not_read_for(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.set(3, 2.0, unit="raw")
    program = compile_rules(llama_sae, variant.rules)
    assert program.read == () and program.constant_D is not None
    torch.testing.assert_close(program.constant_D, 2.0 * llama_sae.W_dec_FD[3])
    variant.set_when(variant.feature(8) > 0.1, 4, 1.0, unit="raw")
    assert compile_rules(llama_sae, variant.rules).read == (8,)
    variant.set(5, 2.0, mode="scale")
    assert compile_rules(llama_sae, variant.rules).read == (5, 8)
    assert compile_rules(llama_sae, variant.rules).constant_D is None


@pytest.mark.parametrize("rescaled", [False, True])
def test_random_rows_have_the_norms_of_the_edited(rescaled, llama, hand) -> None:
    sae = hand.make_sae(llama, rescale_acts_by_decoder_norm=rescaled)
    rows = random_rows(sae, [3, 20, 7], seed=1)
    torch.testing.assert_close(rows.norm(dim=-1), sae.decoder_rows([3, 20, 7]).norm(dim=-1))
    others = torch.nn.functional.normalize(sae.W_dec_FD, dim=-1)
    best = (torch.nn.functional.normalize(rows, dim=-1) @ others.T).max(-1)
    torch.testing.assert_close(best.values, torch.ones(3))
    assert len(set(best.indices.tolist())) == 3 and not set(best.indices.tolist()) & {3, 20, 7}
    assert not torch.equal(rows, random_rows(sae, [3, 20, 7], seed=2))
    assert torch.equal(rows, random_rows(sae, [3, 20, 7], seed=1))
    with pytest.raises(InputError, match="only 8 other features"):
        random_rows(sae, range(40), seed=0)


def test_vectors_under_conditions_and_controls(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    vector = torch.arange(32.0)
    variant.add_vector(vector, variant.feature(3) > 0.2, unit="raw")
    h_ND = torch.randn(40, 32) * llama_sae.W_dec_FD.std() * 2
    held = llama_sae.encode(h_ND)[:, 3] > 0.2
    assert 0 < held.sum() < 40
    for control, sign in ((None, 1.0), ("wrong_sign", -1.0)):
        program = compile_rules(llama_sae, variant.rules, (), control)
        torch.testing.assert_close(program.change(h_ND, program.acts(h_ND)), sign * held[:, None] * vector)
    program = compile_rules(llama_sae, variant.rules, (), "random")
    norm_N = program.change(h_ND, program.acts(h_ND)).norm(dim=-1)
    torch.testing.assert_close(norm_N, held * vector.norm())
    for bad in (torch.ones(31), torch.full((32,), torch.nan)):
        with pytest.raises(InputError, match="vector: shape"):
            variant.add_vector(bad)


def test_prefixes_by_hand() -> None:
    known = Prefixes([[5, 6], [2, 2, 7]], pad_id=2)
    ids = torch.tensor([[2, 2, 5, 6, 9], [7, 9, 9, 9, 9], [5, 6, 2, 2, 2]])
    assert known.passed(ids).int().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    with pytest.raises(InputError, match="begins with none of the 2"):
        known.passed(torch.tensor([[6, 5, 5]]))
    with pytest.raises(InputError, match="a prefix of 3 tokens begins with another of 2"):
        Prefixes([[5, 6], [9], [5, 6, 7]], pad_id=2)
    for empty in ([], [[]], [[2, 2]]):
        with pytest.raises(InputError, match="no tokens"):
            Prefixes(empty, pad_id=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=8))
def test_groups_hold_no_nested_prefixes(rows: list[list[int]]) -> None:
    groups = unnested(rows)
    assert sorted(place for group in groups for place in group) == list(range(len(rows)))
    for group in groups:
        Prefixes([rows[place] for place in group], pad_id=-1)
    nested = any(a != b and b[: len(a)] == a for a in rows for b in rows)
    assert (len(groups) > 1) == nested


def test_random_rows_are_of_features_that_have_one(llama, hand) -> None:
    sae = hand.make_sae(llama)
    dead = torch.arange(48) % 4 > 0
    sae = replace(sae, W_dec_FD=sae.W_dec_FD.masked_fill(dead[:, None], 0.0))
    rows = random_rows(sae, [0, 4], seed=3)
    torch.testing.assert_close(rows.norm(dim=-1), sae.decoder_rows([0, 4]).norm(dim=-1))
    with pytest.raises(InputError, match="only 5 other features"):
        random_rows(sae, range(0, 28, 4), seed=0)


def test_a_random_control_turns_vectors_to_a_decoder_row(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.add_vector(vector := torch.arange(32.0))
    h_ND = torch.ones(1, 32)
    directions = []
    for seed in (1, 2):
        program = compile_rules(llama_sae, variant.rules, (), "random", seed)
        directions.append(program.change(h_ND, program.acts(h_ND))[0] / vector.norm())
    rows = torch.nn.functional.normalize(llama_sae.W_dec_FD, dim=-1)
    nearest = [int((rows @ direction).argmax()) for direction in directions]
    assert [float((rows @ d).max()) for d in directions] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert nearest[0] != nearest[1] and float(directions[0] @ vector / vector.norm()) < 0.99


def test_a_random_control_turns_vectors_where_the_first_feature_has_no_decoder_row(llama, llama_sae) -> None:
    dead = torch.arange(48) == 0
    sae = replace(llama_sae, W_dec_FD=llama_sae.W_dec_FD.masked_fill(dead[:, None], 0.0))
    variant = Variant(llama, sae)
    variant.add_vector(torch.arange(32.0))
    variant.set(7, 2.0, unit="raw")
    program = compile_rules(sae, variant.rules, (), "random", 1)
    turned = program.steps[0].vector_D
    assert float(turned.norm()) == pytest.approx(float(torch.arange(32.0).norm()))
    cosine = torch.nn.functional.normalize(sae.W_dec_FD, dim=-1) @ torch.nn.functional.normalize(turned, dim=0)
    assert float(cosine.max()) == pytest.approx(1.0) and int(cosine.argmax()) not in (0, 7)


def test_conditions_are_shown_as_they_were_written() -> None:
    assert str((F > 0.5) & ~(G < F)) == "((feature 3 > 0.5) & ~(feature 5 < feature 3))"
    assert str((F >= 2) | (G <= 0.25) | (F > G)) == (
        "(((feature 3 >= 2) | (feature 5 <= 0.25)) | (feature 3 > feature 5))"
    )


def test_truth_values_are_no_numbers() -> None:
    with pytest.raises(InputError, match="no threshold"):
        F > True  # noqa: B015
    for bad in ({"left": [3, True], "op": ">", "right": 1.0}, {"left": [3, 1.0], "op": ">", "right": True}):
        with pytest.raises(InputError, match="^condition: "):
            condition_from_json(bad)


def test_a_factor_has_no_unit() -> None:
    assert make_edits({3: 2.0}, "scale", {3: 5.0}) == (Edit(3, 2.0, "scale", 1.0),)
    assert make_edits({3: 2.0}, "pin", {3: 5.0}) == (Edit(3, 2.0, "pin", 5.0),)
