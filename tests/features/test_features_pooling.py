"""Pooled activations of a tiny random Llama against one forward a response and `encode` on every token."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features import discover, pool_features, pooled_activations
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta

DOT = 59
"""Id of "." in the character tokenizer."""


def make_sae(width: int, features: int, layer: int) -> SAE:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(width, features, generator=generator)
    meta = SAEMeta(release="r", sae_id="s", layer=layer, model_name="m", hook_name="")
    return SAE("topk", weights, torch.zeros(features), weights.T.contiguous(), torch.zeros(width), meta, k=5)


def make_responses(n_questions: int, n_answers: int, seed: int = 0) -> list[Response]:
    rng = random.Random(seed)
    rows = []
    for question in range(n_questions):
        prompt = tuple(rng.randrange(4, 60) for _ in range(rng.randint(2, 6)))
        for sample in range(n_answers):
            ids = tuple(rng.randrange(4, 60) for _ in range(rng.randint(1, 9)))
            right = (sample + question) % 2 == 0
            rows.append(Response(f"q{question}", sample, prompt, ids, "", (-1.0,) * len(ids), "eos", correct=right))
    rng.shuffle(rows)
    return rows


def naive(model: PreTrainedModel, sae: SAE, response: Response, pooling: str) -> torch.Tensor:
    ids = torch.tensor([[*response.prompt_ids, *response.completion_ids]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[sae.meta.layer + 1][0]
    acts = sae.encode(states[len(response.prompt_ids) :])
    n = len(acts)
    ramp = torch.linspace(0.1, 1.0, n)[:, None] if n > 1 else torch.ones(1, 1)
    ends = [i for i, token in enumerate(response.completion_ids) if token == DOT or i == n - 1]
    return {
        "mean": acts.mean(0),
        "max": acts.amax(0),
        "last": acts[-1],
        "last_3": acts[-3:].mean(0),
        "weighted_mean": (ramp * acts).sum(0) / ramp.sum(),
        "step_end:.": acts[ends].mean(0),
    }[pooling]


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "last_3", "weighted_mean", "step_end:."])
def test_pooled_activations_equal_one_forward_a_response(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechreward.features.pooling.TOKENS", 7)
    loaded, sae = LoadedModel(tiny_llama, char_tokenizer, "tiny"), make_sae(32, 48, layer=1)
    dotted = [tuple(DOT if i % 3 == 0 else i for i in r.completion_ids) for r in make_responses(5, 4)]
    responses = [replace(r, completion_ids=ids) for r, ids in zip(make_responses(5, 4), dotted, strict=True)]
    batches = list(pooled_activations(loaded, sae, responses, pooling, batch_size=6))
    assert [len(batch.question_ids) for batch in batches] == [8, 8, 4]
    assert all(len(set(batch.question_ids)) * 4 == len(batch.question_ids) for batch in batches)
    order = {q: [r for r in responses if r.question_id == q] for q in dict.fromkeys(r.question_id for r in responses)}
    expected = [response for answers in order.values() for response in answers]
    assert [q for batch in batches for q in batch.question_ids] == [r.question_id for r in expected]
    assert [y for batch in batches for y in batch.correct_B.tolist()] == [r.correct for r in expected]
    acts = torch.cat([batch.acts_BF for batch in batches])
    reference = torch.stack([naive(tiny_llama, sae, response, pooling) for response in expected])
    torch.testing.assert_close(acts, reference, atol=1e-4, rtol=1e-4)
    assert (acts > 0).any(1).all()
    assert char_tokenizer.decode([DOT]) == "." and sum(r.completion_ids.count(DOT) for r in responses) > 20


def test_pool_features_by_hand() -> None:
    meta = SAEMeta(release="r", sae_id="s", layer=0, model_name="m", hook_name="")
    sae = SAE("relu", torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), meta)
    h_BTD = torch.tensor([[[1.0, -1.0], [3.0, 2.0], [9.0, 9.0]], [[5.0, 1.0], [7.0, 7.0], [7.0, 7.0]]])
    mask_BT = torch.tensor([[True, True, False], [False, False, False]])
    assert pool_features(sae, h_BTD, mask_BT, "mean").tolist() == [[2.0, 1.0], [0.0, 0.0]]
    assert pool_features(sae, h_BTD, mask_BT, "max").tolist() == [[3.0, 2.0], [0.0, 0.0]]
    assert pool_features(sae, h_BTD, mask_BT, "last").tolist() == [[3.0, 2.0], [0.0, 0.0]]


def test_massive_tokens_are_left_out(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, sae = LoadedModel(tiny_llama, char_tokenizer, "tiny"), make_sae(32, 48, layer=1)
    responses = [r for r in make_responses(3, 4) if len(r.completion_ids) > 2]
    monkeypatch.setattr("mechreward.features.pooling.norm_outliers", lambda _, mask_BT: mask_BT.cumsum(1) == 1)
    acts = torch.cat([batch.acts_BF for batch in pooled_activations(loaded, sae, responses)])
    firsts = [replace(r, completion_ids=r.completion_ids[:1], logprobs=(-1.0,)) for r in responses]
    monkeypatch.undo()
    expected = torch.cat([batch.acts_BF for batch in pooled_activations(loaded, sae, firsts)])
    torch.testing.assert_close(acts, expected, atol=1e-4, rtol=1e-4)


def test_discover_reads_mixed_questions_only(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, sae = LoadedModel(tiny_llama, char_tokenizer, "tiny"), make_sae(32, 48, layer=1)
    responses = [replace(r, correct=True) if r.question_id == "q0" else r for r in make_responses(6, 4)]
    table = discover(loaded, sae, responses, top_k=5, halves=4)
    assert (table.n_questions, table.n_mixed, table.n_responses) == (6, 5, 20)
    assert len(table.frame) == 48 and table.frame["effect"].abs().max() > 0
    # Nothing is read where there is nothing to contrast.
    monkeypatch.setattr(sys.modules["mechreward.features.discovery"], "pooled_activations", None)
    with pytest.raises(InputError, match="all 24 answers are right"):
        discover(loaded, sae, [replace(r, correct=True) for r in responses])


def test_bad_responses(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> None:
    loaded, sae = LoadedModel(tiny_llama, char_tokenizer, "tiny"), make_sae(32, 48, layer=1)
    first = make_responses(1, 1)[0]
    with pytest.raises(InputError, match="completion for question q0 has no tokens"):
        list(pooled_activations(loaded, sae, [replace(first, completion_ids=(), logprobs=())]))
    with pytest.raises(InputError, match="correct: it is None in an answer to question q0"):
        list(pooled_activations(loaded, sae, [replace(first, correct=None)]))
