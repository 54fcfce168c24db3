"""A training of an SAE put down on disk and taken up again, with the weights of one that was never interrupted.

One file holds all that the steps to come depend on: the weights, Adam's moments, the schedules, the counters of dead
features, the scale of the inputs and the stream's place. It is written atomically and read with `weights_only=True`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mechreward.errors import InputError
from mechreward.files import atomic_path


@dataclass(frozen=True)
class Checkpoint:
    """Where a training puts itself down, and how often."""

    path: Path
    every: int
    """Steps between two."""

    def save(self, trainer: Any, stream: Any) -> None:
        """Writes the state of a `sae_lens.SAETrainer` and of its `ActivationStream`, after a whole step."""
        state = {
            "weights": trainer.sae.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficients": {name: schedule.state_dict() for name, schedule in trainer.coefficient_schedulers.items()},
            "passes_since_fired": trainer.n_forward_passes_since_fired,
            "steps": trainer.n_training_steps,
            "samples": trainer.n_training_samples,
            "scale": trainer.activation_scaler.scaling_factor,
            "stream": stream.state_dict(),
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def resume(self, trainer: Any, stream: Any) -> bool:
        """Puts trainer and stream where `save` found them; False if nothing was saved.

        Raises:
            InputError: if the file is damaged or belongs to another SAE.
        """
        if not self.path.exists():
            return False
        state = self._read()
        try:
            trainer.sae.load_state_dict(state["weights"])
            trainer.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise InputError(f"resume: {self.path} belongs to an SAE of another shape; delete it") from error
        trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for name, schedule in trainer.coefficient_schedulers.items():
            schedule.load_state_dict(state["coefficients"][name])
        trainer.n_forward_passes_since_fired = state["passes_since_fired"].to(trainer.cfg.device)
        trainer.n_training_steps, trainer.n_training_samples = state["steps"], state["samples"]
        trainer.activation_scaler.scaling_factor = state["scale"]
        stream.load_state_dict(state["stream"])
        return True

    def steps(self) -> int:
        """Steps done when it was last put down; 0 if never."""
        return int(self._read()["steps"]) if self.path.exists() else 0

    def _read(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
            raise InputError(f"resume: {self.path} is damaged or cut short; delete it to start anew") from error
        return state
