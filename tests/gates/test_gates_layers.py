"""The layer sweep: pooled states against plain forwards, probes against naive loops, and the bundled model's truth."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features.crossfit import dense_probe_scores
from mechreward.gates import Interval, LayerSweep, ProbeScore, ScoreRow, sweep_layers, within_question_auroc
from mechreward.gates.layers import (
    MIN_MIXED,
    POSITIONS,
    _ends_step,
    _pooled,
    chosen_apart,
    pooled_states,
    step_ends,
)
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL
from mechreward.verifiers import gsm8k_exact_match

# --- the bundled model: which strategy is followed is decided in block 2 -------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(str(MODEL))


@pytest.fixture(scope="module")
def answers(tiny: LoadedModel) -> list[Response]:
    questions = load_questions("tiny:easy", limit=30, seed=3)
    responses = sample_responses(tiny, questions, n=6, max_new_tokens=96, seed=3)
    return verify_responses(responses, questions, gsm8k_exact_match)


@pytest.fixture(scope="module")
def sweep(tiny: LoadedModel, answers: list[Response]) -> LayerSweep:
    return sweep_layers(tiny, answers, draws=500)


def value(sweep: LayerSweep, layer: int, position: str) -> float:
    (probe,) = [p for p in sweep.probes if (p.layer, p.position) == (layer, position)]
    return probe.within.value


def test_the_planted_block_is_found(sweep: LayerSweep) -> None:
    assert value(sweep, 2, "step end") > 0.98
    assert value(sweep, 0, "step end") < 0.65
    assert value(sweep, 0, "mean") < 0.9
    assert sweep.best.within.value > 0.99 and sweep.best.layer > 0
    assert 0 not in sweep.alike and 2 in (sweep.best.layer, *sweep.alike)
    assert sweep.chosen.low > 0.95
    assert sweep.beaten and sweep.verdict.startswith("Block ")
    assert [(p.layer, p.position) for p in sweep.probes] == [(b, p) for b in range(5) for p in POSITIONS]


def test_auroc_is_that_of_scikit_learn_question_by_question(
    tiny: LoadedModel, answers: list[Response], sweep: LayerSweep
) -> None:
    mixed = [r for r in answers if len({s.correct for s in answers if s.question_id == r.question_id}) == 2]
    right = np.array([r.correct for r in mixed], dtype=bool)
    names = np.array([r.question_id for r in mixed])
    scores = dense_probe_scores(pooled_states(tiny, mixed, [0])[0, "last"], right, names.tolist(), seed=0)
    wins = pairs = 0.0
    for name in set(names):
        own = names == name
        n_pairs = right[own].sum() * (~right[own]).sum()
        wins += n_pairs * roc_auc_score(right[own], scores[own])
        pairs += n_pairs
    assert value(sweep, 0, "last") == pytest.approx(wins / pairs)
    assert (sweep.n_mixed, sweep.n_responses) == (len(set(names)), len(mixed))
    assert {row.name for row in sweep.baselines} == {"mean log-probability", "length"}


def test_labels_dealt_anew_leave_no_block_that_beats_the_baselines(tiny: LoadedModel, answers: list[Response]) -> None:
    rng = random.Random(2)  # one draw of the null; with 1, block 2 reaches .65 by chance
    shuffled: list[Response] = []
    for start in range(0, len(answers), 6):
        group = answers[start : start + 6]
        labels = [response.correct for response in group]
        rng.shuffle(labels)
        shuffled += [replace(r, correct=label) for r, label in zip(group, labels, strict=True)]
    sweep = sweep_layers(tiny, shuffled, [1, 2], draws=500)
    assert not sweep.beaten
    assert sweep.verdict.startswith("No block beats the baselines. ")
    assert 0.3 < value(sweep, 2, "step end") < 0.7


def test_questions_that_are_not_mixed_change_nothing_but_their_count(
    tiny: LoadedModel, answers: list[Response], sweep: LayerSweep
) -> None:
    alike = [replace(r, question_id=f"easy {r.question_id}", correct=True) for r in answers]
    more = sweep_layers(tiny, answers + alike, [2, 0, 2], draws=500)
    assert more.probes == tuple(p for p in sweep.probes if p.layer in (0, 2))
    assert (more.n_questions, more.n_mixed) == (60, sweep.n_mixed)


def test_json(sweep: LayerSweep) -> None:
    record = json.loads(json.dumps(sweep.to_dict(), allow_nan=False))
    assert record["best"] == {"layer": sweep.best.layer, "position": sweep.best.position}
    assert record["alike"] == list(sweep.alike) and record["verdict"] == sweep.verdict
    assert [p["within"]["value"] for p in record["probes"]] == [p.within.value for p in sweep.probes]
    assert record["baselines"][1]["name"] == "length" and record["baselines"][1]["lead"]["low"] > 0


# --- by hand -----------------------------------------------------------------------------------------------------


def between(value: float, low: float, high: float) -> Interval:
    return Interval(value, low, high, 0.01)


def made(*probes: tuple[int, str, float, float, float], leads: tuple[float, ...] = (0.1, 0.2)) -> LayerSweep:
    rows = [ProbeScore(layer, position, between(*numbers)) for layer, position, *numbers in probes]
    half = between(0.6, 0.55, 0.65)
    lines = [ScoreRow(f"line {i}", half, half, between(lead + 0.05, lead, 1.0)) for i, lead in enumerate(leads)]
    return LayerSweep(tuple(rows), between(0.85, 0.7, 0.9), tuple(lines), 20, 15, 60, 2000, 0)


def test_best_and_alike() -> None:
    sweep = made(
        (0, "mean", 0.60, 0.50, 0.70),
        (1, "mean", 0.80, 0.74, 0.79),
        (1, "last", 0.90, 0.75, 0.95),
        (2, "mean", 0.90, 0.80, 0.99),
        (3, "mean", 0.70, 0.60, 0.75),
        (4, "mean", 0.70, 0.60, 0.749),
    )
    assert (sweep.best.layer, sweep.best.position) == (1, "last")  # of equal ones the lower block
    assert sweep.alike == (2, 3)  # .75 touches .75; block 1 itself is not listed
    assert sweep.verdict == (
        "Block 1 tells right from wrong best (last: AUROC within questions 0.900, 0.750 to 0.950); blocks 2, 3 have "
        "intervals that overlap its own. On questions that had no say in the choice of block it is AUROC within "
        "questions 0.850, 0.700 to 0.900; line 0 has AUROC within questions 0.600, 0.550 to 0.650."
    )


def test_each_baseline_has_to_be_beaten() -> None:
    row = (1, "mean", 0.9, 0.8, 0.95)
    assert made(row, leads=(0.01, 0.2)).beaten
    assert not made(row, leads=(0.2, 0.0)).beaten
    assert not made(row, leads=(-0.1, 0.2)).beaten
    assert made(row, leads=(0.2, 0.0)).verdict.startswith("No block beats the baselines. Block 1 tells")


def test_cross_fitted_equals_a_loop_over_folds() -> None:
    rng = np.random.default_rng(0)
    names = np.repeat([f"q{i}" for i in range(12)], 4)
    right = np.tile([True, False, False, True], 12)
    # The offset of each question is large, and has to go.
    states = (rng.normal(size=(48, 7)) + 100 * rng.normal(size=(12, 1)).repeat(4, axis=0)).astype(np.float32)
    states[:, 3] += 2 * right
    want = np.zeros(48)
    centred = states.astype(np.float64)
    for name in set(names):
        centred[names == name] -= centred[names == name].mean(0)
    for train, test in GroupKFold(5, shuffle=True, random_state=4).split(centred, groups=names):
        mean, spread = centred[train].mean(0), centred[train].std(0)
        probe = LogisticRegression(C=0.05, max_iter=500).fit((centred[train] - mean) / spread, right[train])
        want[test] = (centred[test] - mean) / spread @ probe.coef_[0] + probe.intercept_[0]
    got = dense_probe_scores(states, right, names.tolist(), seed=4)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_no_question_trains_its_own_probe() -> None:
    """More dimensions than answers and labels that mean nothing: fitted on its own answers a probe would reach 1."""
    values = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        right = np.tile([True, False], 30)
        names = [f"q{i // 4}" for i in range(60)]
        scores = dense_probe_scores(rng.normal(size=(60, 200)).astype(np.float32), right, names, seed=seed)
        values.append(roc_auc_score(right, scores))
    assert 0.4 < np.mean(values) < 0.6


def test_the_choice_is_made_on_the_other_half() -> None:
    """Two states that are right on one half of the questions and noise on the other: each half is scored by the one
    that is noise there."""
    names = [f"q{i}" for i in range(12) for _ in range(2)]
    right = np.array([True, False] * 12)
    first, second = (test for _, test in GroupKFold(2, shuffle=True, random_state=3).split(names, groups=names))
    good = np.where(right, 1.0, -1.0)
    on_first, on_second = np.random.default_rng(0).normal(size=(2, 24))
    on_first[first], on_second[second] = good[first], good[second]
    chosen = chosen_apart([0 * good[:, None], on_first[:, None], on_second[:, None]], right, names, seed=3)
    noise = np.where(np.isin(np.arange(24), first), on_second, on_first)
    lead, wanted = chosen[::2] - chosen[1::2], noise[::2] - noise[1::2]
    assert (np.sign(lead) == np.sign(wanted)).all() and 0 < (wanted > 0).sum() < 12
    # Fitted on the other half alone: states turned round there turn the scores.
    turned = np.where(np.isin(np.arange(24), first), good, -good)
    assert np.sign(chosen_apart([turned[:, None]], right, names, seed=3)).tolist() == (-good).tolist()


def test_the_choice_does_not_leak_through_the_probes() -> None:
    """Labels that mean nothing. Chosen among the table's scores, whose probes train on the other half, it is .56."""
    values = []
    names = [f"q{i // 6}" for i in range(72)]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        right = np.concatenate([rng.permutation([True, False] * 3) for _ in range(12)])
        states = [rng.normal(size=(72, 8)) for _ in range(12)]
        values.append(within_question_auroc(chosen_apart(states, right, names, seed=seed), right, names))
    assert np.mean(values) == pytest.approx(0.5, abs=0.03)


