"""A second opinion on every rollout: an independent probe beside the feature reward.

The two must be able to be wrong apart: the probe reads another block than the reward, was trained on other questions,
and pools by max, min or attention (a mean is diluted by filler). Both are read on the frozen base model's states.

Verdicts are absolute, not medians of a batch. The reward's pooled value is turned into a probability that the answer is
right (its *claim*, Platt 1999), fitted once on rollouts with a known outcome and then held fixed; the probe's own
probability is calibrated when it is trained. A rollout is flagged where the reward pays it as right, the probe says it
is wrong, and the two are apart by more than the threshold:

    claim >= 1/2,  probe < 1/2,  claim - probe > disagreement_threshold

A reward that carries nothing has a claim near the share of right answers, whatever it pays: such a reward is Gate 1's
to find, and the detector's to catch as reward without accuracy. Steps are judged like rollouts, on the mean reward and
the probe's pooled log-odds over the step's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.features.steps import last_of_steps
from mechreward.hacking.actions import Action, check_action, neutral_rewards
from mechreward.models import check_layer, iter_blocks
from mechreward.probes import LinearProbe
from mechreward.probes.probe import pool_logits
from mechreward.probes.train import platt
from mechreward.reward import FeatureReward, pool
from mechreward.reward.batch import Text, check_lengths, check_same_tokenizer, check_text_only, token_ids
from mechreward.verifiers import as_text

logger = logging.getLogger(__name__)
CALIBRATION_ROWS = 64
"""Fewest rollouts, with both outcomes among them, that the reward's claim is fitted on."""


@dataclass(frozen=True)
class Verdicts:
    """What reward and probe say of some rollouts or steps; NaN where there is nothing to judge."""

    claim: Tensor
    """Probability of a right answer that the reward amounts to."""
    probe: Tensor
    """The probe's."""
    flagged: Tensor

    @property
    def rate(self) -> float:
        """Share flagged of those that could be judged; 0 if none could."""
        judged = ~(self.claim.isnan() | self.probe.isnan())
        return float(self.flagged[judged].float().mean()) if judged.any() else 0.0


