"""OpenRLHF 0.11: `--train.agent_func_path` of this file. Rewards come from the server that `MECHREWARD_URL` names.

OpenRLHF's own remote reward (`--reward.remote_url`) is sent text, which need not give the sampled tokens back, and only
logs when it fails. An agent is handed the token ids, and an error here is an error there. OpenRLHF knows one reward a
completion, so this is the server's combined score; dense rewards need a trainer that has a place for them.
"""

from __future__ import annotations

from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from mechreward.integrations.client import RewardClient
from mechreward.integrations.protocol import Row


class AgentExecutor(SingleTurnAgentExecutor):
    """OpenRLHF's single turn, scored by the server. The dataset's label is the gold answer."""

    def __init__(self) -> None:
        super().__init__()
        self.client = RewardClient.from_environment()

    async def execute(self, prompt: Any, label: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Samples as OpenRLHF does and scores the ids.

        Raises:
            InputError: if the server refuses the row or it cannot be scored.
            NoAnswer: if the server does not answer.
        """
        output: dict[str, Any] = await super().execute(prompt, label, *arguments, **options)
        ids, [(start, end)] = list(output["observation_tokens"]), output["action_ranges"]
        row = Row(prompt_ids=ids[:start], completion_ids=ids[start:end], prompt=prompt, answer=label)
        paid, score = await self.client.score_one(row)
        logs = {"outcome": score.outcome, "mechreward": score.features}
        output.update(
            reward=paid,
            scores=paid if score.outcome is None else score.outcome,
            extra_logs={name: value for name, value in logs.items() if value is not None},
        )
        return output
