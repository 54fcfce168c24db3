# ruff: noqa: ARG002 (transformers names the arguments of a callback; not all are used)
"""Stopping a run whose guard has seen enough, and the policy to go back to.

Copies of the policy wait in `good-pending-STEP/` until `GuardConfig.window` batches written after them have been
looked at, as many as the detector compares over; with `num_iterations` a batch is several steps. If the last is sound
(no finding, and they are not less accurate than the reference, see `hacking.detector`) the copy becomes `good/`, else
it goes. With a finding all that wait go, since the batches that showed it are their own. What training started from is
the first good policy.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mechreward.files import read_json, write_json
from mechreward.hacking import HackingReport
from mechreward.training.checks import warn_without_kl
from mechreward.training.guard import Guard

GOOD, PENDING = "good", "good-pending-"


class GuardCallback(TrainerCallback):
    """Stops a run that its guard has stopped, and keeps the last good policy beside its checkpoints, if any."""

    def __init__(self, guard: Guard) -> None:
        args: Any = guard.trainer.args
        self.guard = guard
        self.folder = Path(args.output_dir) if args.save_strategy != "no" else None
        self._turned = 0
        """The detector's evaluations at the last turn."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warns where there is no KL term; the policy that training starts or goes on from is good, unless one from
        before that is kept."""
        self.guard.begin()
        trainer = self.guard.trainer
        unheld = not trainer.beta and not trainer.dense.regularizers.kl
        if self.guard.config.on and trainer.dense_rewards and unheld and self._is_main:
            warn_without_kl()
        if not self._keeps():
            return
        for step, path in self._waiting():
            if step > state.global_step and self._is_main:
                shutil.rmtree(path)
        kept = good_step(self.folder)
        if kept is None or kept > state.global_step:
            self._save(GOOD, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After each step: what its batch said of the policies that wrote the last ones."""
        report = self.guard.report
        if report is None:
            return
        if self._keeps():
            self._turn(report)
            if not report.findings and state.global_step % self.guard.config.keep_every == 0:
                self._save(f"{PENDING}{state.global_step}", state.global_step)
        if self.guard.stopped is not None:
            control.should_training_stop = True
            # So that a run that is started again knows.
            control.should_save = control.should_save or self.folder is not None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Takes the entropy of the step's completions, which TRL measures with the loss."""
        entropy = (logs or {}).get("entropy")
        if isinstance(entropy, float) and entropy == entropy:
            self.guard.entropy = entropy
            if self.guard.active:
                self.guard._remember()

    def _keeps(self) -> bool:
        return self.folder is not None and self.guard.active and self.guard.config.keep_every > 0

    @property
    def _is_main(self) -> bool:
        return bool(self.guard.trainer.accelerator.is_main_process)

    def _waiting(self) -> list[tuple[int, Path]]:
        """Copies that wait, by step."""
        assert self.folder is not None
        return sorted((int(path.name.removeprefix(PENDING)), path) for path in self.folder.glob(f"{PENDING}*"))

    def _turn(self, report: HackingReport) -> None:
        """After a batch that is judged: the copies that it clears, or all that it casts doubt on."""
        assert self.folder is not None
        judged = self.guard.detector.evaluations
        if judged == self._turned or not self._is_main:
            return
        self._turned = judged
        for _, path in self._waiting():
            due = read_json(path / "step.json")["judged"] <= judged - self.guard.config.window
            if due and report.sound:
                shutil.rmtree(self.folder / GOOD, ignore_errors=True)
                path.rename(self.folder / GOOD)
            elif due or report.findings:
                shutil.rmtree(path)

    def _save(self, name: str, step: int) -> None:
        assert self.folder is not None
        # As an internal call: another would push the copy to the hub where `push_to_hub` is on.
        self.guard.trainer.save_model(str(self.folder / name), _internal_call=True)
        if self._is_main:
            judged = self.guard.detector.evaluations
            write_json(self.folder / name / "step.json", {"step": step, "judged": judged})


def good_step(folder: Path | None) -> int | None:
    """The step after which the last good policy was kept; None if there is none."""
    path = None if folder is None else folder / GOOD / "step.json"
    return int(read_json(path)["step"]) if path is not None and path.exists() else None


def load_good(model: Any, folder: Path) -> int | None:
    """Puts the weights of the last good policy in `folder` into the model; returns their step, None if none is kept."""
    step = good_step(folder)
    if step is None:
        return None
    weights = {
        name: value for path in sorted((folder / GOOD).glob("*.safetensors")) for name, value in load_file(path).items()
    }
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, weights)
    else:
        # Tied weights are in the file once.
        model.load_state_dict(weights, strict=False)
    return step