def test_pooled_by_hand() -> None:
    h_BTD = torch.tensor([[[1.0], [2.0], [6.0], [1e6]], [[3.0], [5.0], [0.0], [0.0]]])
    mask_BT = torch.tensor([[True] * 4, [True, True, False, False]])
    end_BT = torch.tensor([[True, False, True, True], [False] * 4])
    # Row 0: its fourth token is of massive norm, so its last is the third. Row 1 has no step end: its last token.
    pooled = {name: rows.tolist() for name, rows in _pooled(h_BTD, mask_BT, end_BT).items()}
    assert pooled == {"mean": [[3.0], [4.0]], "last": [[6.0], [5.0]], "step end": [[3.5], [5.0]]}


@pytest.mark.parametrize(
    ("piece", "after", "ends"),
    [
        ("▁.", "▁then", True),
        (".", "5", False),
        (".", "Ġ5", True),
        ("!", "", True),
        ("?", "▁", True),
        ("Ċ", "4", True),
        ("<0x0A>", "4", True),
        (".ĊĊ", "4", True),
        ("\n", "a", True),
        (",", "a", False),
        ("▁Ada", "▁has", False),
    ],
)
def test_what_ends_a_step(piece: str, after: str, ends: bool) -> None:
    assert _ends_step(piece, after) is ends


