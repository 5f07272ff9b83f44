"""The command line: `chat-history serve`, `chat-history mongo-url`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
import uvicorn
from pydantic import ValidationError

from service import logs
from service.embedded import EmbeddedEngine, EmbeddedEngineError
from service.settings import Settings

app = typer.Typer(
    help="Chat History Database: the service in which AI agents keep their conversations.",
    epilog="Everything else is set by CHAT_* variables or in .env; the README lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Listen here. [CHAT_HOST, 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="And on this port. [CHAT_PORT, 8000]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [CHAT_WORKERS, 1]")] = None,
) -> None:
    """Run the service: on CHAT_MONGODB_URL, or with the embedded engine as its child."""
    settings = _settings(host=host, port=port, workers=workers)
    logs.configure(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    with contextlib.ExitStack() as stack:
        if settings.mongodb_url is None:
            try:
                stack.enter_context(EmbeddedEngine(settings))
            except EmbeddedEngineError as error:
                _fail(str(error))
            print(f"mongosh '{settings.embedded_url}'", flush=True)
        print(f"Chat History Database: http://{settings.host}:{settings.port}/docs", flush=True)
        _run(settings)


def _end(*_: object) -> NoReturn:
    """Leave in order. uvicorn answers what is in flight first, and then raises its signal again."""
    raise SystemExit(0)


def _run(settings: Settings) -> None:
    uvicorn.run(
        "service.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, settings.shutdown_timeout_ms // 1000),
    )


@app.command("mongo-url")
def mongo_url() -> None:
    """Print the URL of the database, as drivers and mongosh take it."""
    print(_settings().url)


def _settings(**overrides: Any) -> Settings:
    """Read the settings; what the command line says goes to the worker processes by the environment."""
    for name, value in overrides.items():
        if value is not None:
            os.environ[f"CHAT_{name.upper()}"] = str(value)
    try:
        return Settings()
    except ValidationError as error:
        faults = [f"CHAT_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        _fail("\n".join(faults))


def _fail(message: str) -> NoReturn:
    print(f"chat-history: {message}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
