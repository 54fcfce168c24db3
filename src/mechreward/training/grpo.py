"""GRPO with per-token rewards: `trl.GRPOTrainer` whose advantages are [B, T] instead of [B].

The heart is one method of TRL's. `_generate_and_score_completions` is the only place where prompt ids, completion
ids, masks and TRL's own advantages meet while rows are still in group order: TRL samples, scores the scalar rewards and
makes outcome advantages as ever; then `training.reader` gives the token rewards of the finished completions, and
`reward.credit` makes A_BT = A_outcome[:, None] + A_dense_BT, a shape that TRL's loss accepts.
`_get_per_token_logps_and_entropies` is passed through; its forwards are tapped where TRL scores a batch anyway. So are
`_generate_single_turn`, for the cache (`training.generation`), and `_calculate_rewards`, to refuse infinities.

Token t is paid for the state after it was read. Tool output and padding get no credit. Groups and scales are those of
the whole batch, over all processes. With dense weight 0, or without a FeatureReward, training is bit for bit TRL's (on
CUDA with `fast_rollouts` off: a compiled model rounds differently). The KL term is `args.beta`, the user's: 0 if unset,
as in TRL, and then a warning says so. `train_arm` has one by default.

A scalar reward that is None or NaN says nothing of its row, as in TRL: the other rewards are summed, and a row without
any has outcome advantage 0. Infinity is an error, of a scalar or a dense reward: TRL would train on the largest float.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate.utils import gather
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from mechreward.hacking import DualVerifier
from mechreward.models import unwrap
from mechreward.reward import Advantages, dense_advantages, stage3_advantages, step_ends, token_credit
from mechreward.reward.feature_reward import TokenRewards, read_tokens
from mechreward.training.batch import completions_of, like, loss_mask, prompts_of, rows_of_all, sample, totals
from mechreward.training.checks import check_batch, check_rewards, check_scalar_rewards, check_token_rewards
from mechreward.training.dense import DenseConfig, load_outcome_rms, no_outcome, save_outcome_rms, split_rewards
from mechreward.training.generation import Decoding, decoding_cache
from mechreward.training.guard import Event, Guard
from mechreward.training.host import check_host
from mechreward.training.last_good import GuardCallback
from mechreward.training.logging import Rollouts
from mechreward.training.metrics import Metrics, component_metrics, dense_metrics, gap_metrics, numbered
from mechreward.training.reader import (
    Reader,
    Tap,
    Trust,
    decoder_of,
    fresh_adapter,
    frozen_decoder,
    reader_of,
    refuse_sharded,
)
from mechreward.training.shaping import shaped


class MechRewardGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with dense rewards. Takes all of its arguments, and:

    Args:
        reward_funcs: as TRL's; FeatureRewards among them, also inside a `sum` CompositeReward, become dense.
        dense: options of the dense part.
        on_rollouts: called after each training generation with a sample of it (see `Rollouts`), on the main process.
        dual, on_guard: a second opinion on every rollout, and what is told of what the guards find: see `Guard`.

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
        dual: DualVerifier | None = None,
        on_guard: Callable[[Event], None] | None = None,
        **named: Any,
    ) -> None:
        check_host(args, credit=None if dense is None else dense.credit)
        parts = split_rewards(reward_funcs, None if args is None else args.reward_weights)
        if args is not None and args.reward_weights is not None:
            args = copy.copy(args)
            args.reward_weights = None  # TRL would count them against the scalar rewards only; set below.
        classes = named.get("reward_processing_classes")
        if isinstance(classes, list) and parts.dense:
            named["reward_processing_classes"] = parts.classes_of_scalar(classes)
        super().__init__(model, parts.scalar or [no_outcome] * bool(parts.dense), args, *positional, **named)
        if self.reward_funcs[0] is no_outcome and len(self.reward_funcs) > 1:
            self._drop_placeholder()
        if parts.scalar:
            self.reward_weights[: len(parts.scalar)] = torch.tensor(parts.scalar_weights)
        self.dense = dense or DenseConfig()
        self.dense_rewards = parts.dense
        self.dense_weights = parts.dense_weights
        self._implied_share = parts.share
        parts.check_share(self.dense.weight)
        names = numbered([*self.reward_func_names, *(reward.name for reward in parts.dense)])
        self._dense_names = names[len(self.reward_func_names) :]
        self._has_outcome = self.reward_funcs != [no_outcome]
        self._on_rollouts = on_rollouts
        self._token_texts: dict[int, str] = {}
        self._ends_step: dict[int, bool] = {}
        self._tap = Tap(parts.dense if self.dense.tap else [])
        self._frozen: torch.nn.Module | None = None
        policy = self.accelerator.unwrap_model(self.model)
        exact = unwrap(policy).dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        self._trust = Trust(self.accelerator.device, exact, every=self.dense.gap_every or 10)
        self._new_adapter = fresh_adapter(policy, model)
        self._check_setup(policy)
        self.guard = Guard(self, dual, on_guard)
        self.add_callback(GuardCallback(self.guard))
        kind = self._decoding_cache(policy) if self.dense.fast_rollouts else None
        self._decoding = None if kind is None else Decoding(kind)

    def _drop_placeholder(self) -> None:
        """Where an environment pays, beside which 0 would be the reward of a row that it leaves unpaid."""
        for kept in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
            assert isinstance(kept, list)
            del kept[0]
        self.reward_weights = self.reward_weights[1:]

    def _decoding_cache(self, policy: Any) -> Literal["static", "roomy"] | None:
        args: Any = self.args
        one_turn = not self.tools and self.rollout_func is None
        return decoding_cache(args, policy, self.accelerator.device, one_turn=one_turn, sharded=self._sharded)

    def _generate_single_turn(self, *args: Any, **named: Any) -> Any:
        policy = self.accelerator.unwrap_model(self.model)
        with nullcontext() if self._decoding is None else self._decoding.of(policy):
            return super()._generate_single_turn(*args, **named)

    def _calculate_rewards(self, *args: Any, **named: Any) -> Tensor:
        rewards_BN: Tensor = super()._calculate_rewards(*args, **named)
        check_scalar_rewards(rewards_BN, self.reward_func_names)
        self._rewards_BN = rewards_BN
        return rewards_BN

    def _check_setup(self, policy: Any) -> None:
        check_rewards(self.dense_rewards, policy, trains=self.dense.weight != 0, credit=self.dense.credit)
        moved = {sae: sae.to(self.accelerator.device) for sae in {reward.sae for reward in self.dense_rewards}}
        for reward in self.dense_rewards:
            reward.sae = moved[reward.sae]
        copied = (
            self.dense_rewards and (self.dense.reader == "frozen" or self.dense.gap_every) and not self._new_adapter
        )
        if copied:
            refuse_sharded(self._sharded, "reader, gap_every", "use reader='policy', gap_every=0")
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
        reader: Reader | None = None
        if self._tap.open:
            options: Any = self.args
            policy = self.accelerator.unwrap_model(self.model)
            reader = reader_of(model, policy, self.ref_model, options.sync_ref_model)
        if reader == self.dense.reader and self._trust.allows(model):
            tapping = self._tap.catching(reader, model, attention_mask, logits_to_keep)
        with tapping:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **named
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = [row["prompt"] for row in inputs if "prompt" in row]  # an environment may write its own
        for reward in self.dense_rewards:
            reward.check_prompts(prompts, self._tokenizer)
        with self._tap.batch():
            out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode = self._mode()
        loss_mask_BT = loss_mask(out)
        if self.dense_rewards:
            check_batch(out, loss_mask_BT, first=self.state.global_step == 0, longest=self.max_completion_length)
            reward_BT, readable_BT = self._read(out, mode)
            # What is added to the rewards trains; guards, gap and rollouts judge what was read.
            shaped_BT = shaped(self, out, reward_BT, readable_BT & loss_mask_BT)
            outcome_B = out["advantages"]
            advantages = self._advantages(out, shaped_BT, readable_BT & loss_mask_BT, loss_mask_BT, mode)
            assert advantages.total_BT.shape == out["completion_ids"].shape
            if self.dense_share > 0:
                out["advantages"] = advantages.total_BT.to(outcome_B.dtype)
            if mode == "train":
                save_outcome_rms(self.state, advantages.outcome_rms)
                self.guard.act(out, reward_BT, readable_BT & loss_mask_BT, loss_mask_BT)
            self._log_numbers(mode, dense_metrics(advantages))
            if mode == "train" and self.dense.gap_every and self.state.global_step % self.dense.gap_every == 0:
                self._log_numbers(mode, self._gap(out, reward_BT, readable_BT & loss_mask_BT))
        else:
            reward_BT, readable_BT = torch.zeros(loss_mask_BT.shape), torch.zeros_like(loss_mask_BT)
        if self._on_rollouts is not None and mode == "train":
            mask_BT = readable_BT & loss_mask_BT
            rollouts = self._sample(inputs, out, reward_BT.masked_fill(~mask_BT, 0.0), mask_BT)
            if self.accelerator.is_main_process:
                self._on_rollouts(rollouts)
        return out

    def _mode(self) -> str:
        policy: Any = self.model
        return "train" if policy.training else "eval"

    def _read(self, out: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
        """The weighted sum of all dense rewards a token, and the tokens that all of them could read."""
        started = time.perf_counter()
        parts = self._parts(out, mode)
        total_BT, all_readable_BT = self._sum(parts)
        named = zip(self.dense_rewards, self._dense_names, parts, strict=True)
        for reward, name, (reward_BT, readable_BT) in named:
            check_token_rewards(reward, reward_BT, readable_BT)
            ends_BT = reward.step_ends(self._tokenizer, completions_of(out))
            ends_BT = None if ends_BT is None else like(out, ends_BT)
            mask_BT = readable_BT & loss_mask(out)
            self._log_numbers(mode, component_metrics(reward, name, reward_BT, mask_BT, ends_BT))
        self._metrics[mode]["dense/reader_seconds"].append(time.perf_counter() - started)
        return total_BT, all_readable_BT

    def _parts(self, out: dict[str, Any], mode: str) -> list[TokenRewards]:
        """Token rewards of each dense reward: tapped where that is known to be what our own forward reads. Evaluation
        decides nothing: the model is not then as it trains."""
        tapped, trust, trains = self._tap.take(self.dense.reader), self._trust, mode == "train"
        step, prompt_mask_BP = self.state.global_step, out["prompt_mask"]
        if tapped is not None and trust.agrees and not (trains and trust.due(step, prompt_mask_BP)):
            return tapped
        read = self._forward(self.dense.reader, out)
        if tapped is None or not trains:
            return read
        apart = trust.compare(tapped, read, step, prompt_mask_BP)
        if apart is not None:
            self._metrics[mode]["dense/tap_difference"].append(apart)
        return tapped if trust.agrees else read

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

    def _model_of(self, reader: Reader) -> AbstractContextManager[torch.nn.Module]:
        policy = self.accelerator.unwrap_model(self.model)
        return decoder_of(reader, policy, wrapped=self.model_wrapped, frozen=self._frozen)

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
            missing = math.nan if self._has_outcome else 0.0
            outcome_B = torch.tensor([missing if value is None else value for value in self._outcomes()])
            outcome_B = outcome_B.to(reward_BT.device)
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

    def _log_numbers(self, mode: str, numbers: Metrics) -> None:
        for name, value in numbers.items():
            self._metrics[mode][name].append(value)

    def _gap(self, out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor) -> Metrics:
        """The other reader's rewards of the same batch beside those that train."""
        other: Reader = "frozen" if self.dense.reader == "policy" else "policy"
        other_BT, readable_BT = self._sum(self._forward(other, out))
        live_BT, frozen_BT = (reward_BT, other_BT) if other == "frozen" else (other_BT, reward_BT)
        return gap_metrics(live_BT, frozen_BT, mask_BT & readable_BT)

    def _sample(
        self, inputs: list[dict[str, Any]], out: dict[str, Any], reward_BT: Tensor, mask_BT: Tensor
    ) -> Rollouts:
        logs: Any = self._logs
        prompts, texts = (list(logs[name])[-len(self._rewards_BN) :] for name in ("prompt", "completion"))
        return sample(
            self.accelerator,
            inputs,
            out,
            reward_BT,
            mask_BT,
            count=self.dense.sample_rollouts,
            step=self.state.global_step,
            prompts=prompts,
            texts=texts,
            outcomes=self._outcomes(),
            token_text=self._token_text,
        )

    def _outcomes(self) -> list[float | None]:
        """Weighted sums of the scalar rewards of the latest batch, of the rows of all processes."""
        return totals(self._rewards_BN, self.reward_weights) if self._has_outcome else [None] * len(self._rewards_BN)
