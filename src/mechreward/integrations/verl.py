"""verl 0.9: rewards from a server (`mechreward serve`) that `MECHREWARD_URL` names. The two ways are

- `MechRewardManager`, a reward manager: one number a completion, with any estimator, in all of verl's trainers.
- `MechRewardAgentLoop`, an agent loop for the default trainer (V1), which streams a row at a time and there knows one
  number a row: it lays out outcome and token rewards as `token_scores` says, for the estimator `mechreward`
  (`verl_advantage`, registered by itself when verl is imported).

Both send the token ids that verl sampled and wait for the server; a row that cannot be scored is an error of that row,
which verl drops with its group, never a 0.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from mechreward.errors import InputError
from mechreward.integrations.client import RewardClient
from mechreward.integrations.protocol import Row, Score
from mechreward.integrations.token_scores import pack_row


class MechRewardManager(RewardManagerBase):
    """`reward.reward_manager.source=importlib module.path=pkg://mechreward.integrations.verl name=MechRewardManager`.

    The score is the server's: outcome and features combined as `mechreward serve` was told. `reward_model.ground_truth`
    of the dataset is the gold answer.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,  # noqa: ARG002
        reward_model_tokenizer: Any = None,  # noqa: ARG002
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.client = RewardClient.from_environment()

    async def run_single(self, data: Any) -> dict[str, Any]:
        """One row's score, and its parts as extra information.

        Raises:
            InputError: if the server refuses the row or it cannot be scored.
            NoAnswer: if the server does not answer.
        """
        item = data[-1]  # of a rollout of several sequences the last, as verl's own managers do
        width = item.batch["prompts"].shape[-1]
        mask_S = item.batch["attention_mask"].bool()
        row = Row(
            prompt_ids=item.batch["prompts"][mask_S[:width]].tolist(),
            completion_ids=item.batch["responses"][mask_S[width:]].tolist(),
            answer=_answer(item.non_tensor_batch),
        )
        paid, score = await self.client.score_one(row)
        return {"reward_score": paid, "reward_extra_info": _parts(score)}


class DenseOutput(AgentLoopOutput):
    """A completion whose tokens have rewards of their own; its `reward_score` is its outcome."""

    token_rewards: list[float | None]

    def as_dict(self) -> dict[str, Any]:
        """verl's row, with `rm_scores` as `token_scores.pack_row` lays it out."""
        row = super().as_dict()
        token_rewards, mask = row.pop("token_rewards"), row["response_mask"].tolist()
        row["rm_scores"] = pack_row(self.reward_score, token_rewards, mask)
        return row


class MechRewardAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, then the server's token rewards for what was sampled."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.client = RewardClient.from_environment()

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **columns: Any) -> DenseOutput:
        """Samples as verl does and scores the ids.

        Raises:
            InputError: if the server refuses the row, has no verifier, or the row cannot be scored.
            NoAnswer: if the server does not answer.
        """
        output = await super().run(sampling_params, priority, **columns)
        row = Row(prompt_ids=list(output.prompt_ids), completion_ids=list(output.response_ids), answer=_answer(columns))
        _, score = await self.client.score_one(row)
        if score.outcome is None:
            raise InputError("verifier: the server judges no answers; start it with --verifier for dense training")
        output.extra_fields["reward_extra_info"] = _parts(score)
        given = {name: getattr(output, name) for name in output.model_fields_set}
        return DenseOutput(**given, reward_score=score.outcome, token_rewards=score.token_rewards)


def _answer(columns: Any) -> str | int | float | None:
    """The gold answer where verl's datasets have it."""
    model = columns.get("reward_model")
    return None if model is None else model.get("ground_truth")


def _parts(score: Score) -> dict[str, float]:
    """What verl logs beside the score: `acc` is its own name for the outcome."""
    parts = {"acc": score.outcome, "mechreward": score.features}
    return {name: value for name, value in parts.items() if value is not None}
