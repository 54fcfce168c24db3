"""The guards inside the trainer: every training batch is looked at, and flagged rollouts are acted on in the same step.

What costs nothing is measured on every batch (reward against outcome, repetition, entropy). States on the frozen base
model (the probe's verdict, reader drift, reconstruction) take a truncated forward: with a DualVerifier on every batch,
without one at the steps of `DenseConfig.gap_every`. In adapter training the base is the model with adapters off; else a
copy of the decoder, up to the last block read.

Nothing is done where the dense part does not train (lambda 0): the step is then TRL's bit for bit.

When `GuardConfig.patience` evaluations in a row have a finding the run stops after the step; in the last one a single
finding will do, since nothing comes after it that could clear the policy. The last good policy is kept beside the
checkpoints (`good/`), see `last_good`.
What the detector remembers is in the trainer state, so that a resumed run judges the same, and one that was stopped
stays so (`why_stopped`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather
from jaxtyping import Bool
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from mechreward.features.steps import step_ends
from mechreward.hacking import (
    DualVerifier,
    HackingDetector,
    HackingReport,
    RolloutBatch,
    act_on_rollouts,
    repetition,
    row_fvu,
)
from mechreward.models import check_layer, find_blocks, iter_blocks
from mechreward.reward import pool
from mechreward.training.batch import completions_of, like, loss_mask, prompts_of
from mechreward.training.reader import frozen_decoder, refuse_sharded

if TYPE_CHECKING:
    from mechreward.training.grpo import MechRewardGRPOTrainer

_STATE_KEY = "MechRewardGuard"
Event = dict[str, Any]


class Guard:
    """The guards of one trainer.

    Args:
        trainer: whose batches are watched; `trainer.dense.guard` says how.
        dual: the second opinion, if there is one.
        on_event: called with `step`, `findings`, `flagged` and `stop` of each evaluation that has a finding, on the
            main process.

    Raises:
        InputError: if the dual verifier's blocks are not the model's, or it needs a copy of sharded weights.
    """

    def __init__(
        self, trainer: MechRewardGRPOTrainer, dual: DualVerifier | None, on_event: Callable[[Event], None] | None
    ) -> None:
        self.config = trainer.dense.guard
        self.trainer = trainer
        self.dual = dual
        self.detector = HackingDetector(self.config)
        self.stopped: str | None = None
        """Why the run was stopped."""
        self.report: HackingReport | None = None
        self.entropy: float | None = None
        self._on_event = on_event
        self._loaded = False
        if dual is not None:
            self._prepare_probe(dual)

    def _prepare_probe(self, dual: DualVerifier) -> None:
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for layer in dual.layers:
            check_layer(policy, layer)
        dual.probe = dual.probe.to(self.trainer.accelerator.device)
        deepest = max([*dual.layers, *(reward.layer for reward in self.trainer.dense_rewards)])
        frozen = self.trainer._frozen
        if not self.trainer._new_adapter and (frozen is None or len(find_blocks(frozen)) <= deepest):
            refuse_sharded(self.trainer._sharded, "dual", "give no dual verifier")
            self.trainer._frozen = frozen_decoder(policy, deepest)

    @property
    def active(self) -> bool:
        """Whether there is anything to guard: dense rewards that train."""
        return self.config.on and bool(self.trainer.dense_rewards) and self.trainer.dense_share > 0

    def act(self, out: dict[str, Any], reward_BT: Tensor, mask_BT: Bool[Tensor, "b t"], loss_mask_BT: Tensor) -> None:
        """Judges a batch whose advantages are made, and changes those of flagged rollouts in `out`.

        Args:
            reward_BT: summed token rewards of the reader that trains.
            mask_BT: tokens that have one and are trained on.
        """
        if not self.active:
            return
        self._recall()
        size = int(self.trainer.num_generations or 1)
        pooled_B = pool(reward_BT, mask_BT, "mean")
        outcome_B = self._outcomes(len(pooled_B)).to(pooled_B.device)
        frozen = self._read_frozen(out, mask_BT) if self._reads_frozen() else None
        disagreement_B = self._disagreement(frozen, outcome_B)
        batch = RolloutBatch(
            group_size=size,
            reward_B=gather(pooled_B),
            outcome_B=gather(outcome_B),
            repetition_B=gather(repetition(completions_of(out)).to(pooled_B.device)),
            frozen_reward_B=None if frozen is None else gather(frozen["reward"]),
            fvu_B=None if frozen is None else gather(frozen["fvu"]),
            disagreement_B=None if disagreement_B is None else gather(disagreement_B),
            entropy=self.entropy,
        )
        report = self.detector.check(batch)
        self.report = replace(report, stop=report.stop or (self._is_last() and bool(report.findings)))
        first = self.trainer.accelerator.process_index * len(pooled_B)
        flagged_B = self.report.flagged_B[first : first + len(pooled_B)]
        self._apply(out, flagged_B, loss_mask_BT, size)
        if self.dual is not None and self.dual.steps and frozen is not None and frozen["steps"] is not None:
            out["advantages"] = out["advantages"].masked_fill(frozen["steps"], 0.0)
        self._tell(batch)
        self._remember()

    def _is_last(self) -> bool:
        """Whether training ends with this batch."""
        args: Any = self.trainer.args
        state = self.trainer.state
        steps = args.steps_per_generation * self.trainer.num_iterations // args.gradient_accumulation_steps
        return 0 < state.max_steps <= state.global_step + max(1, steps)

    def _apply(self, out: dict[str, Any], flagged_B: Tensor, loss_mask_BT: Tensor, size: int) -> None:
        action = self.config.action if self.dual is None else self.dual.action
        factor = self.config.downweight_factor if self.dual is None else self.dual.downweight_factor
        if flagged_B.any():
            out["advantages"], kept_BT = act_on_rollouts(
                out["advantages"], loss_mask_BT, flagged_B, action, group_size=size, factor=factor
            )
            if action == "drop":
                out["completion_mask"] = out["completion_mask"] * kept_BT.any(1, keepdim=True)
        if action == "drop":  # by all processes, whichever of them has flagged rows
            out["num_items_in_batch"] = gather(loss_mask(out).sum()).sum()

    def _outcomes(self, rows: int) -> Tensor:
        first = self.trainer.accelerator.process_index * rows
        totals = self.trainer._outcomes()[first : first + rows]
        return torch.tensor([float("nan") if total is None else total for total in totals])

    def _reads_frozen(self) -> bool:
        if self.dual is not None:
            return True
        every = self.trainer.dense.gap_every
        return bool(every) and self.trainer.state.global_step % every == 0

    @torch.no_grad()
    def _read_frozen(self, out: dict[str, Any], mask_BT: Tensor) -> dict[str, Any]:
        """What the frozen model's states say of each row: reward, FVU, the probe's probability, flagged steps."""
        rewards, weights = self.trainer.dense_rewards, self.trainer.dense_weights
        prompts, completions = prompts_of(out), completions_of(out)
        completions = [ids or prompt[-1:] for ids, prompt in zip(completions, prompts, strict=True)]
        layers = [reward.layer for reward in rewards] + (self.dual.layers if self.dual else [])
        found = {
            name: mask_BT.new_full((len(mask_BT),), torch.nan, dtype=torch.float32)
            for name in ("reward", "fvu", "score", "probe")
        }
        steps_BT = torch.zeros_like(mask_BT) if self.dual is not None and self.dual.steps else None
        ends_BT = None
        if steps_BT is not None:
            ends_BT = like(out, step_ends(self.trainer._tokenizer, completions, self.trainer.dense.step_end))
        size, stop = self.trainer.dense.read_batch_size, not self.trainer._sharded
        with self.trainer._model_of("frozen") as model:
            for batch in iter_blocks(model, prompts, completions, layers, size, stop):
                rows, width = batch.rows, batch.mask_BT.shape[1]
                here_BT = mask_BT[rows, :width] & batch.mask_BT
                scored = [reward.score_tokens(batch.h_BTD[reward.layer], batch.mask_BT)[0] for reward in rewards]
                total_BT = sum(w * values_BT for w, values_BT in zip(weights, scored, strict=True))
                assert isinstance(total_BT, Tensor)
                found["reward"][rows] = pool(total_BT, here_BT, "mean")
                h_BTD = batch.h_BTD[rewards[0].layer]
                found["fvu"][rows] = row_fvu(rewards[0].sae, h_BTD, here_BT, self.config.fvu_tokens)
                if self.dual is not None:
                    h_probe_BTD = batch.h_BTD[self.dual.layers[1]]
                    found["score"][rows] = pool(scored[self._judged()], here_BT, "mean")
                    found["probe"][rows] = self.dual.probe.row_proba(h_probe_BTD, here_BT)
                    if steps_BT is not None and ends_BT is not None:
                        steps_BT[rows, :width] = self.dual.judge_steps(
                            scored[self._judged()], h_probe_BTD, here_BT, ends_BT[rows, :width]
                        )
        return {**found, "steps": steps_BT}

    def _judged(self) -> int:
        """Place of the dual verifier's reward among the dense ones."""
        assert self.dual is not None
        hashes = [reward.spec_hash for reward in self.trainer.dense_rewards]
        wanted = self.dual.feature_reward.spec_hash
        return hashes.index(wanted) if wanted in hashes else 0

    def _disagreement(self, frozen: dict[str, Any] | None, outcome_B: Tensor) -> Tensor | None:
        if self.dual is None or frozen is None:
            return None
        flagged_B = self.dual.verdicts(frozen["score"], frozen["probe"]).flagged
        everywhere_B = gather(outcome_B)
        seen_B = everywhere_B[~everywhere_B.isnan()]
        if len(seen_B) and seen_B.min() < seen_B.max():
            right_B = (everywhere_B > (seen_B.min() + seen_B.max()) / 2).float()
            right_B = right_B.masked_fill(everywhere_B.isnan(), torch.nan)
            self.dual.observe(gather(frozen["score"]), right_B)
        return flagged_B

    def _tell(self, batch: RolloutBatch) -> None:
        report = self.report
        assert report is not None
        numbers = {"guard/flagged": report.flag_rate, "guard/findings": float(len(report.findings))}
        numbers |= {"guard/streak": float(report.streak), "guard/repetition": float(batch.repetition_B.mean())}
        for name, values_B in (("guard/fvu", batch.fvu_B), ("guard/frozen_reward", batch.frozen_reward_B)):
            if values_B is not None and (~values_B.isnan()).any():
                numbers[name] = float(values_B.nanmean())
        if batch.disagreement_B is not None:
            numbers["guard/disagreement"] = float(batch.disagreement_B.float().mean())
        self.trainer._log_numbers("train", numbers)
        if report.findings and self._on_event is not None and self.trainer.accelerator.is_main_process:
            sentences = [finding.sentence for finding in report.findings]
            step = self.trainer.state.global_step + 1
            self._on_event({"step": step, "findings": sentences, "flagged": report.flag_rate, "stop": report.stop})
        if report.stop:
            self.stopped = "; ".join(finding.sentence for finding in report.findings)

    def _remember(self) -> None:
        kept: Any = self.trainer.state.stateful_callbacks
        calibration = None if self.dual is None else self.dual.state()
        memory = {
            "detector": self.detector.state(),
            "dual": calibration,
            "entropy": self.entropy,
            "stopped": self.stopped,
        }
        kept[_STATE_KEY] = {"args": {}, "attributes": memory}

    def begin(self) -> None:
        """Training begins, or goes on from a checkpoint: what that remembers is what counts, not what came after it."""
        self._loaded = False

    def _recall(self) -> None:
        """Once, from the checkpoint that training goes on from."""
        if self._loaded:
            return
        self._loaded = True
        kept: Any = self.trainer.state.stateful_callbacks
        saved = kept.get(_STATE_KEY)
        if saved is None:
            return
        memory = saved["attributes"]
        self.detector.load_state(memory["detector"])
        self.entropy, self.stopped = memory["entropy"], memory["stopped"]
        if self.dual is not None and memory["dual"] is not None:
            self.dual.load_state(memory["dual"])


def why_stopped(checkpoint: Path) -> str | None:
    """Why the guards stopped the run that left the checkpoint; None if they did not."""
    saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).stateful_callbacks.get(_STATE_KEY)
    return None if saved is None else saved["attributes"]["stopped"]
