"""The command line: `chat-history serve`, `chat-history verify`, `chat-history mongo-url`.

What is slow to import is imported where it is used, and for `serve` while the embedded engine starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from service import logs
from service.embedded import DataDirectoryInUse, EmbeddedEngine, EmbeddedEngineError
from service.settings import Settings

if TYPE_CHECKING:
    from service.verify import Report

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
                stack.enter_context(EmbeddedEngine(settings, meanwhile=_import_service))
            except EmbeddedEngineError as error:
                _fail(str(error))
            print(f"mongosh '{settings.embedded_url}'", flush=True)
        print(f"Chat History Database: http://{settings.host}:{settings.port}/docs", flush=True)
        _run(settings)


def _end(*_: object) -> NoReturn:
    """Leave in order. uvicorn answers what is in flight first, and then raises its signal again."""
    raise SystemExit(0)


def _import_service() -> None:
    """Import what serving needs, which takes about as long as the engine does to start."""
    for name in ("service.app", "service.connections", "uvicorn.loops.uvloop"):
        importlib.import_module(name)


def _run(settings: Settings) -> None:
    import uvicorn

    from service.connections import PatientProtocol

    uvicorn.run(
        "service.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        http=PatientProtocol,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=max(1, settings.shutdown_timeout_ms // 1000),
    )


@app.command("mongo-url")
def mongo_url() -> None:
    """Print the URL of the database, as drivers and mongosh take it."""
    print(_settings().url)


@app.command()
def verify(
    repair: Annotated[bool, typer.Option(help="Mend what can be mended without guessing.")] = False,
) -> None:
    """Walk the database and prove its invariants; a line for each violation.

    Exit code 0: all of them hold, or were mended. 1: some do not. 2: the database cannot be read.
    """
    from service.errors import ChatHistoryError

    settings = _settings()
    logs.configure(settings.model_copy(update={"log_level": "error"}))
    with contextlib.ExitStack() as stack:
        if settings.mongodb_url is None:
            try:
                stack.enter_context(EmbeddedEngine(settings))
            except DataDirectoryInUse:
                pass  # a service runs, and its engine is the one to look at
            except EmbeddedEngineError as error:
                _fail(str(error), 2)
        try:
            report = asyncio.run(_verify(settings, repair=repair))
        except ChatHistoryError as error:
            _fail(error.detail, 2)
    print(
        f"{report.conversations} conversations, {report.messages} messages, "
        f"{len(report.violations)} violations, {report.left} left"
    )
    raise typer.Exit(1 if report.left else 0)


async def _verify(settings: Settings, *, repair: bool) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    from service.chat_service import ChatService
    from service.database import Database
    from service.verify import Verifier

    database = Database(settings)
    await database.open(make_indexes=False)
    try:
        verifier = Verifier(database, ChatService(database, settings), repair=repair)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("verifying", total=None)
            report = await verifier.run(lambda done, total: bar.update(task, completed=done, total=total))
        for violation in report.violations:
            print(violation)
        return report
    finally:
        await database.close()


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


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"chat-history: {message}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
