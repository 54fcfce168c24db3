"""Discovery end to end on a tiny random Llama, its cross-fitted scores, and reading at given positions."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features import discover, pooled_activations, select
from mechreward.features.contrast import contrast
from mechreward.features.crossfit import PENALTY, centred, cross_fitted, dense_probe_scores, direction_scores
from mechreward.features.discovery import DENSE_PROBE, DIRECTION, FEATURES, Search, explore, held_out_scores
from mechreward.features.rows import RowCollector
from mechreward.models import LoadedModel
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE, SAEMeta


def make_sae(layer: int = 1) -> SAE:
    weights = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    meta = SAEMeta(release="r", sae_id="s", layer=layer, model_name="m", hook_name="")
    return SAE("topk", weights, torch.zeros(48), weights.T.contiguous(), torch.zeros(32), meta, k=5)


def make_responses(n_questions: int, n_answers: int = 4, n_tokens: int = 6) -> list[Response]:
    """Right answers end in token 7, wrong ones in 9: the states differ."""
    rng = random.Random(0)
    rows = []
    for question in range(n_questions):
        prompt = tuple(rng.randrange(10, 60) for _ in range(4))
        for sample in range(n_answers):
            right = (sample + question) % 2 == 0
            ids = (*(rng.randrange(10, 60) for _ in range(n_tokens - 1)), 7 if right else 9)
            rows.append(Response(f"q{question}", sample, prompt, ids, "", (-1.0,) * n_tokens, "eos", correct=right))
    return rows


@pytest.fixture
def loaded(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_positions_are_the_only_tokens_that_count(loaded: LoadedModel, pooling: str) -> None:
    sae, responses = make_sae(), make_responses(3)
    positions = [[at % 6, (at + 2) % 6] if at else [] for at in range(len(responses))]
    read = pooled_activations(loaded, sae, responses, pooling, positions=positions, with_states=True, batch_size=5)
    batches = list(read)
    assert sum(len(batch.question_ids) for batch in batches) == len(responses) - 1
    found, states = torch.cat([b.acts_BF for b in batches]), torch.cat([b.states_BD for b in batches])
    for row, (response, places) in enumerate(zip(responses[1:], positions[1:], strict=True)):
        with torch.no_grad():
            ids = torch.tensor([[*response.prompt_ids, *response.completion_ids]])
            h_TD = loaded.model(ids, output_hidden_states=True).hidden_states[2][0, 4:]
        at = sorted(places)
        acts = sae.encode(h_TD[at])
        expected = {"mean": acts.mean(0), "max": acts.amax(0), "last": acts[-1]}[pooling]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
        state = h_TD[at[-1]] if pooling == "last" else h_TD[at].mean(0)
        torch.testing.assert_close(states[row], state, atol=1e-4, rtol=1e-4)


def test_positions_follow_the_mixed_questions(loaded: LoadedModel) -> None:
    sae, responses = make_sae(), make_responses(5)
    responses = [replace(r, correct=True) if r.question_id == "q0" else r for r in responses]
    responses = [replace(r, completion_ids=r.completion_ids[at % 4 :]) for at, r in enumerate(responses)]
    random.Random(1).shuffle(responses)
    last = [[len(r.completion_ids) - 1] for r in responses]
    at_last = discover(loaded, sae, responses, positions=last, halves=2, permutations=3)
    pooled = discover(loaded, sae, responses, pooling="last", halves=2, permutations=3)
    pd.testing.assert_frame_equal(at_last.frame, pooled.frame, atol=1e-6, rtol=1e-3)
    assert not at_last.frame.equals(discover(loaded, sae, responses, halves=2).frame)


@pytest.mark.parametrize(
    ("positions", "pooling", "sentence"),
    [
        ([[0]] * 7, "mean", "positions: 7 lists for 8 responses"),
        ([[0]] * 7 + [[6]], "mean", "positions: 6 is not a token of an answer to question q1 of 6 tokens; .* 0 to 5"),
        ([[0]] * 7 + [[-1]], "mean", "positions: -1 is not a token"),
        ([[0]] * 8, "step_end:.", "positions: they cannot be had together with the pooling 'step_end:.'"),
    ],
)
def test_bad_positions(loaded: LoadedModel, positions: list[list[int]], pooling: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        discover(loaded, make_sae(), make_responses(2), pooling=pooling, positions=positions)


def test_explore_is_discover_with_scores(loaded: LoadedModel) -> None:
    sae, responses = make_sae(), make_responses(12)
    done: list[int] = []
    search = Search(pooling="last", halves=10, permutations=19, top_k=10, min_each=0, seed=3)
    table, held_out = explore(loaded, sae, responses, search, n_features=3, on_batch=done.append, batch_size=16)
    alone = discover(
        loaded, sae, responses, pooling="last", halves=10, permutations=19, top_k=10, seed=3, batch_size=16
    )
    pd.testing.assert_frame_equal(table.frame, alone.frame)
    assert done == [16, 16, 16]
    assert held_out.questions == [r.question_id for r in responses]
    assert held_out.right_N.tolist() == [r.correct for r in responses]
    assert list(held_out.scores) == [FEATURES, DIRECTION, DENSE_PROBE]
    right = held_out.right_N
    for name in (DIRECTION, DENSE_PROBE):
        score = centred(held_out.scores[name][:, None], held_out.questions)[:, 0]
        assert score[right].min() > score[~right].max()


def test_features_are_chosen_without_the_scored_questions(loaded: LoadedModel) -> None:
    sae, responses = make_sae(), make_responses(15)
    search = Search(pooling="last", halves=10, top_k=10, seed=2)
    collector = RowCollector()
    batches = list(collector.through(pooled_activations(loaded, sae, responses, "last", batch_size=4)))
    rows = collector.rows()
    found = held_out_scores(rows, search, n_features=4, q_max=1.0, min_stability=0.3)
    names = np.array(rows.questions)
    for train, test in GroupKFold(5, shuffle=True, random_state=2).split(names, groups=names):
        part = [batch for batch in batches if batch.question_ids[0] in set(names[train])]
        table = contrast(part, halves=10, top_k=10, permutations=0, seed=2)
        chosen = select(table, n_features=4, q_max=1.0, min_stability=0.3)
        expected = sum(f.weight / f.scale * rows.acts_NF.toarray()[test, f.id] for f in chosen)
        np.testing.assert_allclose(found.scores[FEATURES][test], expected, rtol=1e-5)
    assert found.n_empty == 0 and list(found.scores) == [FEATURES]


def test_a_fold_without_features_scores_nothing(loaded: LoadedModel) -> None:
    collector = RowCollector()
    list(collector.through(pooled_activations(loaded, make_sae(), make_responses(10), "last")))
    found = held_out_scores(collector.rows(), Search(halves=2), q_max=0.0)
    assert found.n_empty == 40 and not found.scores[FEATURES].any()


def test_probe_as_a_method(loaded: LoadedModel) -> None:
    sae, responses = make_sae(), make_responses(12)
    table, held_out = explore(
        loaded, sae, responses, Search(method="probe", pooling="last", halves=4), q_max=1.0, min_stability=0.0
    )
    alone = discover(loaded, sae, responses, method="probe", pooling="last", halves=4)
    assert table.method == alone.method == "probe"
    pd.testing.assert_frame_equal(table.frame, alone.frame)
    assert 0 < (table.frame["effect"] != 0).sum() < 30
    score, right = centred(held_out.scores[FEATURES][:, None], held_out.questions)[:, 0], held_out.right_N
    assert score[right].mean() > score[~right].mean()


def test_no_such_method(loaded: LoadedModel) -> None:
    with pytest.raises(InputError, match="method: 'magic' is not one of contrast, probe"):
        discover(loaded, make_sae(), make_responses(2), method="magic")  # type: ignore[arg-type]


def dense_world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    questions = [f"q{i // 5}" for i in range(60)]
    right = rng.random(60) < 0.5
    return rng.normal(size=(60, 7)) + np.outer(right, np.linspace(0, 2, 7)), right, questions


def test_dense_scores_equal_naive_loops() -> None:
    states, right, questions = dense_world()
    direction, probe = (
        direction_scores(states, right, questions, seed=4),
        dense_probe_scores(states, right, questions, seed=4),
    )
    names = np.array(questions)
    x = np.stack([row - states[names == name].mean(0) for row, name in zip(states, names, strict=True)])
    y = np.array([label - right[names == name].mean() for label, name in zip(right, names, strict=True)])
    for train, test in GroupKFold(5, shuffle=True, random_state=4).split(x, groups=names):
        np.testing.assert_allclose(direction[test], x[test] @ (x[train] * y[train, None]).sum(0))
        mean, std = x[train].mean(0), x[train].std(0)
        fit = LogisticRegression(C=PENALTY, max_iter=500).fit((x[train] - mean) / std, right[train])
        np.testing.assert_allclose(probe[test], fit.decision_function((x[test] - mean) / std), atol=1e-6)


def test_a_question_never_trains_its_own_score() -> None:
    _, _, questions = dense_world()
    names, times = np.array(questions), np.zeros(60)

    def score(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        assert not set(names[train]) & set(names[test]) and len(train) + len(test) == 60
        times[test] += 1
        return np.full(len(test), 1.5)

    assert cross_fitted(score, questions).tolist() == [1.5] * 60 and (times == 1).all()
    with pytest.raises(InputError, match="they answer 1 question, a fit needs at least 2"):
        cross_fitted(score, ["a", "a"])


@pytest.mark.parametrize(("method", "pooling"), [("contrast", "per_token"), ("probe", "last")])
def test_a_table_says_its_pooling_and_its_questions(loaded: LoadedModel, method: str, pooling: str) -> None:
    sae, responses = make_sae(), make_responses(6)
    responses = [replace(r, correct=True) if r.question_id == "q0" else r for r in responses]
    table = discover(loaded, sae, responses, method=method, pooling=pooling, halves=2, permutations=0)
    explored, _ = explore(loaded, sae, responses, Search(method=method, pooling=pooling, halves=2, permutations=0))
    wanted = "mean" if pooling == "per_token" else pooling
    assert table.pooling == explored.pooling == wanted and table.n_questions == 6
    assert table.prompts == explored.prompts == prompt_hashes(r.prompt_ids for r in responses)


def test_two_mixed_questions_are_too_few_to_explore(loaded: LoadedModel) -> None:
    sae, search = make_sae(), Search(pooling="last", halves=2, permutations=0)
    assert discover(loaded, sae, make_responses(2), pooling="last", halves=2, permutations=0).n_mixed == 2
    with pytest.raises(
        InputError, match="correct: only 2 of 2 questions have .* cross-fitting a contrast needs at least 3"
    ):
        explore(loaded, sae, make_responses(2), search)
    assert explore(loaded, sae, make_responses(3), search)[0].n_mixed == 3