def test_step_ends_in_tokens(char_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = char_tokenizer("a.b 3.5\nc?d", add_special_tokens=False)["input_ids"]
    assert step_ends(char_tokenizer, ids) == [1, 7, 9]


def test_pooled_states_equal_plain_forwards(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = LoadedModel(tiny_llama, char_tokenizer, "tiny")
    texts = [("ab=", "12.3. ok."), ("c", "no end"), ("abcd", "x.\ny")]
    rows = [tuple(tuple(char_tokenizer(t, add_special_tokens=False)["input_ids"]) for t in pair) for pair in texts]
    responses = [Response(f"q{i}", 0, p, c, "", (0.0,) * len(c), "eos", True) for i, (p, c) in enumerate(rows)]
    ends = [[4, 8], [5], [1, 2]]
    got = pooled_states(loaded, responses, [2, 0], batch_size=2)
    assert sorted(got) == sorted((layer, position) for layer in (0, 2) for position in POSITIONS)
    for i, (prompt, completion) in enumerate(rows):
        with torch.no_grad():
            states = tiny_llama(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states
        for layer in (0, 2):
            h_TD = states[layer + 1][0, len(prompt) :]
            for position, at in zip(POSITIONS, (list(range(len(completion))), [-1], ends[i]), strict=True):
                np.testing.assert_allclose(got[layer, position][i], h_TD[at].mean(0), rtol=1e-4, atol=2e-5)


# --- bad input ---------------------------------------------------------------------------------------------------


def few(n_mixed: int, n_right: int = 0, n_wrong: int = 0) -> list[Response]:
    one = Response("", 0, (0, 5), (6, 1), "", (-1.0, -1.0), "eos", correct=True)
    kinds = [(True, False)] * n_mixed + [(True, True)] * n_right + [(False, False)] * n_wrong
    return [replace(one, question_id=f"q{i}", correct=right) for i, kind in enumerate(kinds) for right in kind]


@pytest.mark.parametrize(
    ("responses", "sentence"),
    [
        (few(9, 2), "responses: 9 of 11 questions have both right and wrong answers; a layer sweep needs at least 10"),
        (few(0, 4), "responses: 0 of 4 questions have both right and wrong answers (all answers are right); a layer"),
        (few(0, 0, 4), "0 of 4 questions have both right and wrong answers (all answers are wrong); a layer sweep"),
        (few(0, 2, 2), "responses: 0 of 4 questions have both right and wrong answers; a layer sweep"),
        ([], "responses: 0 of 0 questions"),
        ([replace(few(1)[0], correct=None)], "correct: it is None in an answer to question q0"),
        ([replace(r, logprobs=()) for r in few(MIN_MIXED)], "logprobs: an answer to question q0 has 0 for 2 tokens"),
    ],
)
def test_bad_responses(tiny: LoadedModel, responses: list[Response], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        sweep_layers(tiny, responses)
    assert sentence in str(caught.value)


def test_a_block_that_is_not_there(tiny: LoadedModel) -> None:
    with pytest.raises(InputError, match="layer: 5 is out of range; the model has blocks 0 to 4"):
        sweep_layers(tiny, few(MIN_MIXED), [1, 5])
