"""GRPO with per-token rewards: `trl.GRPOTrainer` whose advantages are [B, T] instead of [B].

Two methods of TRL's are overridden. `_generate_and_score_completions` is the only place where prompt ids, completion
ids, masks and TRL's own advantages meet while rows are still in group order: TRL samples, scores the scalar rewards and
makes outcome advantages as ever; then `training.reader` gives the token rewards of the finished completions, and
`reward.credit` makes A_BT = A_outcome[:, None] + A_dense_BT, a shape that TRL's loss accepts.
`_get_per_token_logps_and_entropies` is passed through; its forwards are tapped where TRL scores a batch anyway.

Token t is paid for the state after it was read. Tool output and padding get no credit. Groups and scales are those of
the whole batch, over all processes. With dense weight 0, or without a FeatureReward, training is bit for bit TRL's.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather
from peft import PeftModel
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from mechreward.errors import InputError
from mechreward.models import unwrap
from mechreward.reward import (
    Advantages,
    FeatureReward,
    dense_advantages,
    pool,
    stage3_advantages,
    step_ends,
    token_credit,
)
from mechreward.reward.feature_reward import TokenRewards, read_tokens
from mechreward.training.batch import Scalars, completions_of, like, loss_mask, prompts_of, rows_of_all, sample
from mechreward.training.dense import DenseConfig, load_outcome_rms, no_outcome, save_outcome_rms, split_rewards
from mechreward.training.host import check_host
from mechreward.training.logging import Rollouts
from mechreward.training.reader import EXACT, ROUGH, Reader, Tap, difference, frozen_decoder

logger = logging.getLogger(__name__)


class MechRewardGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with dense rewards. Takes all of its arguments, and:

    Args:
        reward_funcs: as TRL's; FeatureRewards among them, also inside a `sum` CompositeReward, become dense.
        dense: options of the dense part.
        on_rollouts: called after each training generation with a sample of it (see `Rollouts`).

    Raises:
        InputError: an unsupported TRL version, an Unsloth-patched TRL, sequence-level importance sampling, groups of
            one, or a FeatureReward that does not fit the model.
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
        self._implied_share = parts.share
        self._has_outcome = bool(parts.scalar)
        self._on_rollouts = on_rollouts
        self._token_texts: dict[int, str] = {}
        self._ends_step: dict[int, bool] = {}
        self._tap = Tap(parts.dense if self.dense.tap else [])
        self._tap_agrees: bool | None = None
        self._frozen: torch.nn.Module | None = None
        policy = self.accelerator.unwrap_model(self.model)
        # An adapter that training started with: turned off, it leaves the model as it was.
        self._new_adapter = isinstance(policy, PeftModel) and not isinstance(model, PeftModel)
        self._check_setup(policy)

    def _check_setup(self, policy: Any) -> None:
        for reward in self.dense_rewards:
            reward.check_model(policy)
            reward.sae = reward.sae.to(self.accelerator.device)
            if self.dense.weight != 0 and not reward.gate_passed:
                name = f"{reward.name} (spec {reward.spec_hash[:12]})"
                logger.warning("%s carries no passed gate: nothing shows that it goes with right answers", name)
        copied = (
            self.dense_rewards and (self.dense.reader == "frozen" or self.dense.gap_every) and not self._new_adapter
        )
        if copied and self._sharded:
            raise InputError(
                "reader, gap_every: a frozen copy of sharded weights (FSDP, DeepSpeed) cannot be kept; train a new "
                "adapter (peft_config), or use reader='policy', gap_every=0"
            )
        if copied:
            self._frozen = frozen_decoder(policy, max(reward.layer for reward in self.dense_rewards))

    @property
    def dense_share(self) -> float:
        """Lambda at this step."""
        return self.dense.weight_at(self.state.global_step, max(1, self.state.max_steps), self._implied_share)

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **named: Any
    ) -> Any:
        tapping: AbstractContextManager[None] = nullcontext()
        reader = self._reader_of(model) if self._tap.open else None
        if reader is not None:
            tapping = self._tap.catching(reader, model, attention_mask, logits_to_keep)
        with tapping:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **named
            )

    def _reader_of(self, model: Any) -> Reader | None:
        """Which reader a scoring pass is; None for a reference that moves."""
        if self.ref_model is not None and model is self.ref_model:
            args: Any = self.args
            return None if args.sync_ref_model else "frozen"
        policy = self.accelerator.unwrap_model(self.model)
        if not isinstance(policy, PeftModel):
            return "policy"
        status = policy.get_model_status()
        # TRL scores the reference with adapters off, or with the copy named "ref" that it made at the start.
        return "policy" if status.enabled is True and "ref" not in status.active_adapters else "frozen"

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._tap.batch():
            out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode = self._mode()
        loss_mask_BT = loss_mask(out)
        if self.dense_rewards:
            self._check_batch(out, loss_mask_BT)
            reward_BT, readable_BT = self._read(out, mode)
            outcome_B = out["advantages"]
            advantages = self._advantages(out, reward_BT, readable_BT & loss_mask_BT, loss_mask_BT, mode)
            assert advantages.total_BT.shape == out["completion_ids"].shape
            if self.dense_share > 0:
                out["advantages"] = advantages.total_BT.to(outcome_B.dtype)
            if mode == "train":
                save_outcome_rms(self.state, advantages.outcome_rms)
            self._log_dense(advantages, mode)
            if mode == "train" and self.dense.gap_every and self.state.global_step % self.dense.gap_every == 0:
                self._log_gap(out, reward_BT, readable_BT & loss_mask_BT)
        else:
            reward_BT, readable_BT = torch.zeros(loss_mask_BT.shape), torch.zeros_like(loss_mask_BT)
        if self._on_rollouts is not None and mode == "train":
            self._on_rollouts(self._sample(inputs, out, reward_BT, readable_BT & loss_mask_BT))
        return out

    def _mode(self) -> str:
        policy: Any = self.model
        return "train" if policy.training else "eval"

    def _check_batch(self, out: dict[str, Any], loss_mask_BT: Tensor) -> None:
        if "pixel_values" in out:
            raise InputError("images: dense rewards read text only; this batch holds images")
        if self.state.global_step == 0 and not gather(loss_mask_BT.sum()).sum():
            raise InputError(
                f"max_completion_length: all completions of the first batch ran into {self.max_completion_length} "
                "tokens and mask_truncated_completions leaves nothing to train on; allow longer ones"
            )

    def _read(self, out: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
        """The weighted sum of all dense rewards a token, and the tokens that all of them could read."""
        started = time.perf_counter()
        parts = self._parts(out, mode)
        total_BT, all_readable_BT = self._sum(parts)
        for reward, (reward_BT, readable_BT) in zip(self.dense_rewards, parts, strict=True):
            self._log_component(reward, reward_BT, readable_BT & loss_mask(out), out, mode)
        self._metrics[mode]["dense/reader_seconds"].append(time.perf_counter() - started)
        return total_BT, all_readable_BT

    def _parts(self, out: dict[str, Any], mode: str) -> list[TokenRewards]:
        """Token rewards of each dense reward: tapped where that is known to be what our own forward reads."""
        tapped = self._tap.take(self.dense.reader)
        if tapped is None or self._tap_agrees is False:
            return self._forward(self.dense.reader, out)
        if self._tap_agrees is None:
            read = self._forward(self.dense.reader, out)
            apart = difference(tapped, read)
            if apart is None:
                return read
            self._tap_agrees = self._settle_tap(apart)
            self._metrics[mode]["dense/tap_difference"].append(apart)
            return tapped if self._tap_agrees else read
        return tapped

    def _settle_tap(self, apart: float) -> bool:
        policy = unwrap(self.accelerator.unwrap_model(self.model))
        exact = policy.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        if gather(torch.tensor(apart, device=self.accelerator.device)).max() <= (EXACT if exact else ROUGH):
            return True
        logger.warning(
            "TRL's scoring pass gives token rewards that differ by %.1f %% from an undisturbed forward (dropout, or "
            "positions shifted by padding); rewards are read by a forward of their own",
            100 * apart,
        )
        return False

    def _forward(self, reader: Reader, out: dict[str, Any]) -> list[TokenRewards]:
        """Token rewards by one forward over the unpadded rows, in evaluation mode, stopped after the last block."""
        prompts = prompts_of(out)
        completions = completions_of(out)
        # A row masked as truncated is read as one token, which no mask lets through: so all processes run as many.
        completions = [ids or prompt[-1:] for ids, prompt in zip(completions, prompts, strict=True)]
        with self._model_of(reader) as model:
            size, stop = self.dense.read_batch_size, not self._sharded
            parts = read_tokens(self.dense_rewards, model, prompts, completions, size, stop)
        mask_BT = out["completion_mask"].bool()
        padded = [tuple(like(out, values) for values in part) for part in parts]
        return [(reward_BT * mask_BT, readable_BT & mask_BT) for reward_BT, readable_BT in padded]

    @contextmanager
    def _model_of(self, reader: Reader) -> Iterator[torch.nn.Module]:
        """The decoder to read with: accelerate may wrap the whole model's forward in autocast, which no gate has."""
        policy = self.accelerator.unwrap_model(self.model)
        if reader == "frozen" and self._frozen is not None:
            yield self._frozen
            return
        adapters_off: AbstractContextManager[None] = nullcontext()
        if reader == "frozen":
            adapters_off = policy.disable_adapter()
        with adapters_off:
            yield unwrap(policy).get_decoder()

    def _sum(self, parts: list[TokenRewards]) -> TokenRewards:
        total_BT = sum(weight * values for weight, (values, _) in zip(self.dense_weights, parts, strict=True))
        assert isinstance(total_BT, Tensor)
        return total_BT, torch.stack([readable_BT for _, readable_BT in parts]).all(0)

    def _advantages(
        self, out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor, loss_mask_BT: Tensor, mode: str
    ) -> Advantages:
        """Advantages of this process's rows, centred and scaled with the rows of all."""
        group_size = int((self.num_generations if mode == "train" else self.num_generations_eval) or 1)
        masks = rows_of_all(self.accelerator, mask_BT), rows_of_all(self.accelerator, loss_mask_BT)
        if self.dense.credit == "stage3":
            prompt_lengths_B = gather(out["prompt_mask"].sum(1))
            reward_BT = rows_of_all(self.accelerator, reward_BT.masked_fill(~mask_BT, 0.0))
            scalars = self._scalars(len(reward_BT))
            outcomes = [scalars.total(row) for row in range(len(reward_BT))]
            missing = math.nan if self._has_outcome else 0.0
            outcome_B = torch.tensor([missing if value is None else value for value in outcomes]).to(reward_BT.device)
            everywhere = stage3_advantages(
                outcome_B, reward_BT, masks[1], prompt_lengths_B, group_size, self.dense_share
            )
        else:
            credit_BT = token_credit(reward_BT, mask_BT, self.dense.credit, self.dense.gamma, self._step_ends(out))
            everywhere = dense_advantages(
                gather(out["advantages"]),
                rows_of_all(self.accelerator, credit_BT),
                *masks,
                group_size=group_size,
                weight=self.dense_share,
                last_outcome_rms=load_outcome_rms(self.state),
            )
        (rows, width), first = mask_BT.shape, self.accelerator.process_index * len(mask_BT)
        own = slice(first, first + rows)
        return replace(everywhere, total_BT=everywhere.total_BT[own, :width], dense_BT=everywhere.dense_BT[own, :width])

    def _step_ends(self, out: dict[str, Any]) -> Tensor | None:
        if self.dense.credit != "step":
            return None
        return like(out, step_ends(self._tokenizer, completions_of(out), self.dense.step_end, self._ends_step))

    def _token_text(self, token: int) -> str:
        if token not in self._token_texts:
            self._token_texts[token] = str(self._tokenizer.decode([token]))
        return self._token_texts[token]

    def _log_component(
        self, reward: FeatureReward, reward_BT: Tensor, mask_BT: Tensor, out: dict[str, Any], mode: str
    ) -> None:
        ends_BT = reward.step_ends(self._tokenizer, completions_of(out))
        pooled_B = pool(reward_BT, mask_BT, reward.aggregation, None if ends_BT is None else like(out, ends_BT))
        seen_B = pooled_B[~pooled_B.isnan()]
        if len(seen_B):
            self._metrics[mode][f"rewards/{reward.name}/mean"].append(seen_B.mean().item())
            self._metrics[mode][f"rewards/{reward.name}/std"].append(seen_B.std(correction=0).item())

    def _log_dense(self, advantages: Advantages, mode: str) -> None:
        metrics = self._metrics[mode]
        metrics["dense/advantage_rms"].append(advantages.dense_rms)
        metrics["dense/outcome_advantage_rms"].append(advantages.outcome_rms)
        metrics["dense/zero_variance_groups"].append(advantages.degenerate_share)
        # Of the squared length of all advantages the part along the dense ones: 0 if they do nothing, 1 if all.
        along, total = (
            gather((part_BT * advantages.total_BT).sum()).sum().item()
            for part_BT in (advantages.dense_BT, advantages.total_BT)
        )
        metrics["dense/share"].append(along / total if total > 0 else 0.0)

    def _log_gap(self, out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor) -> None:
        """What the policy's own states add to the reward of its text: live minus frozen reader, over all tokens."""
        other: Reader = "frozen" if self.dense.reader == "policy" else "policy"
        other_BT, readable_BT = self._sum(self._forward(other, out))
        both_BT = mask_BT & readable_BT
        if both_BT.any():
            gap = (reward_BT - other_BT)[both_BT] * (1 if self.dense.reader == "policy" else -1)
            self._metrics["train"]["dense/reader_gap"].append(gap.mean().item())
            self._metrics["train"]["dense/reader_gap_rms"].append(gap.square().mean().sqrt().item())

    def _sample(
        self, inputs: list[dict[str, Any]], out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor
    ) -> Rollouts:
        rows, first = len(inputs), self.accelerator.process_index * len(inputs)
        logged, scalars = rows * self.accelerator.num_processes, self._scalars(rows * self.accelerator.num_processes)
        logs: Any = self._logs
        return sample(
            inputs,
            out,
            reward_BT,
            mask_BT,
            count=self.dense.sample_rollouts,
            step=self.state.global_step,
            texts=list(logs["completion"])[-logged:][first : first + rows],
            outcomes=[scalars.total(row) for row in range(first, first + rows)],
            token_text=self._token_text,
        )

    def _scalars(self, rows: int) -> Scalars:
        """Scalar rewards of the latest `rows`, those of all processes."""
        logs: Any = self._logs
        names = self.reward_func_names if self._has_outcome else []
        columns = [list(logs["rewards"][name])[-rows:] for name in names]
        return Scalars(columns, self.reward_weights.tolist()[: len(columns)])
