"""GRPO with per-token rewards: `trl.GRPOTrainer` whose advantages are [B, T] instead of [B].

One method of TRL's is overridden, `_generate_and_score_completions`: the only place where prompt ids, completion ids,
masks and TRL's own advantages meet while rows are still in group order. TRL samples, scores the scalar rewards and
makes outcome advantages as ever; then one teacher-forced forward, stopped after the reward's layer, reads the residual
stream of the finished completions, and `reward.credit` makes A_BT = A_outcome[:, None] + A_dense_BT, a shape that TRL's
loss accepts.

Rows are read in evaluation mode and without TRL's left padding, through `models.iter_residuals`, as the gate does. Tool
output and padding get no credit. With dense weight 0, or without a FeatureReward, training is bit for bit TRL's.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
import trl
from packaging.version import Version
from peft import PeftModel
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from mechreward.errors import InputError
from mechreward.models import find_blocks, unwrap
from mechreward.reward import Advantages, FeatureReward, dense_advantages, pool, token_credit
from mechreward.reward.feature_reward import read_tokens
from mechreward.training.dense import DenseConfig, load_outcome_rms, no_outcome, save_outcome_rms, split_rewards
from mechreward.training.logging import Rollouts

logger = logging.getLogger(__name__)

TRL_FROM, TRL_BELOW = Version("1.9"), Version("1.17.dev0")


class MechRewardGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with dense rewards. Takes all of its arguments, and:

    Args:
        reward_funcs: as TRL's; FeatureRewards among them, also inside a `sum` CompositeReward, become dense.
        dense: options of the dense part.
        on_rollouts: called after each training generation with a sample of it (see `Rollouts`).

    Raises:
        InputError: an unsupported TRL version, an Unsloth-patched TRL, sequence-level importance sampling, groups of
            one, several processes, or a FeatureReward that does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        *positional: Any,
        dense: DenseConfig | None = None,
        on_rollouts: Callable[[Rollouts], None] | None = None,
        **named: Any,
    ) -> None:
        check_host(args)
        parts = split_rewards(reward_funcs, None if args is None else args.reward_weights)
        if args is not None and args.reward_weights is not None:
            args = copy.copy(args)
            args.reward_weights = None  # TRL would count them against the scalar rewards only; set below.
        super().__init__(model, parts.scalar or [no_outcome], args, *positional, **named)
        if parts.scalar:
            self.reward_weights[: len(parts.scalar)] = torch.tensor(parts.scalar_weights)
        self.dense = dense or DenseConfig()
        self.dense_rewards = parts.dense
        self.dense_weights = parts.dense_weights
        self.dense_share = parts.share if self.dense.weight is None else self.dense.weight
        self._has_outcome = bool(parts.scalar)
        self._on_rollouts = on_rollouts
        self._token_texts: dict[int, str] = {}
        self._frozen: torch.nn.Module | None = None
        self._check_setup()

    def _check_setup(self) -> None:
        if self.accelerator.num_processes > 1:
            raise InputError(
                f"num_processes: {self.accelerator.num_processes} processes are not yet supported by "
                "MechRewardGRPOTrainer; use one"
            )
        policy = self.accelerator.unwrap_model(self.model)
        for reward in self.dense_rewards:
            reward.check_model(policy)
            reward.sae = reward.sae.to(self.accelerator.device)
            if self.dense_share > 0 and not reward.gate_passed:
                logger.warning(
                    "%s (spec %s) carries no passed gate: nothing shows that it goes with right answers on held-out "
                    "questions",
                    reward.name,
                    reward.spec_hash[:12],
                )
        if self.dense.reader == "frozen" and self.dense_rewards and not isinstance(policy, PeftModel):
            self._frozen = frozen_decoder(policy, max(reward.layer for reward in self.dense_rewards))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode = self._mode()
        loss_mask_BT = _loss_mask(out)
        if self.dense_rewards:
            reward_BT, readable_BT = self._read(out, mode)
            outcome_B = out["advantages"]
            advantages = self._advantages(out, reward_BT, readable_BT & loss_mask_BT, loss_mask_BT, mode)
            assert advantages.total_BT.shape == out["completion_ids"].shape
            if self.dense_share > 0:
                out["advantages"] = advantages.total_BT.to(outcome_B.dtype)
            if mode == "train":
                save_outcome_rms(self.state, advantages.outcome_rms)
            self._log_dense(advantages, mode)
        else:
            reward_BT, readable_BT = torch.zeros(loss_mask_BT.shape), torch.zeros_like(loss_mask_BT)
        if self._on_rollouts is not None and mode == "train":
            self._on_rollouts(self._sample(inputs, out, reward_BT, readable_BT & loss_mask_BT))
        return out

    def _mode(self) -> str:
        policy: Any = self.model
        return "train" if policy.training else "eval"

    def _read(self, out: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
        """The weighted sum of all dense rewards a token, and the tokens that all of them could read."""
        if "pixel_values" in out:
            raise InputError("images: dense rewards read text only; this batch holds images")
        started = time.perf_counter()
        prompts = _unpadded(out["prompt_ids"], out["prompt_mask"])
        completions = _unpadded(out["completion_ids"], out["completion_mask"])
        with self._reader() as reader:
            parts = read_tokens(self.dense_rewards, reader, prompts, completions, self.dense.read_batch_size)
        device, shape = out["completion_ids"].device, out["completion_ids"].shape
        total_BT = torch.zeros(shape, device=device)
        all_readable_BT = torch.ones(shape, dtype=torch.bool, device=device)
        for reward, weight, part in zip(self.dense_rewards, self.dense_weights, parts, strict=True):
            reward_BT, readable_BT = (_padded(values, shape).to(device) for values in part)
            total_BT += weight * reward_BT
            all_readable_BT &= readable_BT
            self._log_component(reward, reward_BT, readable_BT & _loss_mask(out), mode)
        self._metrics[mode]["dense/reader_seconds"].append(time.perf_counter() - started)
        return total_BT, all_readable_BT

    @contextmanager
    def _reader(self) -> Iterator[torch.nn.Module]:
        """The decoder to read with: accelerate may wrap the whole model's forward in autocast, which no gate has."""
        policy = self.accelerator.unwrap_model(self.model)
        if self._frozen is not None:
            yield self._frozen
            return
        adapters_off: AbstractContextManager[None] = nullcontext()
        if self.dense.reader == "frozen":
            adapters_off = policy.disable_adapter()
        with adapters_off:
            yield unwrap(policy).get_decoder()

    def _advantages(
        self, out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor, loss_mask_BT: Tensor, mode: str
    ) -> Advantages:
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        step_end_BT = self._step_ends(out["completion_ids"]) if self.dense.credit == "step" else None
        credit_BT = token_credit(reward_BT, mask_BT, self.dense.credit, self.dense.gamma, step_end_BT)
        return dense_advantages(
            out["advantages"],
            credit_BT,
            mask_BT,
            loss_mask_BT,
            group_size=int(group_size or 1),
            weight=self.dense_share,
            last_outcome_rms=load_outcome_rms(self.state),
        )

    def _step_ends(self, completion_ids_BT: Tensor) -> Tensor:
        ids = completion_ids_BT.unique().tolist()
        ends = [token for token in ids if self.dense.step_end in self._token_text(token)]
        return torch.isin(completion_ids_BT, torch.tensor(ends, dtype=torch.long, device=completion_ids_BT.device))

    def _token_text(self, token: int) -> str:
        if token not in self._token_texts:
            self._token_texts[token] = str(self._tokenizer.decode([token]))
        return self._token_texts[token]

    def _log_component(self, reward: FeatureReward, reward_BT: Tensor, mask_BT: Tensor, mode: str) -> None:
        pooled_B = pool(reward_BT, mask_BT, reward.aggregation)
        seen_B = pooled_B[~pooled_B.isnan()]
        if len(seen_B):
            self._metrics[mode][f"rewards/{reward.name}/mean"].append(seen_B.mean().item())
            self._metrics[mode][f"rewards/{reward.name}/std"].append(seen_B.std(correction=0).item())

    def _log_dense(self, advantages: Advantages, mode: str) -> None:
        metrics = self._metrics[mode]
        metrics["dense/advantage_rms"].append(advantages.dense_rms)
        metrics["dense/outcome_advantage_rms"].append(advantages.outcome_rms)
        metrics["dense/zero_variance_groups"].append(advantages.degenerate_share)

    def _sample(
        self, inputs: list[dict[str, Any]], out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor
    ) -> Rollouts:
        """Rows spread evenly over the batch; TRL keeps the batch's raw scalar rewards in its log buffers."""
        total = len(inputs)
        count = min(self.dense.sample_rollouts, total)
        # The offset moves on each step so that not every sample is the first of its group.
        rows = sorted({(i * total // count + self.state.global_step) % total for i in range(count)}) if count else []
        logs: Any = self._logs
        completions = _unpadded(out["completion_ids"], out["completion_mask"])
        scalars = [list(logs["rewards"][name])[-total:] for name in self.reward_func_names]
        texts = list(logs["completion"])[-total:]
        pooled_B = pool(reward_BT, mask_BT, "mean").tolist()
        return Rollouts(
            step=self.state.global_step + 1,
            question_ids=[str(inputs[row].get("question_id", "")) for row in rows],
            prompts=[inputs[row]["prompt"] for row in rows],
            completions=[texts[row] for row in rows],
            tokens=[[self._token_text(token) for token in completions[row]] for row in rows],
            token_rewards=[reward_BT[row, : len(completions[row])].tolist() for row in rows],
            outcomes=[self._outcome([values[row] for values in scalars]) for row in rows],
            feature_rewards=[pooled_B[row] for row in rows],
        )

    def _outcome(self, values: list[float]) -> float | None:
        """The weighted sum of the scalar rewards that are there; None if there are none."""
        weights = self.reward_weights.tolist()
        seen = [weight * value for weight, value in zip(weights, values, strict=True) if value == value]
        return sum(seen) if seen and self._has_outcome else None


def check_host(args: GRPOConfig | None) -> None:
    """Refuses what would train something else than it says.

    Raises:
        InputError: naming the setting, its value and what is allowed.
    """
    installed = Version(version("trl"))
    if not TRL_FROM <= installed < TRL_BELOW:
        raise InputError(f"trl: version {installed} is installed; token advantages are tested with >=1.9,<1.17")
    if trl.GRPOTrainer.__module__ != "trl.trainer.grpo_trainer" or GRPOTrainer.__module__ != "trl.trainer.grpo_trainer":
        raise InputError(f"trl: GRPOTrainer was replaced by {trl.GRPOTrainer.__module__} (Unsloth does); use TRL's own")
    if args is None:
        return
    if args.importance_sampling_level != "token":
        raise InputError(
            f"importance_sampling_level: {args.importance_sampling_level!r} spreads each token's advantage over its "
            "whole completion; dense rewards need 'token'"
        )
    if args.num_generations is not None and args.num_generations < 2:
        raise InputError(f"num_generations: {args.num_generations}; a group needs at least 2 completions")
    if args.use_liger_kernel and "compute_liger_loss" in vars(GRPOTrainer):
        raise InputError("use_liger_kernel: True; this TRL's Liger loss takes no token advantages, set it to False")


def frozen_decoder(model: Any, layer: int) -> torch.nn.Module:
    """A copy of the model's decoder as it is now, without the blocks after `layer`, taking no gradient."""
    decoder = copy.deepcopy(unwrap(model).get_decoder())
    del find_blocks(decoder)[layer + 1 :]
    return decoder.eval().requires_grad_(False)


def _loss_mask(out: dict[str, Any]) -> Tensor:
    mask_BT = out["completion_mask"].bool()
    return mask_BT & out["tool_mask"].bool() if "tool_mask" in out else mask_BT


def _unpadded(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT.bool(), strict=True)]


def _padded(values_BT: Tensor, shape: torch.Size) -> Tensor:
    """Right-pads with zeros to the trainer's width (`pad_to_multiple_of`, rows masked as truncated)."""
    assert values_BT.shape[0] == shape[0] and values_BT.shape[1] <= shape[1], (values_BT.shape, shape)
    return torch.nn.functional.pad(values_BT, (0, shape[1] - values_BT.shape[1]))
