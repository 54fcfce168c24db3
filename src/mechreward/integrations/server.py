"""A reward server: trainers that cannot run our reader themselves send token ids and get scores back.

One process holds the model and the SAE; any number of trainers post to it (`protocol` says what). It binds loopback
unless told otherwise, and then wants a secret. Bodies are bounded before they are read, rows are checked before they
join others in a forward, and a refusal is one sentence: 401 without the secret, 409 for another reward or tokenizer
than is meant, 411 and 413 for bodies of unsaid or too large a size, 422 for rows that cannot be scored, 503 while too
many wait.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse

from mechreward.errors import InputError
from mechreward.integrations.protocol import HEALTH, METRICS, SCORE, SPEC, Refusal, ScoreReply, ScoreRequest, Spec
from mechreward.integrations.queue import QueueFull, ScoreQueue
from mechreward.integrations.scorer import Scorer

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class Elsewhere(Exception):
    """The client means another reward or another tokenizer than is served here."""


def create_app(
    scorer: Scorer, *, token: str | None = None, max_rows: int = 1024, max_bytes: int = 64 * 2**20
) -> FastAPI:
    """The server as an ASGI application, for uvicorn or a test client.

    Args:
        token: the secret that a request has to carry (`Authorization: Bearer ...`); None asks for none.
        max_rows: most rows a request may have, and most that may wait.
        max_bytes: largest body.
    """
    queue = ScoreQueue(scorer.score, scorer.batch_size, max_rows)
    spec = scorer.spec(max_rows)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(queue.run)
            yield
            tasks.cancel_scope.cancel()

    app = FastAPI(title="mechreward", lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, token=token, max_bytes=max_bytes)
    for kind, status in {RequestValidationError: 422, InputError: 422, Elsewhere: 409, QueueFull: 503}.items():
        app.add_exception_handler(kind, _refusal(status))

    @app.post(SCORE, responses={409: {"model": Refusal}, 422: {"model": Refusal}, 503: {"model": Refusal}})
    async def score(request: ScoreRequest) -> ScoreReply:
        _check_meant(request, spec)
        if len(request.rows) > max_rows:
            raise InputError(f"rows: {len(request.rows)} are too many; a request may have {max_rows}")
        readings = await anyio.to_thread.run_sync(scorer.read, request.rows)
        return ScoreReply(scores=await queue.score(readings), spec_hash=spec.spec_hash)

    @app.get(SPEC)
    async def said() -> Spec:
        return spec

    @app.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(METRICS)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_exposition(queue))

    return app


@dataclass
class Guard:
    """Turns away who lacks the secret, and bodies that are too large, before anything of them is read."""

    app: ASGIApp
    token: str | None
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == HEALTH:
            await self.app(scope, receive, send)
            return
        refused = self._refused(Request(scope))
        await (self.app if refused is None else refused)(scope, receive, send)

    def _refused(self, request: Request) -> JSONResponse | None:
        given = request.headers.get("authorization", "")
        if self.token is not None and not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            return _said(401, "Authorization: the header 'Bearer ...' with this server's secret is missing or wrong")
        if request.method != "POST":
            return None
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return _said(411, "Content-Length: is missing; bodies of unsaid size are not read")
        if int(length) > self.max_bytes:
            return _said(413, f"Content-Length: {length} bytes are too many; at most {self.max_bytes} are read")
        return None


def _check_meant(request: ScoreRequest, spec: Spec) -> None:
    for name in ("spec_hash", "tokenizer_hash"):
        meant, served = getattr(request, name), getattr(spec, name)
        if meant is not None and meant != served:
            raise Elsewhere(f"{name}: {meant} is not served here, but {served}")


def _refusal(status: int) -> Any:
    async def handler(_: Request, error: Exception) -> JSONResponse:
        said = _first(error) if isinstance(error, RequestValidationError) else str(error)
        return _said(status, said)

    return handler


def _said(status: int, error: str) -> JSONResponse:
    again = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(Refusal(error=error).model_dump(), status, headers=again)


def _first(error: RequestValidationError) -> str:
    """The first of the complaints as one sentence; a body may be large, so values are cut."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}"
    return f"{field}: {repr(first['input'])[:80]} is not allowed ({first['msg']})"


def _exposition(queue: ScoreQueue) -> str:
    """Counters in Prometheus' text format."""
    counts = queue.counts
    rows = {
        "rows_total": ("counter", counts.rows),
        "tokens_total": ("counter", counts.tokens),
        "forwards_total": ("counter", counts.forwards),
        "failures_total": ("counter", counts.failures),
        "forward_seconds_total": ("counter", counts.seconds),
        "waiting_rows": ("gauge", len(queue)),
    }
    lines = (f"# TYPE mechreward_{name} {kind}\nmechreward_{name} {value}\n" for name, (kind, value) in rows.items())
    return "".join(lines)
