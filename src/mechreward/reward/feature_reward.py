"""SAE features as a reward: r_t = sum_k weight_k * activation_k(h_t) / scale_k for every completion token t.

h_t is the output of decoder block `layer` after the model has read token t, from a teacher-forced forward over token
ids (never from generation), and the activations come from `SAE.read`.

Tokens of massive norm (more than 10 times the median norm of their own completion) are excluded, here and nowhere else,
so that gate and training leave out the same ones. The median is the row's own: a token's reward does not depend on what
else is in the batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.features import FeaturePack, PackFeature, check_pack, load_pack, sae_ref, step_ends, weighted_sum
from mechreward.features.aggregation import Aggregation, StepEndAggregation, build_aggregation, pooling_spec
from mechreward.features.prompts import prompt_mismatch
from mechreward.models import check_layer, d_model, iter_blocks, load_model, norm_outliers, unwrap
from mechreward.reward.aggregation import pool
from mechreward.reward.batch import (
    Text,
    check_lengths,
    check_same_tokenizer,
    check_text_only,
    holds_tool_output,
    token_ids,
)
from mechreward.reward.normalization import Normalization, build_normalization
from mechreward.sae import SAE
from mechreward.tiny import model_path

logger = logging.getLogger(__name__)

DENSE = "mechreward.integrations.trl_grpo.MechRewardGRPOTrainer"
TokenRewards = tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]
"""r_BT in float32, and which tokens have one."""


class FeatureReward:
    """A weighted sum of feature activations, per token and per completion.

    As a reward function of a plain `trl.GRPOTrainer` it gives one number a completion, read by the model it is bound to
    (`bind`, or the pack's own model, loaded at first use); in `MechRewardGRPOTrainer` it is dense.

    Args:
        features: a pack, or weights by feature id (then every scale is 1: the SAE's own units).
        sae: the SAE the ids belong to.
        aggregation: how tokens become a trajectory reward, a name or an object of `features.aggregation`: mean, max,
            last, last_k, weighted_mean, step_end; `per_token` is for `MechRewardGRPOTrainer` and pools like mean where
            one number is wanted. None takes the pack's own, or mean for bare weights.
        normalization: what a plain trainer is paid: the trajectory rewards of one call, put on a common scale by
            `reward.normalization` (zscore, rank, sigmoid, minmax, noop). It acts in `__call__` alone. Gate 1 reads
            `compute`, before it. `MechRewardGRPOTrainer` refuses all but noop: token rewards are centred in their
            group and scaled once, and a statistic over trajectories says nothing of a token.
        name: how trainers log it.

    Raises:
        InputError: pack and SAE do not belong together, an id is out of range, no features, or an unknown option.
    """

    def __init__(
        self,
        features: FeaturePack | dict[int, float],
        sae: SAE,
        aggregation: str | Aggregation | None = None,
        normalization: str | Normalization = "noop",
        name: str = "feature_reward",
    ) -> None:
        self.normalization = build_normalization(normalization)
        pack = features if isinstance(features, FeaturePack) else _pack_of(features, sae)
        self._pooling = build_aggregation(pack.pooling if aggregation is None else aggregation)
        check_pack(pack, sae)
        # Hashing and gating go by what is read and pooled here: the pack takes on this pooling and this SAE's weights.
        ref = pack.sae.model_copy(update={"weights_hash": sae.weights_hash})
        self.pack = pack.model_copy(update={"pooling": pooling_spec(self._pooling), "sae": ref})
        self.sae = sae
        self.name = self.__name__ = name
        self._bound: tuple[torch.nn.Module, PreTrainedTokenizerBase] | None = None
        self._chat_template_kwargs: Mapping[str, Any] = {}
        self._warned = self._warned_of_prompts = self._warned_of_tools = False

    @classmethod
    def from_pack(
        cls, pack: FeaturePack | str | Path, sae: SAE, aggregation: str | Aggregation | None = None, **options: Any
    ) -> FeatureReward:
        """Builds a reward from a pack, its file, or a bundled pack's name; `aggregation` is the pack's if None."""
        if not isinstance(pack, FeaturePack):
            pack = load_pack(pack, sae)
        return cls(pack, sae, aggregation=aggregation, **options)

    @property
    def aggregation(self) -> str:
        """The aggregation's name, parameters included: `pool` takes it."""
        return self._pooling.spec

    @property
    def step_mark(self) -> str | None:
        """The text that ends a step, if the aggregation is `step_end`: then `pool` and `compute` want `step_ends`."""
        return self._pooling.mark if isinstance(self._pooling, StepEndAggregation) else None

    @property
    def layer(self) -> int:
        """Decoder block whose output is read."""
        return self.pack.sae.layer

    @property
    def spec_hash(self) -> str:
        """Hash of everything that decides the reward's value; what a gate stores and training compares."""
        return self.pack.spec_hash

    @property
    def gate_passed(self) -> bool:
        """Whether the pack carries a passed gate for exactly this reward."""
        return self.pack.gate_passed

    @property
    def gate_warning(self) -> str | None:
        """What there is to say before one trains on this reward; None if our gate passed it."""
        if self.gate_passed:
            return None
        name = f"pack: {self.pack.name} (spec {self.spec_hash[:12]}; {self.pack.status})"
        return f"{name} carries no passed gate: nothing shows that it goes with right answers"

    def check_prompts(self, prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> None:
        """Warns once if the prompts are not of the form that the pack's features were found on."""
        if self.pack.prompt is None or self._warned_of_prompts:
            return
        found = prompt_mismatch(self.pack.prompt, prompts, tokenizer)
        if found is not None:
            self._warned_of_prompts = True
            logger.warning("%s: %s", self.name, found)

    def feature_ids(self) -> list[int]:
        """Ids in the pack's order."""
        return self.pack.feature_ids()

    def readable(self, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """The tokens that get a reward: `mask_BT` without those of massive norm."""
        return norm_outliers(h_BTD, mask_BT)

    @torch.no_grad()
    def score_tokens(self, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"]) -> TokenRewards:
        """r_BT in float32 on the device of `h_BTD`, 0 where masked or of massive norm; and `readable`.

        Raises:
            InputError: if the residuals have another width than the SAE, or an unmasked one is NaN or infinite.
        """
        if h_BTD.shape[-1] != self.sae.d_model:
            raise InputError(f"residuals: width {h_BTD.shape[-1]}, but the SAE reads {self.sae.d_model}")
        _check_finite(h_BTD, mask_BT)
        readable_BT = self.readable(h_BTD, mask_BT)
        reward_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=h_BTD.device)
        acts_NK = self.sae.read(h_BTD[readable_BT], self.feature_ids())
        reward_BT[readable_BT] = weighted_sum(self.pack, acts_NK).to(h_BTD.device)
        return reward_BT, readable_BT

    def compute_per_token(self, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """The rewards of `score_tokens` alone."""
        return self.score_tokens(h_BTD, mask_BT)[0]

    def compute(
        self,
        h_BTD: Float[Tensor, "b t d"],
        mask_BT: Bool[Tensor, "b t"],
        step_end_BT: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, " b"]:
        """One reward a row, pooled by `aggregation` over the tokens that have one; NaN for a row without any.

        Raises:
            InputError: as `compute_per_token`, and for `step_end` without `step_end_BT` (see `step_mark`).
        """
        reward_BT, readable_BT = self.score_tokens(h_BTD, mask_BT)
        return pool(reward_BT, readable_BT, self._pooling, step_end_BT)

    def step_ends(
        self, tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[Sequence[int]]
    ) -> Bool[Tensor, "b t"] | None:
        """The `step_end_BT` that `compute` and `pool` want for these completions; None if they want none."""
        return None if self.step_mark is None else step_ends(tokenizer, completion_ids, self.step_mark)

    def bind(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layer: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> FeatureReward:
        """Gives the reward the model that reads for it outside MechRewardGRPOTrainer.

        The model is held, not copied (a copy would double its memory): bind a frozen base model, unless the policy
        itself is to be read, which then changes the reward as it trains. It is read in evaluation mode. The SAE moves
        to its device.

        Args:
            layer: the layer that you mean, to be checked against the SAE's.
            chat_template_kwargs: what the trainer gives `apply_chat_template` for a chat's prompt
                (`GRPOConfig.chat_template_kwargs`, `tools`, `chat_template`): it does not tell its rewards.

        Raises:
            InputError: if the layer is not the SAE's or not the model's, or the widths differ.
        """
        if layer is not None and layer != self.layer:
            raise InputError(f"layer: {layer} is not the layer of the SAE, which reads {self.layer}")
        self.check_model(model)
        self.sae = self.sae.to(unwrap(model).device)  # states of a GPU are not scored on the CPU
        self._bound = (model, tokenizer)
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        return self

    @property
    def bound(self) -> bool:
        """Whether a model reads for it already."""
        return self._bound is not None

    def check_model(self, model: torch.nn.Module) -> None:
        """Raises InputError unless the model has the reward's layer and width."""
        check_layer(model, self.layer)
        if d_model(model) != self.sae.d_model:
            raise InputError(f"model: its residual width is {d_model(model)}, but the SAE reads {self.sae.d_model}")

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One trajectory reward a completion; None for a completion without a readable token.

        Prompts are tokenised here, chat ones with the tokenizer's template. TRL hands over `completion_ids`; without
        them the completion's text is tokenised.

        Raises:
            InputError: if a prompt holds images, or the first `completion_ids` of a trainer are not the completions'
                text in the reader's tokenizer.
        """
        check_lengths(prompts, completions)
        check_text_only(prompts)
        model, tokenizer = self._bound or self._bind_own_model()
        if "trainer_state" in columns and not self._warned:
            self._warn()
            check_same_tokenizer(tokenizer, completions, completion_ids)
        if not self._warned_of_tools and holds_tool_output(completions):
            self._warned_of_tools = True
            logger.warning("%s: here what a tool says is paid like what the policy says; use %s", self.name, DENSE)
        self.check_prompts(prompts, tokenizer)
        prompt_ids, completion_ids = token_ids(
            tokenizer, prompts, completions, completion_ids, self._chat_template_kwargs
        )
        [(reward_BT, readable_BT)] = read_tokens([self], model, prompt_ids, completion_ids)
        ends_BT = self.step_ends(tokenizer, completion_ids)
        paid = self.normalization(pool(reward_BT, readable_BT, self._pooling, ends_BT)).tolist()
        return [None if math.isnan(value) else value for value in paid]

    def _bind_own_model(self) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = self.own_model("reward")
        self.bind(model, tokenizer)
        return model, tokenizer

    def own_model(self, caller: str) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
        """The pack's model and tokenizer, loaded anew for `caller`, whose `bind` is the other way; in float32, on this
        process's GPU where there is one.

        Raises:
            InputError: if the pack names no model.
        """
        if not self.pack.model_name:
            raise InputError(f"model: the pack names no model; call {caller}.bind(model, tokenizer) first")
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        loaded = load_model(model_path(self.pack.model_name), device=device)
        return loaded.model, loaded.tokenizer

    def _warn(self) -> None:
        self._warned = True
        if self.gate_warning is not None:
            logger.warning(self.gate_warning)
        if self.aggregation == "per_token":
            logger.warning(
                "%s: aggregation 'per_token' in a plain trainer is paid as the mean of each completion; "
                "use %s for dense credit",
                self.name,
                DENSE,
            )


@torch.no_grad()
def read_tokens(
    rewards: Sequence[FeatureReward],
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int = 32,
    stop: bool = True,
) -> list[TokenRewards]:
    """Token rewards of several FeatureRewards, all from one truncated forward over prompt + completion ids.

    Args:
        rewards: on any layers.
        stop: as in `models.iter_blocks`.

    Returns:
        For each reward its values and mask on the CPU, in row order, completions right-padded to the longest; a row
        with no completion ids is all masked.
    """
    filled = [row for row, ids in enumerate(completion_ids) if len(ids)]
    shape = (len(completion_ids), max(map(len, completion_ids), default=0))
    results = [(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)) for _ in rewards]
    if not filled:
        return results
    prompts, completions = ([list(ids[row]) for row in filled] for ids in (prompt_ids, completion_ids))
    layers = [reward.layer for reward in rewards]
    for batch in iter_blocks(model, prompts, completions, layers, batch_size, stop):
        rows = torch.tensor([filled[row] for row in batch.rows])
        for reward, (reward_BT, readable_BT) in zip(rewards, results, strict=True):
            h_BTD, width = batch.h_BTD[reward.layer], batch.mask_BT.shape[1]
            values_BT, has_BT = reward.score_tokens(h_BTD, batch.mask_BT)
            reward_BT[rows, :width], readable_BT[rows, :width] = values_BT.cpu(), has_BT.cpu()
    return results


def _pack_of(weights: dict[int, float], sae: SAE) -> FeaturePack:
    if not weights:
        raise InputError("features: the dictionary is empty; give at least one feature id with its weight")
    wrong: Iterable[int] = [id_ for id_ in weights if not 0 <= id_ < sae.d_sae]
    for id_ in wrong:
        raise InputError(f"features: id {id_} is not one of the SAE's; ids go from 0 to {sae.d_sae - 1}")
    return FeaturePack(
        name="features",
        model_name=sae.meta.model_name,
        sae=sae_ref(sae),
        features=[PackFeature(id=id_, weight=float(weight), scale=1.0) for id_, weight in weights.items()],
    )


def _check_finite(h_BTD: Tensor, mask_BT: Tensor) -> None:
    finite_BT = h_BTD.isfinite().all(dim=-1) | ~mask_BT
    if not finite_BT.all():
        row, token = (~finite_BT).nonzero()[0].tolist()
        raise InputError(f"residuals: row {row} is NaN or infinite at completion token {token}; all must be finite")
