"""Contrastive estimation: the formula on rows of their own, what it learns, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mechreward.chains import ContrastiveConfig, contrastive_pair, lowest
from mechreward.chains.contrastive import _batches, contrastive_scores
from mechreward.errors import InputError
from mechreward.models import LoadedModel, LogitsBatch, iter_logits
from mechreward.rollout import Response

RIGHT, WRONG = 20, 21


def made(n: int, seed: int) -> list[Response]:
    """Random completions but for one token in the middle, which is `RIGHT` in right and `WRONG` in wrong ones."""
    rng = random.Random(seed)
    responses = []
    for i in range(n):
        correct = i % 2 == 0
        before, after = ([rng.randint(30, 33) for _ in range(rng.randint(2, 4))] for _ in range(2))
        ids = (*before, 10, RIGHT if correct else WRONG, *after)
        responses.append(Response(f"q{i}", 0, (5, 6), ids, "", (0.0,) * len(ids), "length", correct))
    return responses


@pytest.fixture
def loaded(tiny_llama, char_tokenizer) -> LoadedModel:
    return LoadedModel(copy.deepcopy(tiny_llama), char_tokenizer, "llama")


def test_the_formula_by_hand() -> None:
    def batch(*logits: float) -> LogitsBatch:
        return LogitsBatch([0], torch.tensor([[logits]]), torch.tensor([[1]]), torch.tensor([[True]]))

    positive, negative = batch(0.0, 1.0, 2.0), batch(1.0, 3.0, 0.0)
    # 2 * positive - negative is (-1, -1, 4); normalising each side first adds one constant to all.
    want = torch.tensor([-1.0, -1.0, 4.0]).softmax(0)[1]
    torch.testing.assert_close(contrastive_scores(positive, negative, 1.0)[0, 0], want)
    torch.testing.assert_close(
        contrastive_scores(positive, negative, 0.0)[0, 0], torch.tensor([0.0, 1, 2]).softmax(0)[1]
    )


def test_scores_are_those_of_each_row_alone(loaded: LoadedModel) -> None:
    responses = made(10, 0)
    config = ContrastiveConfig(lr=1e-2, epochs=2, batch_size=3, beta=0.5)
    with contrastive_pair(loaded, responses, config) as pair:
        got = pair.scores(responses)
        for response, scores in zip(responses, got, strict=True):
            logprobs = []
            for side in ("positive", "negative"):
                pair.model.set_adapter(side)
                with torch.no_grad():
                    ids = torch.tensor([[*response.prompt_ids, *response.completion_ids]])
                    logprobs.append(pair.model(ids).logits[0, 1:-1].log_softmax(-1))
            mixed = (1.5 * logprobs[0] - 0.5 * logprobs[1]).softmax(-1)
            want = [float(mixed[t, token]) for t, token in enumerate(response.completion_ids)]
            assert scores == pytest.approx(want, abs=1e-5)
            assert not torch.allclose(logprobs[0], logprobs[1], atol=1e-2)


def test_the_token_that_only_wrong_responses_have_is_the_lowest(loaded: LoadedModel) -> None:
    config = ContrastiveConfig(lr=1e-2, epochs=6, batch_size=8)
    with contrastive_pair(loaded, made(64, 1), config) as pair:
        held_out = made(20, 2)
        scores = pair.scores(held_out)
    right, wrong = [], []
    for response, row in zip(held_out, scores, strict=True):
        assert len(row) == len(response.completion_ids)
        if response.correct:
            right.append(row[response.completion_ids.index(RIGHT)])
        else:
            assert response.completion_ids[lowest(row)] == WRONG
            wrong.append(min(row))
    assert min(right) > 10 * max(wrong)


def test_the_policy_is_left_as_it_was_even_after_an_error(loaded: LoadedModel) -> None:
    model = loaded.model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine"), contrastive_pair(loaded, made(4, 0), ContrastiveConfig(lr=1e-2)):
        raise RuntimeError("mine")
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(module.training for module in model.modules())


def test_the_seed_decides(loaded: LoadedModel) -> None:
    def scores(seed: int) -> list[list[float]]:
        with contrastive_pair(loaded, made(8, 0), ContrastiveConfig(lr=1e-2, seed=seed, batch_size=2)) as pair:
            return pair.scores(made(2, 3))

    assert scores(0) == scores(0) != scores(1)


def test_each_epoch_has_every_response_once_in_an_order_of_the_seed() -> None:
    responses = made(10, 0)

    def epochs(seed: int) -> list[list[str]]:
        batches = list(_batches(responses, ContrastiveConfig(seed=seed, epochs=2, batch_size=4)))
        assert [len(batch) for batch in batches] == [4, 4, 2] * 2
        names = [r.question_id for batch in batches for r in batch]
        return [names[:10], names[10:]]

    assert all(sorted(epoch) == sorted(r.question_id for r in responses) for epoch in epochs(0))
    assert epochs(0)[0] != epochs(0)[1] and epochs(0) == epochs(0) != epochs(1)


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_qwen2"])
def test_other_architectures_have_mlps_too(request, char_tokenizer, name: str) -> None:
    loaded = LoadedModel(copy.deepcopy(request.getfixturevalue(name)), char_tokenizer, name)
    with contrastive_pair(loaded, made(4, 0), ContrastiveConfig(rank=2)) as pair:
        adapted = {n.split(".mlp.")[1].split(".")[0] for n, _ in pair.model.named_modules() if n.endswith("lora_A")}
        assert adapted == ({"c_fc", "c_proj"} if name == "tiny_gpt2" else {"gate_proj", "up_proj", "down_proj"})
        assert all(".mlp." in n for n, _ in pair.model.named_modules() if n.endswith("lora_A"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank: 0 is too small"),
        ({"epochs": 0}, "epochs: 0 is too small"),
        ({"beta": -1.0}, "beta: -1.0 is not allowed"),
        ({"beta": float("inf")}, "beta: inf is not allowed"),
        ({"lr": 0.0}, "lr: 0.0 is not allowed"),
        ({"lr": float("inf")}, "lr: inf is not allowed"),
    ],
)
def test_bad_settings_are_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        ContrastiveConfig(**options)
    assert str(caught.value).startswith(sentence)


def test_nothing_to_learn_from_is_one_sentence(loaded: LoadedModel) -> None:
    responses = made(6, 0)
    for kept, kind, side in ((True, "wrong", "negative"), (False, "right", "positive")):
        sentence = f"^responses: none of 3 is {kind}; the {side} model has nothing to learn$"
        with (
            pytest.raises(InputError, match=sentence),
            contrastive_pair(loaded, [r for r in responses if r.correct is kept]),
        ):
            pass
    lora = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted = LoadedModel(lora, loaded.tokenizer, "mine")
    with pytest.raises(InputError, match="^model: mine carries an adapter"), contrastive_pair(adapted, responses):
        pass
    for damage, sentence in (
        ({"completion_ids": ()}, "completion_ids: row 5 has no tokens"),
        ({"completion_ids": (9,) * 255}, "completion_ids: row 5 has 257 tokens with its prompt; the model reads"),
        ({"completion_ids": (64,)}, "completion_ids: row 5 holds token 64"),
        ({"prompt_ids": ()}, "prompt_ids: row 5 is empty"),
    ):
        spoilt = [*responses[:5], replace(responses[5], **damage)]
        with pytest.raises(InputError, match=f"^{sentence}"), contrastive_pair(loaded, spoilt):
            pass
    assert not any(isinstance(module, nn.Dropout) and module.p for module in loaded.model.modules())


def trained_by_hand(model: nn.Module, responses: list[Response], config: ContrastiveConfig) -> nn.Module:
    """Both adapters, row by row: AdamW without weight decay, clipped gradients, a rate that falls in a line to 0."""
    mlp = ["gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=mlp, task_type="CAUSAL_LM")
    torch.manual_seed(config.seed)
    twin = get_peft_model(copy.deepcopy(model), lora, adapter_name="positive")
    twin.add_adapter("negative", lora)
    for side, verdict in (("positive", True), ("negative", False)):
        twin.set_adapter(side)
        weights = [weight for name, weight in twin.named_parameters() if f".{side}." in name]
        optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
        batches = list(_batches([r for r in responses if r.correct is verdict], config))
        for place, batch in enumerate(batches):
            logprobs = []
            for r in batch:
                logits = twin(torch.tensor([[*r.prompt_ids, *r.completion_ids]])).logits[0, len(r.prompt_ids) - 1 : -1]
                logprobs.append(logits.log_softmax(-1)[range(len(r.completion_ids)), list(r.completion_ids)])
            (-torch.cat(logprobs).mean()).backward()
            size = torch.cat([w.grad.flatten() for w in weights]).norm()
            for weight in weights:
                weight.grad *= (1 / (size + 1e-6)).clamp(max=1.0)
            optimizer.param_groups[0]["lr"] = config.lr * (1 - place / len(batches))
            optimizer.step()
            optimizer.zero_grad()
    return twin


def test_both_adapters_are_trained_as_written_by_hand(loaded: LoadedModel) -> None:
    config = ContrastiveConfig(lr=1e-2, batch_size=2, rank=2, alpha=7, seed=3)
    responses = made(10, 0)
    unverified = replace(responses[0], correct=None)
    expected = dict(trained_by_hand(loaded.model, responses, config).named_parameters())
    with contrastive_pair(loaded, [unverified, *responses], config) as pair:
        assert not pair.model.training
        found = {name: weight for name, weight in pair.model.named_parameters() if "lora_" in name}
        assert {weight.shape[0 if "lora_A" in name else 1] for name, weight in found.items()} == {2}
        off = torch.cat([(weight - expected[name]).detach().abs().flatten() for name, weight in found.items()])
    assert ContrastiveConfig() == ContrastiveConfig(beta=1.0, rank=8, alpha=16, epochs=1, lr=3e-4, batch_size=16)
    assert float(off.max()) < 1e-5


def test_scores_are_read_in_the_batches_asked_for(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    responses, read = made(5, 0), []

    def batches(*given: object) -> Iterator[LogitsBatch]:
        for batch in iter_logits(*given):
            read.append(len(batch.rows))
            yield batch

    monkeypatch.setattr("mechreward.chains.contrastive.iter_logits", batches)
    with contrastive_pair(loaded, responses, ContrastiveConfig(batch_size=2)) as pair:
        pair.scores(responses)
    assert read == [2, 2, 2, 2, 1, 1], "the two sides in turn"
