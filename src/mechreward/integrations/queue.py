"""Dynamic batching: rows that arrive while a forward runs are read together in the next one.

verl and OpenRLHF send a row a request. Nothing waits for a batch to fill: with one client each row is read at once,
with a hundred they come together by themselves, as many as one forward takes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from mechreward.integrations.protocol import Score
from mechreward.integrations.scorer import Reading

Work = Callable[[Sequence[Reading]], list[Score]]


class QueueFull(Exception):
    """More rows wait than the queue holds; the client should come again."""


@dataclass
class Counts:
    """Since the server started."""

    rows: int = 0
    tokens: int = 0
    forwards: int = 0
    failures: int = 0
    seconds: float = 0.0
    """Spent in `work`."""


@dataclass
class ScoreQueue:
    """Rows on their way to one worker thread. Of one event loop; `run` has to be running there."""

    work: Work
    batch_size: int
    most: int
    """Rows that may wait."""
    counts: Counts = field(default_factory=Counts)
    _waiting: deque[tuple[Reading, asyncio.Future[Score]]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return len(self._waiting)

    async def score(self, readings: Sequence[Reading]) -> list[Score]:
        """The rows' scores, in order.

        Raises:
            QueueFull: if there is no room for all of them.
            Exception: what `work` raised for a row.
        """
        if len(self._waiting) + len(readings) > self.most:
            raise QueueFull(f"{len(self._waiting)} rows wait already, and at most {self.most} may")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Score]] = [loop.create_future() for _ in readings]
        self._waiting.extend(zip(readings, futures, strict=True))
        self._arrived.set()
        return await asyncio.gather(*futures)

    async def run(self) -> None:
        """Works until it is cancelled."""
        while True:
            await self._arrived.wait()
            batch = [self._waiting.popleft() for _ in islice(range(len(self._waiting)), self.batch_size)]
            if not self._waiting:
                self._arrived.clear()
            # Whoever hung up need not be read for.
            batch = [(reading, future) for reading, future in batch if not future.done()]
            if batch and not await self._work(batch) and len(batch) > 1:
                # One of them cannot be read; the others must not fail with it.
                for each in batch:
                    await self._work([each], last=True)

    async def _work(self, batch: list[tuple[Reading, asyncio.Future[Score]]], last: bool = False) -> bool:
        readings = [reading for reading, _ in batch]
        started = time.perf_counter()
        task = asyncio.ensure_future(asyncio.to_thread(self.work, readings))
        await asyncio.wait([task])
        self.counts.seconds += time.perf_counter() - started
        self.counts.forwards += 1
        error = task.exception()
        if error is not None:
            if last or len(batch) == 1:
                self.counts.failures += 1
                _answer(batch[0][1], error)
            return False
        self.counts.rows += len(batch)
        self.counts.tokens += sum(len(reading.completion_ids) for reading in readings)
        for (_, future), score in zip(batch, task.result(), strict=True):
            _answer(future, score)
        return True


def _answer(future: asyncio.Future[Score], found: Score | BaseException) -> None:
    if future.done():  # the client hung up meanwhile
        return
    if isinstance(found, BaseException):
        future.set_exception(found)
    else:
        future.set_result(found)
