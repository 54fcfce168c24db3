"""What a trainer's process needs of us to ask a reward server: pydantic, and the aiohttp that datasets, verl and
OpenRLHF bring along.

A server that is starting, restarting or full is asked again for a while. A refusal is not repeated: the same row would
be refused again. Nothing is ever scored 0 for a server that did not answer.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from pydantic import BaseModel

from mechreward.errors import InputError
from mechreward.integrations.protocol import SCORE, SPEC, TOKEN_VARIABLE, Row, Score, ScoreReply, ScoreRequest, Spec

URL_VARIABLE = "MECHREWARD_URL"
"""Environment variable of the server's address."""
BUSY = (502, 503, 504)
Reply = TypeVar("Reply", bound=BaseModel)


class NoAnswer(Exception):
    """The server could not be reached, or could not compute."""


@dataclass(frozen=True)
class RewardClient:
    """Asks one reward server. Holds no connection, so it may be copied to other processes and event loops."""

    url: str
    """Such as `http://127.0.0.1:8765`."""
    token: str | None = field(default=None, repr=False)
    patience: float = 300.0
    """Seconds for which a server that does not answer is asked again."""
    timeout: float = 180.0
    """Seconds that one answer may take."""

    @classmethod
    def from_environment(cls, **options: Any) -> RewardClient:
        """The server that `MECHREWARD_URL` names, with the secret of `MECHREWARD_TOKEN`.

        Raises:
            InputError: if `MECHREWARD_URL` is not set.
        """
        url = os.environ.get(URL_VARIABLE)
        if not url:
            raise InputError(f"{URL_VARIABLE}: is not set; give the address that `mechreward serve` printed")
        return cls(url, os.environ.get(TOKEN_VARIABLE) or None, **options)

    async def score(
        self, rows: Sequence[Row], *, spec_hash: str | None = None, tokenizer_hash: str | None = None
    ) -> list[Score]:
        """The rows' scores, in order.

        Args:
            spec_hash: the reward that is meant, if any other is to be refused.
            tokenizer_hash: of the tokenizer that made the ids, likewise (`protocol.tokenizer_hash`).

        Raises:
            InputError: the server's one sentence on why it refuses.
            NoAnswer: if it does not answer for `patience` seconds, or fails.
        """
        body = ScoreRequest(rows=list(rows), spec_hash=spec_hash, tokenizer_hash=tokenizer_hash)
        return (await self._ask("POST", SCORE, ScoreReply, data=body.model_dump_json(exclude_none=True))).scores

    async def score_one(self, row: Row) -> tuple[float, Score]:
        """What one completion is paid, and the whole score.

        Raises:
            InputError: as `score`, and if the completion cannot be read or judged: it is worth no number.
            NoAnswer: as `score`.
        """
        [found] = await self.score([row])
        if found.score is None:
            size = f"{len(row.completion_ids or [])} tokens"
            raise InputError(f"score: a completion of {size} could not be read or judged")
        return found.score, found

    async def spec(self) -> Spec:
        """What the server scores with.

        Raises:
            InputError, NoAnswer: as `score`.
        """
        return await self._ask("GET", SPEC, Spec)

    async def _ask(self, method: str, path: str, kind: type[Reply], data: str | None = None) -> Reply:
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self.patience, 0.25
        while True:
            try:
                status, text = await self._once(method, path, data)
            except (aiohttp.ClientConnectionError, TimeoutError) as error:
                status, text = 503, f"{type(error).__name__} {error}".strip()
            if status == 200:
                return kind.model_validate_json(text)
            if status not in BUSY:
                said = f"{self.url}{path} answered {status}: {text[:500]}"
                raise InputError(said) if 400 <= status < 500 else NoAnswer(said)
            if loop.time() + pause > until:
                raise NoAnswer(f"{self.url}{path} did not answer for {self.patience:g} s ({text[:200]})")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 8.0)

    async def _once(self, method: str, path: str, data: str | None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        limit = aiohttp.ClientTimeout(total=self.timeout)
        async with (
            aiohttp.ClientSession(timeout=limit, headers=headers) as session,
            session.request(method, self.url.rstrip("/") + path, data=data) as response,
        ):
            return response.status, await response.text()
