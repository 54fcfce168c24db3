"""What the dense trainer asks of TRL and of its arguments, checked before a model is loaded."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import trl
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

from mechreward.errors import InputError

TRL_FROM, TRL_BELOW = Version("1.9"), Version("1.17.dev0")
TRL_MODULE = "trl.trainer.grpo_trainer"


def check_host(args: Any, credit: str | None = None) -> None:
    """Refuses what would train something else than it says, or `credit` could not evaluate.

    Raises:
        InputError: naming the setting, its value and what is allowed.
    """
    installed = Version(version("trl"))
    if not TRL_FROM <= installed < TRL_BELOW:
        raise InputError(f"trl: version {installed} is installed; token advantages are tested with >=1.9,<1.17")
    if trl.GRPOTrainer.__module__ != TRL_MODULE or GRPOTrainer.__module__ != TRL_MODULE:
        raise InputError(f"trl: GRPOTrainer was replaced by {trl.GRPOTrainer.__module__} (Unsloth does); use TRL's own")
    if args is None:
        return
    if not isinstance(args, GRPOConfig):
        kind = type(args).__name__
        raise InputError(
            f"args: {kind} is not a GRPOConfig; other trainers of TRL (asynchronous GRPO, say) take one advantage a "
            "completion"
        )
    if args.importance_sampling_level != "token":
        raise InputError(
            f"importance_sampling_level: {args.importance_sampling_level!r} spreads each token's advantage over its "
            "whole completion; dense rewards need 'token'"
        )
    if args.num_generations is not None and args.num_generations < 2:
        raise InputError(f"num_generations: {args.num_generations}; a group needs at least 2 completions")
    if credit == "stage3" and args.num_generations_eval == 1:
        raise InputError("num_generations_eval: 1; credit 'stage3' needs groups of at least 2 completions")
    if args.use_liger_kernel and "compute_liger_loss" in vars(GRPOTrainer):
        raise InputError("use_liger_kernel: True; this TRL's Liger loss takes no token advantages, set it to False")
