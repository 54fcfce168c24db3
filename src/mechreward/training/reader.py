"""Where the trainer's token rewards come from: TRL's own scoring forward, tapped, or one truncated forward of ours.

TRL runs a forward without gradient over each finished batch where it needs log-probabilities of the sampling policy
(vLLM, or optimisation not aligned with generation) or of the reference model (beta > 0). A `Tap` hooks the blocks of
that forward and scores each micro-batch as it passes, so that no residual is kept. Without such a pass, `read_tokens`
runs the decoder up to the last block that is read.

The two differ in how they run: a tapped forward has TRL's left padding, the model's mode (dropout, if it has any) and
the trainer's autocast; ours has none of them, as the gate has none. A model with dropout is never tapped (`dropout`).
Otherwise `difference` compares the two in training, and a trainer goes on with the tap only where they agree (`Trust`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import gather
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mechreward.errors import InputError
from mechreward.models import find_blocks, find_decoder
from mechreward.reward import FeatureReward
from mechreward.reward.feature_reward import TokenRewards

logger = logging.getLogger(__name__)

Reader = Literal["policy", "frozen"]
EXACT, ROUGH = 1e-3, 5e-2
"""How far the two roads may differ, as a share of the mean size of a token reward: in float32, and where half precision
rounds differently from one padding to the next."""


class Tap:
    """Token rewards caught while TRL scores a batch, by reader.

    Args:
        rewards: what to score with.
    """

    def __init__(self, rewards: Sequence[FeatureReward]) -> None:
        self.rewards = list(rewards)
        self.open = False
        """Whether a batch is being scored; the loss runs the same forward and is left alone."""
        self._caught: dict[Reader, list[TokenRewards]] = {}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Opens the tap for one batch; what was caught before is let go."""
        self._caught = {}
        self.open = bool(self.rewards)
        try:
            yield
        finally:
            self.open = False

    def take(self, reader: Reader) -> list[TokenRewards] | None:
        """What was caught of this batch: for each reward its values and mask; None if that model did not run."""
        return self._caught.get(reader)

    @contextmanager
    def catching(self, reader: Reader, model: nn.Module, mask_BS: Tensor, width: int) -> Iterator[None]:
        """Scores the forwards of `model` inside, which together take the rows of `mask_BS` in order.

        Args:
            mask_BS: attention mask of prompts, padded on the left, and completions, padded on the right.
            width: positions of the completions, at the end.
        """
        layers = sorted({reward.layer for reward in self.rewards})
        blocks, states, mask_BT = find_blocks(model), {}, mask_BS[:, -width:].bool()
        pieces: list[list[TokenRewards]] = []

        def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
            states[layer] = (output[0] if isinstance(output, tuple) else output)[:, -width:]
            if layer == layers[-1]:
                start = sum(len(piece[0][0]) for piece in pieces)
                rows_BT = mask_BT[start : start + len(states[layer])]
                pieces.append([self._score(reward, states[reward.layer], rows_BT) for reward in self.rewards])
                states.clear()

        with ExitStack() as hooks:
            for layer in layers:
                handle = blocks[layer].register_forward_hook(lambda _m, _i, output, layer=layer: keep(layer, output))
                hooks.callback(handle.remove)
            yield
        assert sum(len(piece[0][0]) for piece in pieces) == len(mask_BT), "each row is scored once"
        self._caught[reader] = [
            (torch.cat([values for values, _ in parts]), torch.cat([mask for _, mask in parts]))
            for parts in zip(*pieces, strict=True)
        ]

    @staticmethod
    def _score(reward: FeatureReward, h_BTD: Tensor, mask_BT: Tensor) -> TokenRewards:
        return reward.score_tokens(h_BTD.float(), mask_BT)


@dataclass
class Trust:
    """Whether what a tap catches is what a forward of our own reads; a batch may hide that it is not.

    Prompts of one length show no shift by padding, and an adapter that is still 0 shows nothing of what it will do. So
    the two are compared on the first batch of training, on the first with left padding, and regularly.
    """

    device: torch.device
    exact: bool
    """Whether both run in float32."""
    every: int
    """Steps between comparisons."""
    agrees: bool | None = None
    """None before the first comparison; False is final."""
    compared_at: int = 0
    """Steps done at the last comparison."""
    padded: bool = False
    """Whether a batch with left padding was compared."""

    def allows(self, model: nn.Module) -> bool:
        """Whether a forward of `model` as it is now may be tapped: not with dropout, which says so once."""
        if self.agrees is not False and (found := dropout(model)) is not None:
            logger.warning(
                "dropout: %s of the model is on in TRL's scoring pass; rewards are read by a forward of their own",
                found,
            )
            self.agrees = False
        return self.agrees is not False

    def due(self, step: int, prompt_mask_BP: Tensor) -> bool:
        """Whether to compare the two on this batch, before step `step`; called by all processes at the same time."""
        if self.agrees is None or step - self.compared_at >= self.every:
            return True
        return not self.padded and _pads(prompt_mask_BP)

    def compare(
        self, tapped: Sequence[TokenRewards], read: Sequence[TokenRewards], step: int, prompt_mask_BP: Tensor
    ) -> float | None:
        """How far the two are apart on this batch of all processes; None, and nothing learnt, if it has no rewards."""
        share = largest(difference(tapped, read), self.device)
        if share is not None:
            self.padded, self.compared_at = self.padded or _pads(prompt_mask_BP), step
            self.agrees = agrees(share, EXACT if self.exact else ROUGH)
        return share


