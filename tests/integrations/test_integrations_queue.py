"""Rows of many requests in one forward, each with its own score."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from mechreward.errors import InputError
from mechreward.integrations.protocol import Score
from mechreward.integrations.queue import QueueFull, ScoreQueue
from mechreward.integrations.scorer import Reading


def reading(token: int) -> Reading:
    return Reading([1], [token] * token, "", "", None)


class Work:
    """Scores a row by its token; holds the first batch until it is let go; token 13 cannot be read."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, readings: Sequence[Reading]) -> list[Score]:
        tokens = [each.completion_ids[0] for each in readings]
        self.batches.append(tokens)
        assert self.go.wait(10)
        if 13 in tokens:
            raise InputError("token: 13 cannot be read")
        return [Score(score=float(token), outcome=None, features=None, token_rewards=[]) for token in tokens]


async def running(queue: ScoreQueue, *requests: list[int]) -> list[object]:
    """Sends the first request, the others while it is worked on; what each got."""
    work: Work = queue.work
    worker = asyncio.create_task(queue.run())
    sent = []
    for tokens in requests:
        sent.append(asyncio.create_task(queue.score([reading(token) for token in tokens])))
        await asyncio.sleep(0.02)
    work.go.set()
    found = await asyncio.gather(*sent, return_exceptions=True)
    worker.cancel()
    return [each if isinstance(each, Exception) else [score.score for score in each] for each in found]


def test_what_arrives_meanwhile_is_read_together() -> None:
    queue = ScoreQueue(Work(), batch_size=4, most=100)
    assert asyncio.run(running(queue, [1], [2, 3], [4], [5, 6])) == [[1.0], [2.0, 3.0], [4.0], [5.0, 6.0]]
    assert queue.work.batches == [[1], [2, 3, 4, 5], [6]]
    assert (queue.counts.rows, queue.counts.tokens, queue.counts.forwards) == (6, 21, 3)


def test_a_row_that_cannot_be_read_fails_alone() -> None:
    queue = ScoreQueue(Work(), batch_size=4, most=100)
    first, second, bad, last = asyncio.run(running(queue, [1], [2], [13], [4]))
    assert (first, second, last) == ([1.0], [2.0], [4.0])
    assert isinstance(bad, InputError) and str(bad) == "token: 13 cannot be read"
    assert queue.work.batches == [[1], [2, 13, 4], [2], [13], [4]]
    assert (queue.counts.rows, queue.counts.failures) == (3, 1)


def test_a_full_queue_refuses_whole_requests() -> None:
    queue = ScoreQueue(Work(), batch_size=1, most=2)
    found = asyncio.run(running(queue, [1], [2], [3, 4], [5], [6]))
    assert [found[0], found[1], found[3]] == [[1.0], [2.0], [5.0]]
    assert isinstance(found[2], QueueFull) and isinstance(found[4], QueueFull)
    assert 3 not in sum(queue.work.batches, []) and 6 not in sum(queue.work.batches, [])


def test_nothing_is_read_for_who_hung_up() -> None:
    async def hang_up(queue: ScoreQueue) -> list[Score]:
        worker = asyncio.create_task(queue.run())
        first = asyncio.create_task(queue.score([reading(1)]))
        await asyncio.sleep(0.02)
        gone, stays = (asyncio.create_task(queue.score([reading(token)])) for token in (2, 3))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0)
        queue.work.go.set()
        found = await first + await stays
        worker.cancel()
        return found

    queue = ScoreQueue(Work(), batch_size=8, most=100)
    assert [score.score for score in asyncio.run(hang_up(queue))] == [1.0, 3.0]
    assert queue.work.batches == [[1], [3]]


@pytest.mark.parametrize("tokens", [[13], [13, 13]])
def test_the_queue_goes_on_after_a_failure(tokens: list[int]) -> None:
    queue = ScoreQueue(Work(), batch_size=4, most=100)
    failed, after = asyncio.run(running(queue, tokens, [7]))
    assert isinstance(failed, InputError) and after == [7.0]
    assert queue.counts.failures == len(tokens)