class DualVerifier:
    """A FeatureReward and an independent probe.

    Args:
        feature_reward: the reward that trains.
        independent_probe: see the module; `mechreward.load_probe`.
        disagreement_threshold: in probability, between 0 and 1.
        action: what happens to flagged rollouts, see `hacking.actions`.
        downweight_factor: of action `downweight`.
        steps: flag single steps as well: the tokens of a flagged step get no advantage. For `training`.

    Raises:
        InputError: a probe that does not say its block, or reads the reward's own, or states of another width, or was
            trained on the reward's own questions; or an option that is not allowed.
    """

    def __init__(
        self,
        feature_reward: FeatureReward,
        independent_probe: LinearProbe,
        disagreement_threshold: float = 0.3,
        *,
        action: Action = "zero",
        downweight_factor: float = 0.2,
        steps: bool = False,
        name: str = "dual_verifier",
    ) -> None:
        check_independent(feature_reward, independent_probe)
        if not 0 < disagreement_threshold < 1:
            raise InputError(f"disagreement_threshold: {disagreement_threshold} must be between 0 and 1")
        check_action(action, downweight_factor)
        self.feature_reward = feature_reward
        self.probe = independent_probe
        self.disagreement_threshold = disagreement_threshold
        self.action = action
        self.downweight_factor = downweight_factor
        self.steps = steps
        self.name = self.__name__ = name
        self.calibration: tuple[float, float] | None = None
        """Slope and intercept of the claim's log-odds; None until there were rollouts enough."""
        self._pending: list[tuple[float, bool]] = []
        self._rates: list[float] = []
        self._bound: tuple[torch.nn.Module, PreTrainedTokenizerBase] | None = None
        self._chat_template_kwargs: Mapping[str, Any] = {}

    @property
    def layers(self) -> list[int]:
        """Blocks whose states are needed: the reward's and the probe's."""
        return [self.feature_reward.layer, self.probe.layer or 0]

    def recent_disagreement(self, last: int = 10) -> float:
        """Mean share of flagged rollouts over the last calls; 0 before the first."""
        recent = self._rates[-last:]
        return sum(recent) / len(recent) if recent else 0.0

    def calibrate(self, scores: Sequence[float] | Tensor, right: Sequence[bool] | Tensor) -> None:
        """Fits the claim on pooled rewards of rollouts with known outcome.

        Raises:
            InputError: if there is not one outcome a score, a score is not finite or all outcomes are alike.
        """
        if len(scores) != len(right):
            raise InputError(f"right: {len(right)} outcomes for {len(scores)} scores; give one each")
        self.calibration = platt(torch.as_tensor(scores).cpu().numpy(), torch.as_tensor(right).cpu().numpy())

    def observe(self, scores_B: Float[Tensor, " b"], right_B: Float[Tensor, " b"]) -> None:
        """Collects rollouts until there are enough to calibrate on; does nothing afterwards. NaN is left out.

        Args:
            right_B: 1 for right, 0 for wrong.
        """
        if self.calibration is not None:
            return
        known_B = ~(scores_B.isnan() | right_B.isnan())
        pairs = zip(scores_B[known_B].tolist(), (right_B[known_B] > 0.5).tolist(), strict=True)
        self._pending += list(pairs)
        outcomes = [right for _, right in self._pending]
        if len(outcomes) >= CALIBRATION_ROWS and len(set(outcomes)) == 2:
            self.calibrate([score for score, _ in self._pending], outcomes)
            self._pending = []

    def state(self) -> dict[str, Any]:
        """What it has learnt of the reward so far, as JSON values."""
        return {"calibration": self.calibration, "pending": self._pending}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        found = state["calibration"]
        self.calibration = None if found is None else (float(found[0]), float(found[1]))
        self._pending = [(float(score), bool(right)) for score, right in state["pending"]]

    def verdicts(self, scores: Tensor, probe: Tensor) -> Verdicts:
        """Verdicts on pooled rewards and probe probabilities of one shape; none is flagged before calibration."""
        if self.calibration is None:
            return Verdicts(torch.full_like(scores, torch.nan), probe, torch.zeros_like(scores, dtype=torch.bool))
        slope, intercept = self.calibration
        claim = (slope * scores + intercept).sigmoid()
        flagged = (claim >= 0.5) & (probe < 0.5) & (claim - probe > self.disagreement_threshold)
        return Verdicts(claim, probe, flagged)

    def judge_steps(
        self,
        reward_BT: Float[Tensor, "b t"],
        h_probe_BTD: Float[Tensor, "b t d"],
        mask_BT: Bool[Tensor, "b t"],
        step_end_BT: Bool[Tensor, "b t"],
    ) -> Bool[Tensor, "b t"]:
        """The tokens of flagged steps. `h_probe_BTD` are states of the probe's block."""
        step_BT = last_of_steps(mask_BT, step_end_BT).cumsum(1) - last_of_steps(mask_BT, step_end_BT).long()
        count = int(step_BT.masked_fill(~mask_BT, -1).amax()) + 1 if mask_BT.any() else 0
        in_step_KBT = torch.stack([mask_BT & (step_BT == k) for k in range(count)]) if count else mask_BT[None][:0]
        z_BT, attention_BT = self.probe.token_scores(h_probe_BTD, mask_BT)
        flagged_BT = torch.zeros_like(mask_BT)
        for here_BT in in_step_KBT:
            pooled_B = pool_logits(z_BT, here_BT, self.probe.pooling, attention_BT)
            probe_B = self.probe.calibrated(pooled_B)
            found_B = self.verdicts(pool(reward_BT, here_BT, "mean"), probe_B).flagged
            flagged_BT |= here_BT & found_B[:, None]
        return flagged_BT

    def compute(
        self,
        states: Mapping[int, Float[Tensor, "b t d"]],
        mask_BT: Bool[Tensor, "b t"],
        step_end_BT: Bool[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, " b"], float]:
        """Pooled rewards, as the feature reward gives them, and the share of flagged rollouts.

        Args:
            states: frozen-base states by block, of `layers`.

        Raises:
            InputError: if a block is missing, and as `FeatureReward.compute`.
        """
        scores_B, probe_B = self._scores(states, mask_BT, step_end_BT)
        verdicts = self.verdicts(scores_B, probe_B)
        self._record(verdicts)
        self.observe(scores_B, probe_B)
        return scores_B, verdicts.rate

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for a plain trainer, read by the model it is bound to (the pack's own, loaded, if none).

        The claim is calibrated on the first rollouts, with the probe's verdicts for outcomes, unless `calibrate` was
        called before.

        A flagged reward becomes neutral in its group (a run of equal prompts), so that its advantage is 0 or, for
        `downweight`, near the factor times what it was; see `hacking.actions`.
        """
        check_lengths(prompts, completions)
        check_text_only(prompts)
        model, tokenizer = self._bound or self._bind_own_model()
        if "trainer_state" in columns and not self._rates:
            if self.feature_reward.gate_warning is not None:  # what is paid is the feature reward
                logger.warning(self.feature_reward.gate_warning)
            check_same_tokenizer(tokenizer, completions, completion_ids)
        self.feature_reward.check_prompts(prompts, tokenizer)
        prompt_ids, completion_ids = token_ids(
            tokenizer, prompts, completions, completion_ids, self._chat_template_kwargs
        )
        scores_B, probe_B = self._read(model, tokenizer, prompt_ids, completion_ids)
        verdicts = self.verdicts(scores_B, probe_B)
        self._record(verdicts)
        self.observe(scores_B, probe_B)
        share = self.downweight_factor if self.action == "downweight" else 0.0
        paid_B = neutral_rewards(scores_B, verdicts.flagged, _groups(prompts), share)
        return [None if value != value else value for value in paid_B.tolist()]

    def bind(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> DualVerifier:
        """Gives the verifier the frozen model that reads for it in a plain trainer; it is held, not copied.

        Args:
            chat_template_kwargs: as for `FeatureReward.bind`.

        Raises:
            InputError: if the model lacks a block, or has another width.
        """
        self.feature_reward.check_model(model)
        check_layer(model, self.probe.layer or 0)
        self._bound = (model, tokenizer)
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        return self

    def _bind_own_model(self) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = self.feature_reward.own_model("verifier")
        self.bind(model, tokenizer)
        return model, tokenizer

    @torch.no_grad()
    def _read(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Pooled reward and probe probability of each completion; NaN of an empty one."""
        scores_B, probe_B = (torch.full((len(completion_ids),), torch.nan) for _ in range(2))
        filled = [row for row, ids in enumerate(completion_ids) if len(ids)]
        if not filled:
            return scores_B, probe_B
        prompts, completions = ([list(ids[row]) for row in filled] for ids in (prompt_ids, completion_ids))
        ends_BT = self.feature_reward.step_ends(tokenizer, completions)
        for batch in iter_blocks(model, prompts, completions, self.layers):
            rows = [filled[row] for row in batch.rows]
            here_BT = None if ends_BT is None else ends_BT[batch.rows, : batch.mask_BT.shape[1]]
            here_BT = None if here_BT is None else here_BT.to(batch.mask_BT.device)
            found = self._scores(batch.h_BTD, batch.mask_BT, here_BT)
            scores_B[rows], probe_B[rows] = (values_B.cpu() for values_B in found)
        return scores_B, probe_B

    def _record(self, verdicts: Verdicts) -> None:
        self._rates.append(verdicts.rate)

    def _scores(
        self, states: Mapping[int, Tensor], mask_BT: Bool[Tensor, "b t"], step_end_BT: Bool[Tensor, "b t"] | None
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        for layer in self.layers:
            if layer not in states:
                raise InputError(f"states: block {layer} is missing; reward and probe read blocks {self.layers}")
        reward_layer, probe_layer = self.layers
        scores_B = self.feature_reward.compute(states[reward_layer], mask_BT, step_end_BT)
        readable_BT = self.feature_reward.readable(states[probe_layer], mask_BT)
        return scores_B, self.probe.row_proba(states[probe_layer], readable_BT).to(scores_B.device)


def check_independent(reward: FeatureReward, probe: LinearProbe) -> None:
    """Raises InputError unless the probe reads another block of the same width and other questions than the reward;
    warns of a mean-pooled probe."""
    if probe.layer is None:
        raise InputError(f"independent_probe: {probe.name} does not say which block it reads; set its layer")
    if probe.layer == reward.layer:
        raise InputError(
            f"independent_probe: {probe.name} reads block {probe.layer}, the reward's own; take one of another block"
        )
    if probe.d_model != reward.sae.d_model:
        raise InputError(
            f"independent_probe: {probe.name} reads width {probe.d_model}, but the reward's model has "
            f"{reward.sae.d_model}; take a probe of the same model"
        )
    asked = probe.metadata.get("questions"), probe.metadata.get("questions_seed")
    found_on = reward.pack.provenance.get("questions"), reward.pack.provenance.get("seed")
    if asked[0] is not None and asked == found_on:
        raise InputError(
            f"independent_probe: {probe.name} was trained on {asked[0]} with seed {asked[1]}, the questions the pack "
            "was found on; take a probe trained on others"
        )
    shared = len(set(probe.metadata.get("prompts", ())).intersection(reward.pack.found_on))
    if shared:
        raise InputError(
            f"independent_probe: {probe.name} was trained on {shared} questions that the pack was found on; take a "
            "probe trained on others"
        )
    if probe.pooling == "mean":
        logger.warning(
            "%s pools by mean, which filler dilutes; a probe with pooling max, min or attention holds better",
            probe.name,
        )


def _groups(prompts: Sequence[Text]) -> Tensor:
    """Number of each row's run of equal prompts."""
    texts = [as_text(prompt) for prompt in prompts]
    new = [int(row > 0 and text != texts[row - 1]) for row, text in enumerate(texts)]
    return torch.tensor(new, dtype=torch.long).cumsum(0)