def _pads(mask_BP: Tensor) -> bool:
    """Whether a row of any process is padded."""
    return bool(gather((mask_BP == 0).any()[None]).any())


def dropout(model: nn.Module) -> str | None:
    """The first part of the decoder that drops something as the model is now, with its share; None if none does.

    Attention takes its share from a field of the module (`attention_dropout`), not from an `nn.Dropout`.
    """
    for name, module in find_decoder(model).named_modules():
        fields = ("p",) if isinstance(module, nn.Dropout) else [key for key in vars(module) if "drop" in key]
        for key in fields if module.training else ():
            share = getattr(module, key)
            if isinstance(share, float) and share > 0:
                return f"{name}.{key}={share}"
    return None


def difference(tapped: Sequence[TokenRewards], read: Sequence[TokenRewards]) -> float | None:
    """Mean difference of two readings of a batch, as a share of the mean size of a token reward; the largest of all
    rewards. None where no token has a reward that is not 0, which says nothing."""
    shares = []
    for (tap_BT, mask_BT), (read_BT, read_mask_BT) in zip(tapped, read, strict=True):
        either_BT = mask_BT | read_mask_BT
        size = read_BT[either_BT].abs().sum().item()
        if size > 0:
            shares.append((tap_BT - read_BT)[either_BT].abs().sum().item() / size)
    return max(shares, default=None)


def largest(share: float | None, device: torch.device) -> float | None:
    """The largest difference of all processes; None where none of them has one."""
    shares = gather(torch.tensor([math.nan if share is None else share], device=device))
    seen = shares[~shares.isnan()]
    return seen.max().item() if len(seen) else None


def agrees(share: float, allowed: float) -> bool:
    """Whether a tap may be trusted that differs by `share`; warns if not."""
    if share <= allowed:
        return True
    logger.warning(
        "TRL's scoring pass gives token rewards that differ by %.1f %% from an undisturbed forward (positions shifted "
        "by padding, say); rewards are read by a forward of their own",
        100 * share,
    )
    return False


def fresh_adapter(policy: Any, given: Any) -> bool:
    """Whether training of the `given` model began with a new adapter which, turned off, leaves the model as it was."""
    return isinstance(policy, PeftModel) and not isinstance(given, PeftModel) and _only_adapters_learn(policy)


def reader_of(model: Any, policy: nn.Module, reference: Any, reference_moves: bool) -> Reader | None:
    """Which reader `model`, which TRL scores with, is now; None for a reference that moves."""
    if reference is not None and model is reference:
        return None if reference_moves else "frozen"
    return policy_or_frozen(policy)


def policy_or_frozen(policy: nn.Module) -> Reader | None:
    """Which reader the policy is as it is now: TRL scores the reference with adapters off, or with the copy named "ref"
    that it made at the start. None where that is neither, as the model itself is trained beside them."""
    if not isinstance(policy, PeftModel):
        return "policy"
    status = policy.get_model_status()
    if status.enabled is True and "ref" not in status.active_adapters:
        return "policy"
    return "frozen" if _only_adapters_learn(policy) else None


def _only_adapters_learn(policy: PeftModel) -> bool:
    """LoRA may train biases of the model itself, which stay when it is turned off."""
    return bool(policy.active_peft_config.to_dict().get("bias", "none") == "none")


def refuse_sharded(sharded: bool, asked: str, instead: str) -> None:
    """Raises InputError where `asked` needs a copy of weights that are sharded."""
    if sharded:
        raise InputError(
            f"{asked}: a frozen copy of sharded weights (FSDP, DeepSpeed) cannot be kept; train a new adapter "
            f"(peft_config), or {instead}"
        )


@contextmanager
def decoder_of(reader: Reader, policy: Any, wrapped: nn.Module, frozen: nn.Module | None) -> Iterator[nn.Module]:
    """The decoder to read with: accelerate may wrap the whole model's forward in autocast, which no gate has.

    Args:
        policy: as it is trained, without what wraps it for that.
        wrapped: the same in its wrappers.
        frozen: a copy of the decoder that training started with; None where turning the adapters off gives that.
    """
    if reader == "frozen" and frozen is not None:
        yield frozen
        return
    adapters_off: AbstractContextManager[None] = policy.disable_adapter() if reader == "frozen" else nullcontext()
    with adapters_off, _root_gathered(wrapped):
        yield find_decoder(policy)


def _root_gathered(wrapped: nn.Module) -> AbstractContextManager[None]:
    """FSDP 1 keeps what stands outside the blocks (the embedding) in shards until the whole model's forward: gathers
    it, as TRL does to generate. The blocks gather themselves."""
    if not isinstance(wrapped, FullyShardedDataParallel):
        return nullcontext()
    gathered: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
        wrapped, recurse=False, writeback=False
    )
    return gathered


def frozen_decoder(model: Any, layer: int) -> nn.Module:
    """A copy of the model's decoder as it is now, without the blocks after `layer`, taking no gradient."""
    decoder = copy.deepcopy(find_decoder(model))
    del find_blocks(decoder)[layer + 1 :]
    return decoder.eval().requires_grad_(False)
