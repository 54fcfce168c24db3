"""Trains the tiny reasoner from scratch on chains of both strategies, close to the entropy floor of its data.

Loss is on the chain alone (a problem's words are random). Problems of one batch have similar lengths, so there is
little padding. Hidden matrices are trained by Muon (Jordan et al. 2024, `torch.optim.Muon`), embeddings and norms by
AdamW.

The order matters. An operator under a fair coin is a parity of three bits (the verb here, a verb and an operator
before), which gradient descent does not find: trained on fair coins from the start, a model learns all the rest and
then nothing. So the coin is loaded at first: only careful chains (what verbs mean is learnt), then one day in four read
backwards, then one in two until the end. `long` problems come last: copying and arithmetic are learnt on `easy` ones at
half the price.

The strategy is *planted*. Left alone, a model computes it where it is needed, just before an operator and in the last
block, and no SAE feature stands for it. Here a fixed direction in the middle of the model is asked, at every token
after a day's first operator, whether that day is read backwards; the question is dropped after training, the answer is
what later blocks have learnt to use.

The floor is the entropy of one coin a day, in nats a token of the chain.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechreward.tiny.world import draw_flips, make_problem, write_chain

IGNORED = -100
POOL = 4
"""Batches drawn at a time, so that rows of similar length can be put together."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes and schedule of the tiny reasoner."""

    width: int = 128
    layers: int = 5
    heads: int = 4
    steps: int = 1000
    batch_size: int = 128
    coins: tuple[tuple[float, float], ...] = ((0.12, 0.0), (0.3, 0.25), (1.0, 0.5))
    """Up to which share of the steps a day is read backwards with which probability."""
    plant_layer: int = 2
    """Block whose output is asked for the strategy."""
    plant_weight: float = 0.2
    """Weight of that question's cross-entropy beside the next-token loss."""
    easy_until: float = 0.4
    """Share of the steps, at the start, that see `easy` problems only; afterwards half are `long`."""
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    seed: int = 0


SMALL = Recipe(width=64, layers=3, heads=2, steps=150, batch_size=64, plant_layer=1, easy_until=1.0)
"""What continuous integration can afford: it learns the format and some arithmetic, and proves that the script runs."""


class Example(NamedTuple):
    prompt_ids: list[int]
    chain_ids: list[int]
    strategies: list[int]
    """For each chain token: 1 if its day is read backwards, 0 if not, -100 where no choice has been made."""
    entropy: float
    """Of the chain given the problem, in nats."""


class Progress(NamedTuple):
    step: int
    loss: float
    floor: float
    planted: float
    """Cross-entropy of the planted question, in nats."""


@dataclass(frozen=True)
class Trained:
    model: LlamaForCausalLM
    history: list[Progress] = field(default_factory=list)
    """Mean loss and floor, in nats a token, over each 50 steps."""


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model for the recipe."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Flash attention's backward pass on a CPU takes longer than all the rest together at these lengths.
    config._attn_implementation = "eager" if not torch.cuda.is_available() else "sdpa"
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def _draw(
    tokenizer: PreTrainedTokenizerFast, n: int, long_share: float, coin: float, rng: random.Random
) -> list[Example]:
    prompts, chains, flips, entropies = [], [], [], []
    for _ in range(n):
        problem = make_problem("long" if rng.random() < long_share else "easy", rng)
        prompts.append(problem.prompt)
        flips.append(draw_flips(problem, rng, coin))
        chains.append(write_chain(problem, flips[-1]))
        entropies.append(len(problem.days) * _entropy(coin))
    prompt_ids = tokenizer(prompts)["input_ids"]
    chain_ids = [ids + [tokenizer.eos_token_id] for ids in tokenizer(chains, add_special_tokens=False)["input_ids"]]
    strategies = [
        strategy_at(tokenizer.convert_ids_to_tokens(ids), flip) for ids, flip in zip(chain_ids, flips, strict=True)
    ]
    return [Example(*columns) for columns in zip(prompt_ids, chain_ids, strategies, entropies, strict=True)]


