"""Shared by the commands: reads the settings, opens the database, notes a command in the audit trail.

A command prints its result on stdout, and everything else on stderr, because the result may be data for
another program.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from service.embedded.data_directory import DataDirectoryInUse, EmbeddedEngineError, is_answered
from service.embedded.engine import START_TIMEOUT_S, EmbeddedEngine
from service.settings import Settings
from service.telemetry import logging

if TYPE_CHECKING:
    from service.database import Database, IndexPolicy


T = TypeVar("T")


def read_settings(**overrides: Any) -> Settings:
    """Read the settings, or end with what is wrong with them.

    The overrides come from the command line. They are set in the environment, because the worker processes
    of `serve` read the settings again from there.
    """
    for name, value in overrides.items():
        if value is not None:
            os.environ[f"CHAT_{name.upper()}"] = str(value)
    try:
        return Settings()
    except ValidationError as error:
        fail("\n".join(_fault(list(each["loc"]), each["msg"]) for each in error.errors()))
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        fail(f"The settings cannot be read: {error}.")


def _fault(place: list[int | str], message: str) -> str:
    """Return a sentence that names the variable, and the part of its value that is wrong."""
    message = f"{message.removeprefix('Value error, ').removesuffix('.')}."
    if not place:
        return message
    part = "".join(f" ({each})" for each in place[1:])
    return f"CHAT_{str(place[0]).upper()}{part}: {message}"


def require_tenant(tenant: str) -> None:
    """End the command unless this can be the name of a tenant, or is empty (the data without a tenant)."""
    from service.tenancy import is_valid_id

    if tenant and not is_valid_id(tenant):
        fail(f"{tenant!r} is no name for a tenant.")


def run_on_database(settings: Settings, run: Callable[[], Coroutine[Any, Any, T]], code: int = 1) -> T:
    """Run a coroutine that uses the database, or end with the exit code if the database cannot be used.

    If CHAT_MONGODB_URL is unset and no service runs the embedded engine, the engine runs for as long as the
    coroutine does.
    """
    from service.errors import ChatHistoryError

    logging.configure(settings.model_copy(update={"log_level": "error"}))
    say_what_was_read(settings)
    with contextlib.ExitStack() as stack:
        if settings.mongodb_url is None:
            try:
                stack.enter_context(engine_for_command(settings, say))
            except EmbeddedEngineError as error:
                fail(str(error), code)
        say(f"works on {settings.database_name}")
        try:
            return asyncio.run(run())
        except ChatHistoryError as error:
            fail(error.detail or error.title, code)


@contextlib.asynccontextmanager
async def opened_database(settings: Settings, *, indexes: IndexPolicy = "require") -> AsyncIterator[Database]:
    """Open the database, and close it afterwards."""
    from service.database import Database

    database = Database(settings)
    await database.open(indexes=indexes)
    try:
        yield database
    finally:
        await database.close()


@contextlib.asynccontextmanager
async def audited(
    settings: Settings, database: Database, command: str, *, unless: bool = False
) -> AsyncIterator[dict[str, Any]]:
    """Write a command into the audit trail when the command ends, if the settings keep one.

    The command puts facts into the yielded dictionary, which overrides what is recorded by default. A command
    that fails is recorded, too, with the status 1.
    """
    from service.access.audit import Audit

    facts: dict[str, Any] = {}
    status = 1
    try:
        yield facts
        status = 0
    finally:
        if settings.audit_days is not None and not unless:
            audit = Audit(database)
            defaults = {
                "principal": f"command:{_operator()}",
                "tenant": "",
                "method": "COMMAND",
                "route": command,
                "status": status,
            }
            audit.note(**defaults | facts)
            await audit.stop()


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Cancel the running task at SIGINT and SIGTERM, so that it can say how far it has come."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, task.cancel)
    try:
        yield
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)


def _operator() -> str:
    """Return the name of the user who runs this, or the number of a user without a name (in a container)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # Windows without USERNAME has no module to ask
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def say_what_was_read(settings: Settings) -> None:
    """Name the `.env` that was read, and the variables that are no settings."""
    if settings.env_file_read is not None:
        say(f"read {settings.env_file_read}")
    for name in settings.unknown_variables:
        say(f"{name} is no setting of this service, so it has no effect")


def say(message: str) -> None:
    """Print a message on stderr, so that it does not mix with the output."""
    print(f"chat-history: {message}", file=sys.stderr, flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print a message on stderr and end the command with an exit code."""
    say(message)
    raise typer.Exit(code)


# How long a command waits for an engine that is recorded but does not answer.
_PATIENCE_S = 2.0
_RETRY_S = 0.1


class _EngineStarts(EmbeddedEngineError):
    """A service has the data directory, and has not recorded its engine yet."""


@contextlib.contextmanager
def engine_for_command(settings: Settings, say: Callable[[str], None]) -> Iterator[None]:
    """Give a command the embedded engine: that of a service that runs, or one that ends with the command.

    A command waits until another command has ended, because the engine of the other command ends with it.
    Raises EmbeddedEngineError unless the engine that answers proves to be the one of this data directory.
    """
    with contextlib.ExitStack() as stack:
        began, waits = time.monotonic(), False
        while True:
            try:
                stack.enter_context(EmbeddedEngine(settings, for_service=False))
                break
            except DataDirectoryInUse as error:
                in_use = error
            if _is_for_service(settings):
                try:
                    require_engine(settings)
                    break
                except EmbeddedEngineError as error:
                    patience_s = START_TIMEOUT_S if isinstance(error, _EngineStarts) else _PATIENCE_S
                    if time.monotonic() - began > patience_s:
                        raise
            elif not waits:
                waits = True
                say(f"waits until process {in_use.process} has done its work on {settings.data_dir}")
            time.sleep(_RETRY_S)
        yield


def require_engine(settings: Settings) -> None:
    """Raise EmbeddedEngineError unless the engine of the data directory answers where it is recorded."""
    from pymongo.errors import PyMongoError

    data = settings.data_dir.absolute()
    try:
        record = settings.engine_record()
    except OSError as error:
        raise EmbeddedEngineError(
            f"The data directory {data} does not record where its engine is. Start its service (again): "
            "chat-history serve."
        ) from error
    if record.get("port") is None:
        raise _EngineStarts(
            f"No engine runs on the data directory {data}, or not yet. Start its service: chat-history serve."
        )
    address = f"{record['host']}:{record['port']}"
    try:
        answered = is_answered(settings)
    except PyMongoError as error:
        raise EmbeddedEngineError(
            f"The engine of the data directory {data} does not answer on {address}, where it is recorded."
        ) from error
    if not answered:
        raise EmbeddedEngineError(
            f"What answers on {address} is not the engine of the data directory {data}, which is recorded "
            "there. Nothing was read or written. Start this directory's service again: chat-history serve."
        )


def _is_for_service(settings: Settings) -> bool:
    """Tell whether the engine that is recorded is a service's, as it is where no record can be read (yet)."""
    with contextlib.suppress(OSError):
        return bool(settings.engine_record().get("for_service", True))
    return True
