"""What trainers ask of a seed, and the dense one of the rewards it is given and of each batch, before it trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather
from torch import Tensor

from mechreward.errors import InputError
from mechreward.models import unwrap
from mechreward.reward import FeatureReward
from mechreward.tiny import model_path

logger = logging.getLogger(__name__)


def check_rewards(rewards: Sequence[FeatureReward], policy: Any, trains: bool, credit: str = "per_token") -> None:
    """Raises InputError for a reward that does not fit the model; warns of one that `trains` without a passed gate,
    whose pack was found on another model, or of which `credit` pays something else than was gated."""
    for reward in rewards:
        reward.check_model(policy)
        if trains and reward.gate_warning is not None:
            logger.warning(reward.gate_warning)
        found_on, name = reward.pack.model_name, str(unwrap(policy).name_or_path)
        if found_on and name and not _same_model(model_path(found_on), name):
            logger.warning(
                "%s: its features were found on %s and the policy is %s; unless made from it, they mean nothing",
                reward.name, found_on, name,
            )  # fmt: skip
        if trains and credit == "trajectory" and reward.aggregation not in ("mean", "per_token"):
            logger.warning(
                "%s: credit 'trajectory' pays the mean of a completion's token rewards, its pack pools by %s",
                reward.name, reward.aggregation,
            )  # fmt: skip


def _same_model(first: str, second: str) -> bool:
    """Whether two names can be of one model: ids and folders by their last part; a GGUF file lies in its folder."""
    return Path(first).name.casefold() == Path(second).name.casefold() or Path(first).parent == Path(second)


def warn_without_kl() -> None:
    """Says that nothing holds the policy near the model its reward was validated on."""
    logger.warning(
        "beta: is 0, and so is regularizers.kl; the reward was validated on the starting model's answers, and nothing "
        "holds the policy near them: set GRPOConfig.beta, to 0.02 say"
    )


def check_seed(seed: int) -> None:
    """Raises `InputError` for a seed that NumPy, which trainers seed too, does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} is out of range; allowed are 0 to {2**32 - 1}")


def check_batch(out: dict[str, Any], loss_mask_BT: Tensor, *, first: bool, longest: int | None) -> None:
    """Raises InputError for images, and for a first batch whose completions were all cut and masked."""
    if "pixel_values" in out:
        raise InputError("images: dense rewards read text only; this batch holds images")
    if first and not gather(loss_mask_BT.sum()).sum():
        raise InputError(
            f"max_completion_length: all completions of the first batch ran into {longest} tokens and "
            "mask_truncated_completions leaves nothing to train on; allow longer ones"
        )


def check_scalar_rewards(rewards_BN: Tensor, names: Sequence[str]) -> None:
    """Raises InputError if a scalar reward is infinite; NaN, TRL's None, is none. [B, N], one column a name."""
    if rewards_BN.isinf().any():
        row, column = rewards_BN.isinf().nonzero()[0].tolist()
        raise InputError(
            f"{names[column]}: gave completion {row} a reward of {rewards_BN[row, column].item()}; a reward must be "
            "finite, or None (or NaN) where there is none"
        )


def check_token_rewards(reward: FeatureReward, reward_BT: Tensor, mask_BT: Tensor) -> None:
    """Raises InputError, naming the reward, if the reward of an unmasked token is NaN or infinite."""
    wrong_BT = mask_BT & ~reward_BT.isfinite()
    if wrong_BT.any():
        row, token = wrong_BT.nonzero()[0].tolist()
        raise InputError(
            f"{reward.name}: gave token {token} of completion {row} a reward of {reward_BT[row, token].item()}; all "
            "must be finite, so look at the SAE's weights and the pack's weights and scales"
        )
