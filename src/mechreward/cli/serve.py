"""`mechreward serve`: a pack's rewards over HTTP."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from typing import TYPE_CHECKING

from rich.markup import escape

from mechreward.cli.asking import load_given_reward
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.serve_settings import ServeSettings
from mechreward.cli.terminal import RichProgress, console
from mechreward.errors import InputError

if TYPE_CHECKING:
    from mechreward.integrations.scorer import Scorer


def serve(arguments: list[str], prog: str) -> int:
    """Loads, checks and serves until it is interrupted."""
    settings = parse_settings(ServeSettings, arguments, prog)
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise InputError('serve: needs FastAPI and uvicorn; install them with pip install "mechreward[serve]"')
    token = _token(settings)
    if token is None and not _is_loopback(settings.host):
        raise InputError(f"host: {settings.host} can be reached by others; give a secret with --token-file")
    with _listening(settings) as listening:
        quiet()
        with RichProgress().stage("load"):
            scorer = load_scorer(settings)
        _serve(scorer, settings, token, listening)
    return 0


def load_scorer(settings: ServeSettings) -> Scorer:
    """The pack, its SAE and the model that reads.

    Raises:
        InputError: as their loaders, and for a pack without a passed gate unless `ungated`.
    """
    from mechreward.inputs import verifier_of
    from mechreward.integrations.scorer import Scorer
    from mechreward.models import load_model
    from mechreward.tiny import model_path

    verifier = None if settings.verifier is None else verifier_of(settings.verifier, settings.strictness)
    reward = load_given_reward(settings, settings.pack, settings.model, settings.device)
    if reward.gate_warning is not None and not settings.ungated:
        raise InputError(f"{reward.gate_warning}; serve it all the same with --ungated")
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    return Scorer(
        reward,
        loaded.model,
        loaded.tokenizer,
        verifier=verifier,
        mode=settings.mode,
        weight=settings.weight,
        batch_size=settings.batch_size,
        model_name=settings.model,
        verifier_name=settings.verifier,
    )


def _serve(scorer: Scorer, settings: ServeSettings, token: str | None, listening: socket.socket) -> None:
    import uvicorn

    from mechreward.integrations.server import create_app

    app = create_app(scorer, token=token, max_rows=settings.max_rows, max_bytes=settings.max_mb * 2**20)
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    console.print(f"serving [bold]{escape(scorer.reward.pack.name)}[/] (spec {scorer.reward.spec_hash[:12]})")
    console.print(f"MECHREWARD_URL=http://{host}:{port}", soft_wrap=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with suppress(KeyboardInterrupt):  # how uvicorn hands on the Ctrl-C that it ended by
        server.run(sockets=[listening])


def _token(settings: ServeSettings) -> str | None:
    from mechreward.integrations.protocol import TOKEN_VARIABLE

    if settings.token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = settings.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token_file: cannot read {settings.token_file} ({error}); name a text file") from error
    if not token:
        raise InputError(f"token_file: {settings.token_file} is empty; a secret is needed")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(settings: ServeSettings) -> socket.socket:
    """The socket, taken before anything is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise InputError(f"host, port: cannot listen on {settings.host}:{settings.port} ({error.strerror})") from error