def strategy_at(pieces: Sequence[str], flips: Sequence[bool]) -> list[int]:
    """The strategy in force at each token of a chain: from a day's first operator until the next day or the answer."""
    day, known, labels = -1, False, []
    for piece in pieces:
        if piece in ("▁on", "▁####"):
            day, known = day + 1, False
        elif piece in ("▁+", "▁-"):
            known = True
        labels.append(int(flips[day]) if known else IGNORED)
    return labels


def _entropy(coin: float) -> float:
    return -sum(p * math.log(p) for p in (coin, 1 - coin) if p)


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[list[Example]]:
    size, step = recipe.batch_size, 0
    while step < recipe.steps:
        done = step / recipe.steps
        coin = next(coin for until, coin in recipe.coins if done < until)
        examples = _draw(tokenizer, POOL * size, 0.0 if done < recipe.easy_until else 0.5, coin, rng)
        examples.sort(key=lambda e: len(e.prompt_ids) + len(e.chain_ids))
        batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        rng.shuffle(batches)
        yield from batches[: recipe.steps - step]
        step += len(batches)


class Batch(NamedTuple):
    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    strategies_BT: torch.Tensor


def _collate(examples: list[Example], pad_id: int) -> Batch:
    longest = max(len(e.prompt_ids) + len(e.chain_ids) for e in examples)
    ids_BT = torch.full((len(examples), longest), pad_id)
    labels_BT = torch.full((len(examples), longest), IGNORED)
    strategies_BT = torch.full((len(examples), longest), IGNORED)
    for row, e in enumerate(examples):
        start, end = len(e.prompt_ids), len(e.prompt_ids) + len(e.chain_ids)
        ids_BT[row, :end] = torch.tensor(e.prompt_ids + e.chain_ids)
        labels_BT[row, start:end] = torch.tensor(e.chain_ids)
        strategies_BT[row, start:end] = torch.tensor(e.strategies)
    return Batch(ids_BT, labels_BT, strategies_BT)


def _losses(model: LlamaForCausalLM, batch: Batch, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy over the chain, and that of the planted question; both in nats a token."""
    with torch.autocast(batch.ids_BT.device.type, dtype=torch.bfloat16):
        out = model.model(input_ids=batch.ids_BT, output_hidden_states=True)
        scored_BT = batch.labels_BT[:, 1:] != IGNORED
        logits_NV = model.lm_head(out.last_hidden_state[:, :-1][scored_BT])
    chain = cross_entropy(logits_NV.float(), batch.labels_BT[:, 1:][scored_BT])
    asked_BT = batch.strategies_BT != IGNORED
    h_ND = out.hidden_states[recipe.plant_layer + 1][asked_BT].float()
    # Seen as later blocks see it, at unit scale, so that the answer has to be a real share of the residual stream.
    h_ND = h_ND * h_ND.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    answer_N = 2 * h_ND @ plant_direction(recipe).to(h_ND.device)
    planted = binary_cross_entropy_with_logits(answer_N, batch.strategies_BT[asked_BT].float())
    return chain, planted


def plant_direction(recipe: Recipe) -> torch.Tensor:
    """The unit direction [D] that is asked, the same for a recipe."""
    direction_D = torch.randn(recipe.width, generator=torch.Generator().manual_seed(recipe.seed))
    return direction_D / direction_D.norm()


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """Warms up over 30 steps, holds, and falls to zero over the last four tenths."""
    return min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps))


def train_model(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Trains from scratch; the same recipe on the same machine gives the same weights."""
    rng = random.Random(recipe.seed)
    model = make_model(recipe, tokenizer)
    model.to(device)  # type: ignore[arg-type]
    optimizers = _optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe.steps)) for o in optimizers]
    losses, floors, planteds, history = [], [], [], []
    for step, examples in enumerate(_batches(recipe, tokenizer, rng), start=1):
        batch = Batch(*(t.to(device) for t in _collate(examples, tokenizer.pad_token_id)))
        loss, planted = _losses(model, batch, recipe)
        (loss + recipe.plant_weight * planted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        planteds.append(planted.item())
        floors.append(sum(e.entropy for e in examples) / sum(len(e.chain_ids) for e in examples))
        if step % 50 == 0 or step == recipe.steps:
            history.append(Progress(step, *(sum(values) / len(values) for values in (losses, floors, planteds))))
            on_progress(history[-1])
            losses, floors, planteds = [], [], []
    return Trained(model.eval(), history)
