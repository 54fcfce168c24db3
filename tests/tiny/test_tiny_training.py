"""The tiny reasoner's training: what the loss counts, the schedule of coins, and that it learns."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mechreward.tiny.language import make_tokenizer
from mechreward.tiny.training import (
    IGNORED,
    SMALL,
    Recipe,
    _batches,
    _collate,
    _draw,
    _losses,
    _rate,
    make_model,
    plant_direction,
    strategy_at,
)


def test_collate_scores_the_chain_and_nothing_else() -> None:
    tokenizer = make_tokenizer()
    examples = _draw(tokenizer, 8, 0.5, 0.5, random.Random(0))
    batch = _collate(examples, tokenizer.pad_token_id)
    for ids_T, labels_T, e in zip(batch.ids_BT, batch.labels_BT, examples, strict=True):
        assert labels_T[labels_T != IGNORED].tolist() == e.chain_ids
        assert ids_T[labels_T != IGNORED].tolist() == e.chain_ids
        assert e.chain_ids[-1] == tokenizer.eos_token_id
        assert set(ids_T[len(e.prompt_ids) + len(e.chain_ids) :].tolist()) <= {tokenizer.pad_token_id}


def test_losses_against_one_row_at_a_time() -> None:
    tokenizer = make_tokenizer()
    model = make_model(SMALL, tokenizer).eval()
    examples = _draw(tokenizer, 3, 0.0, 0.5, random.Random(1))
    nats, answers = [], []
    with torch.no_grad():
        for e in examples:
            out = model(torch.tensor([e.prompt_ids + e.chain_ids]), output_hidden_states=True)
            for t, (token, strategy) in enumerate(zip(e.chain_ids, e.strategies, strict=True), len(e.prompt_ids)):
                nats.append(-out.logits[0, t - 1].log_softmax(-1)[token].item())
                h_D = out.hidden_states[SMALL.plant_layer + 1][0, t]
                p = torch.sigmoid(2 * (h_D / h_D.pow(2).mean().sqrt()) @ plant_direction(SMALL)).item()
                if strategy != IGNORED:
                    answers.append(-math.log(p if strategy else 1 - p))
        chain, planted = _losses(model, _collate(examples, tokenizer.pad_token_id), SMALL)
    assert chain.item() == pytest.approx(sum(nats) / len(nats), rel=5e-3)  # bfloat16
    assert planted.item() == pytest.approx(sum(answers) / len(answers), rel=5e-3)


def test_strategy_is_in_force_from_the_first_operator_of_its_day() -> None:
    chain = "on Monday buys 5 : 20 - 5 = 15 . eats 2 : 15 + 2 = 17 . on Tuesday buys 1 : 17 + 1 = 18 . #### 18"
    pieces = make_tokenizer().tokenize(chain)
    labels = strategy_at(pieces, (True, False))
    first, second, answer = pieces.index("▁-"), pieces.index("▁Tuesday") - 1, pieces.index("▁####")
    third = second + pieces[second:].index("▁+")
    unknown = [IGNORED]
    assert labels[:first] == unknown * first
    assert labels[first:second] == [1] * (second - first)
    assert labels[second:third] == unknown * (third - second)
    assert labels[third:answer] == [0] * (answer - third)
    assert labels[answer:] == unknown * (len(pieces) - answer)


def test_floor_is_one_coin_a_day() -> None:
    tokenizer = make_tokenizer()
    (easy,) = _draw(tokenizer, 1, 0.0, 0.5, random.Random(0))
    (long,) = _draw(tokenizer, 1, 1.0, 0.2, random.Random(0))
    (careful,) = _draw(tokenizer, 1, 1.0, 0.0, random.Random(0))
    assert easy.entropy == pytest.approx(math.log(2))
    assert long.entropy == pytest.approx(-3 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8)))
    assert careful.entropy == 0


def test_schedule_of_problems_and_rate() -> None:
    recipe = Recipe(steps=20, batch_size=4, coins=((0.5, 0.0), (1.0, 0.5)), easy_until=0.8)
    batches = list(_batches(recipe, make_tokenizer(), random.Random(0)))
    assert [len(batch) for batch in batches] == [4] * 20
    entropies = [[round(e.entropy, 4) for e in batch] for batch in batches]
    assert {e for batch in entropies[:8] for e in batch} == {0.0}
    assert {e for batch in entropies[12:16] for e in batch} == {round(math.log(2), 4)}
    assert round(3 * math.log(2), 4) in {e for batch in entropies[16:] for e in batch}
    assert [_rate(step, 100) for step in (0, 29, 50, 70, 85, 100)] == [1 / 30, 1.0, 1.0, 0.75, 0.375, 0.0]
