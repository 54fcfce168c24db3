"""The client against live servers: ours, one that is busy at first, one that fails, and none."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from mechreward.errors import InputError
from mechreward.integrations.client import NoAnswer, RewardClient
from mechreward.integrations.protocol import Row
from mechreward.integrations.scorer import Scorer
from mechreward.integrations.server import create_app
from mechreward.reward import FeatureReward

ROWS = [Row(prompt_ids=[3, 9], completion_ids=[5, 11, 40]), Row(prompt_ids=[3], completion_ids=[8, 6])]
SCORE = {"score": 2.0, "outcome": 1.0, "features": 0.5, "token_rewards": [0.5, None]}


def asked(url: str, rows: list[Row] = ROWS, token: str | None = None, **options: Any) -> Any:
    client = RewardClient(url, token, patience=options.pop("patience", 5.0))
    return asyncio.run(client.score(rows, **options))


@pytest.fixture
def scorer(sae_of_layer, tiny_llama, char_tokenizer) -> Scorer:
    return Scorer(FeatureReward({3: 1.0, 7: -0.5}, sae_of_layer(1)), tiny_llama, char_tokenizer)


def test_scores_come_as_they_were_made(serve: Callable[[Any], str], scorer: Scorer) -> None:
    url = serve(create_app(scorer, token="hush"))
    assert asked(url, token="hush") == scorer.score(scorer.read(ROWS))
    assert asyncio.run(RewardClient(url + "/", "hush").spec()) == scorer.spec(1024)


def test_many_at_once_each_get_their_own(serve, scorer) -> None:
    client = RewardClient(serve(create_app(scorer)))
    rows = [Row(prompt_ids=[3], completion_ids=[4 + n, 5]) for n in range(24)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(client.score([row]) for row in rows))

    apart = [scorer.score(scorer.read([row]))[0] for row in rows]
    found = [score for [score] in asyncio.run(all_of_them())]
    assert len({score.score for score in apart}) > 12
    for each, alone in zip(found, apart, strict=True):
        assert each.token_rewards == pytest.approx(alone.token_rewards, abs=1e-5)


def test_a_refusal_is_the_servers_sentence_and_is_not_repeated(serve, scorer) -> None:
    url = serve(create_app(scorer, token="hush"))
    started = time.monotonic()
    with pytest.raises(InputError, match="answered 401: .*secret is missing or wrong"):
        asked(url)
    with pytest.raises(InputError, match="answered 422: .*row 0 holds token 99"):
        asked(url, [Row(prompt_ids=[3], completion_ids=[99])], token="hush")
    with pytest.raises(InputError, match="answered 409: .*spec_hash: abc is not served here"):
        asked(url, token="hush", spec_hash="abc")
    assert time.monotonic() - started < 4


def flaky(statuses: list[int]) -> FastAPI:
    """Answers with these statuses in turn, then scores every row alike."""
    app = FastAPI()

    @app.post("/v1/score")
    async def score() -> Any:
        if statuses:
            return JSONResponse({"error": "not now"}, statuses.pop(0))
        return {"scores": [SCORE], "spec_hash": "s"}

    return app


def test_a_busy_server_is_asked_again(serve) -> None:
    statuses = [503, 502]
    [score] = asked(serve(flaky(statuses)), ROWS[:1])
    assert statuses == [] and score.model_dump() == SCORE


def test_a_server_that_fails_is_no_zero(serve) -> None:
    statuses = [500, 500]
    with pytest.raises(NoAnswer, match="answered 500: .*not now"):
        asked(serve(flaky(statuses)), ROWS[:1])
    assert statuses == [500]


def test_a_server_that_is_not_there_is_waited_for_and_then_said() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(NoAnswer, match=r"did not answer for 1 s \(ClientConnectorError"):
            asked(url, patience=1.0)
    assert 0.7 < time.monotonic() - started < 5


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MECHREWARD_URL", raising=False)
    with pytest.raises(InputError, match="^MECHREWARD_URL: is not set"):
        RewardClient.from_environment()
    monkeypatch.setenv("MECHREWARD_URL", "http://a:1")
    monkeypatch.setenv("MECHREWARD_TOKEN", "hush")
    client = RewardClient.from_environment()
    assert (client.url, client.token) == ("http://a:1", "hush") and "hush" not in repr(client)
