"""Critical tokens by contrastive estimation, cDPO: "Critical Tokens Matter" (2411.19943).

Two adapters on one frozen policy are fine-tuned, one on right responses and one on wrong ones. A token that the right
model would hardly have written and the wrong one would is critical:

    s_t = softmax((1 + beta) log p_pos - beta log p_neg)[y_t]

over the vocabulary, at each token y_t; low s_t marks it. Adapters and defaults are the paper's: LoRA of rank 8 on the
MLPs, one epoch, learning rate 3e-4, beta 1; loss on the completion alone.

Deviations: all right and all wrong responses given are trained on, where the paper takes the most frequent right answer
and a nucleus of wrong ones; the loop is plain PyTorch, AdamW with a linear decay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mechreward.errors import InputError
from mechreward.models import LoadedModel, LogitsBatch, check_prompted_rows, completion_logits, iter_logits
from mechreward.rollout import Response

MLP = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc", "mlp.c_proj", "dense_h_to_4h", "dense_4h_to_h")
"""Names of the linear layers of MLPs in the architectures of transformers."""
SIDES = ("positive", "negative")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """How the two adapters are trained and compared."""

    beta: float = 1.0
    """Weight of the negative model."""
    rank: int = 8
    alpha: int = 16
    epochs: int = 1
    lr: float = 3e-4
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small; it must be at least 1")
        if not 0 <= self.beta < inf:
            raise InputError(f"beta: {self.beta} is not allowed; it must be 0 or more, and finite")
        if not 0 < self.lr < inf:
            raise InputError(f"lr: {self.lr} is not allowed; it must be above 0, and finite")


@dataclass(frozen=True)
class ContrastivePair:
    """A policy with its two adapters; only inside `contrastive_pair`."""

    model: PeftModel
    config: ContrastiveConfig

    def scores(self, responses: Sequence[Response]) -> list[list[float]]:
        """s_t of each completion token, in (0, 1); one list a response. Low marks a critical token.

        Raises:
            InputError: as `iter_logits`.
        """
        scores: list[list[float]] = [[] for _ in responses]
        for positive, negative in zip(*(self._read(side, responses) for side in SIDES), strict=True):
            score_BT = contrastive_scores(positive, negative, self.config.beta)
            for row, values_T, mask_T in zip(positive.rows, score_BT, positive.mask_BT, strict=True):
                scores[row] = values_T[mask_T].tolist()
        return scores

    def _read(self, side: str, responses: Sequence[Response]) -> Iterator[LogitsBatch]:
        batches = iter_logits(self.model, *_ids(responses), self.config.batch_size)
        while True:
            self.model.set_adapter(side)  # each time anew: the two sides are read in turn
            batch = next(batches, None)
            if batch is None:
                return
            yield batch


def contrastive_scores(positive: LogitsBatch, negative: LogitsBatch, beta: float) -> torch.Tensor:
    """s_t of one batch, [B, T]; values beyond a completion's end mean nothing."""
    mixed_BTV = (1 + beta) * positive.logits_BTV.log_softmax(-1) - beta * negative.logits_BTV.log_softmax(-1)
    return mixed_BTV.softmax(-1).gather(-1, positive.ids_BT[..., None]).squeeze(-1)


@contextmanager
def contrastive_pair(
    loaded: LoadedModel, responses: Sequence[Response], config: ContrastiveConfig | None = None
) -> Iterator[ContrastivePair]:
    """Trains both adapters, lends them out, and takes them off again: afterwards the policy is as it was.

    Args:
        loaded: the policy, without an adapter of its own.
        responses: verified; the right ones train the positive, the wrong ones the negative adapter. Score others.

    Raises:
        InputError: if there is no right or no wrong response, the policy carries an adapter, or has no known MLP; as
            `iter_logits`.
    """
    config = config or ContrastiveConfig()
    sides = {"positive": [r for r in responses if r.correct], "negative": [r for r in responses if r.correct is False]}
    for side, kind in zip(SIDES, ("right", "wrong"), strict=True):
        if not sides[side]:
            raise InputError(f"responses: none of {len(responses)} is {kind}; the {side} model has nothing to learn")
    if isinstance(loaded.model, PeftModel):
        raise InputError(f"model: {loaded.name} carries an adapter; merge it into the model first")
    check_prompted_rows(loaded.model, *_ids(responses), config.batch_size)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=_targets(loaded.model), task_type="CAUSAL_LM"
    )
    modes = {module: module.training for module in loaded.model.modules()}
    wants = {parameter: parameter.requires_grad for parameter in loaded.model.parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = get_peft_model(loaded.model, lora, adapter_name=SIDES[0])
        try:
            model.add_adapter(SIDES[1], lora)
            for side in SIDES:
                _train(model, side, sides[side], config)
            yield ContrastivePair(model, config)
        finally:
            model.unload()
            for module, training in modes.items():
                module.training = training
            for parameter, wanted in wants.items():
                parameter.requires_grad_(wanted)


def _targets(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    targets = [target for target in MLP if any(name.endswith("." + target) for name in names)]
    if not targets:
        raise InputError(f"model: {type(model).__name__} has no MLP layer named {', '.join(MLP)}; it is not supported")
    return targets


def _train(model: PeftModel, side: str, responses: Sequence[Response], config: ContrastiveConfig) -> None:
    model.set_adapter(side)
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0)
    batches = list(_batches(responses, config))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    for batch in batches:
        read = completion_logits(model, *_ids(batch))
        loss = -read.logprobs_BT.sum() / read.mask_BT.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    model.eval()


def _batches(responses: Sequence[Response], config: ContrastiveConfig) -> Iterator[list[Response]]:
    rng = random.Random(config.seed)
    for _ in range(config.epochs):
        order = rng.sample(list(responses), len(responses))
        for start in range(0, len(order), config.batch_size):
            yield order[start : start + config.batch_size]


def _ids(responses: Sequence[Response]) -> tuple[list[list[int]], list[list[int]]]:
    return [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
