"""The regularisers of `hacking.Regularizers`, fed inside the trainer: what each is computed from is read only if asked.

- `variance` needs the token rewards alone;
- `diversity` reads the first dense reward's features by one more truncated forward;
- `entropy` and `kl` need the policy's log-probabilities: TRL's, where it has them (vLLM, or optimisation not aligned
  with generation), else by one full forward; `kl` also those of the reference, which TRL has where `beta` is above 0,
  and which a new adapter gives when it is turned off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechreward.errors import InputError
from mechreward.hacking import regularised
from mechreward.models import iter_blocks
from mechreward.training.batch import completions_of, prompts_of

if TYPE_CHECKING:
    from mechreward.training.grpo import MechRewardGRPOTrainer


@torch.no_grad()
def shaped(
    trainer: MechRewardGRPOTrainer, out: dict[str, Any], reward_BT: Tensor, mask_BT: Bool[Tensor, "b t"]
) -> Tensor:
    """Token rewards with the regularisers of `trainer.dense`; as they came if all weights are 0.

    Raises:
        InputError: for `kl` without a reference to compare with.
    """
    weights = trainer.dense.regularizers
    if not weights.any:
        return reward_BT
    policy_BT = reference_BT = acts_BTK = None
    if weights.entropy or weights.kl:
        policy_BT = _own_logps(trainer, out)
    if weights.kl:
        reference_BT = _reference_logps(trainer, out)
    if weights.diversity:
        acts_BTK = _activations(trainer, out, mask_BT)
    total_BT = regularised(
        reward_BT.float().masked_fill(~mask_BT, 0.0),
        mask_BT,
        weights,
        policy_logps_BT=policy_BT,
        ref_logps_BT=reference_BT,
        acts_BTK=acts_BTK,
    )
    change_BT = (total_BT - reward_BT).masked_fill(~mask_BT, 0.0)
    share = change_BT.abs().sum() / mask_BT.sum().clamp(min=1)
    trainer._log_numbers(trainer._mode(), {"guard/regularisation": float(share)})
    return total_BT


def _own_logps(trainer: MechRewardGRPOTrainer, out: dict[str, Any]) -> Tensor:
    known = out.get("old_per_token_logps")
    return known if known is not None else _logps(trainer, trainer.model, out)


def _reference_logps(trainer: MechRewardGRPOTrainer, out: dict[str, Any]) -> Tensor:
    if out.get("ref_per_token_logps") is not None:
        known: Tensor = out["ref_per_token_logps"]
        return known
    if not trainer._new_adapter:
        raise InputError("regularizers.kl: needs a reference; set beta above 0, or train a new adapter (lora_rank)")
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    with policy.disable_adapter():
        return _logps(trainer, trainer.model, out)


def _logps(trainer: MechRewardGRPOTrainer, model: Any, out: dict[str, Any]) -> Tensor:
    ids_BS = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
    seen_BS = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
    width = out["completion_ids"].shape[1]
    size = int(trainer.args.per_device_train_batch_size)
    logps_BT: Tensor = trainer._get_per_token_logps_and_entropies(model, ids_BS, seen_BS, width, size)[0]
    return logps_BT


def _activations(trainer: MechRewardGRPOTrainer, out: dict[str, Any], mask_BT: Tensor) -> Tensor:
    reward = trainer.dense_rewards[0]
    acts_BTK = torch.zeros(*mask_BT.shape, len(reward.feature_ids()), device=mask_BT.device)
    prompts, completions = prompts_of(out), completions_of(out)
    completions = [ids or prompt[-1:] for ids, prompt in zip(completions, prompts, strict=True)]
    size, stop = trainer.dense.read_batch_size, not trainer._sharded
    with trainer._model_of(trainer.dense.reader) as model:
        for batch in iter_blocks(model, prompts, completions, [reward.layer], size, stop):
            width = batch.mask_BT.shape[1]
            acts = reward.sae.read(batch.h_BTD[reward.layer], reward.feature_ids())
            acts_BTK[batch.rows, :width] = acts.to(acts_BTK.device)
    return acts_BTK
