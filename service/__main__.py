"""The command line: `chat-history serve`, `keys`, `verify`, `import`, `expire`, `mongo-url`.

What is slow to import is imported where it is used, and for `serve` while the embedded engine starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import getpass
import importlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import structlog
import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from service import logs
from service.embedded import EmbeddedEngine, EmbeddedEngineError, engine_for_command, require_engine
from service.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from service.database import Database
    from service.keys import Keys
    from service.lifecycle import Lifecycle, Receipt
    from service.verify import Report

T = TypeVar("T")

app = typer.Typer(
    help="Chat History Database: the service in which AI agents keep their conversations.",
    epilog="Everything else is set by CHAT_* variables or in .env; docs/settings.md lists them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Listen here. [CHAT_HOST, 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="And on this port. [CHAT_PORT, 8000]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [CHAT_WORKERS, 1]")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine without authentication.")
    ] = None,
) -> None:
    """Run the service: on CHAT_MONGODB_URL, or with the embedded engine as its child."""
    settings = _settings(host=host, port=port, workers=workers, insecure=insecure)
    _refuse_to_be_open(settings)
    if settings.tracing and not _tracing_is_installed():
        _fail("CHAT_TRACING needs the extra `otel`. In a clone of the repository: pip install '.[otel]'.")
    logs.configure(settings)
    _log_what_was_read(settings)
    settings = _with_room_for_connections(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    with contextlib.ExitStack() as stack:
        if settings.mongodb_url is None:
            try:
                stack.enter_context(EmbeddedEngine(settings, meanwhile=_import_service))
            except EmbeddedEngineError as error:
                _fail(str(error))
            print('mongosh "$(chat-history mongo-url)"', flush=True)
        print(f"Database: {settings.database_name}", flush=True)
        scheme = "http" if settings.tls_cert is None else "https"
        page = "/docs" if settings.auth == "none" else ""
        print(f"Chat History Database: {scheme}://{settings.host}:{settings.port}{page}", flush=True)
        _run(settings)


def _log_what_was_read(settings: Settings) -> None:
    """Log which `.env` was read, and which variables are no settings."""
    log = structlog.get_logger(__name__)
    if settings.env_file_read is not None:
        log.info("env_file_read", file=str(settings.env_file_read))
    if settings.unknown_variables:
        log.warning("unknown_variables", names=settings.unknown_variables)


def _with_room_for_connections(settings: Settings) -> Settings:
    """Allow the process two descriptors for each connection, or lower the limit of connections to half.

    The other half is for the database, and for those who are told that there are too many: without a
    descriptor they would be reset instead.
    """
    try:
        import resource
    except ImportError:
        return settings  # Windows has no such limit
    wanted = 2 * settings.connections_max
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than a limit of its own
            room = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    structlog.get_logger(__name__).warning(
        "connections_max_lowered",
        detail=f"The process may open {soft} descriptors, so CHAT_CONNECTIONS_MAX is {soft // 2} "
        f"and not {settings.connections_max}. Raise the limit (`ulimit -n {wanted}`) or lower the setting.",
    )
    return _settings(connections_max=soft // 2)


def _tracing_is_installed() -> bool:
    from service import tracing

    return tracing.is_installed()


def _refuse_to_be_open(settings: Settings) -> None:
    """Refuse to let anybody who reaches this machine read everything, unless that was said twice."""
    local = settings.host == "localhost" or settings.host.startswith("127.") or settings.host == "::1"
    if settings.auth == "none" and not local and not settings.insecure:
        _fail(
            f"Without authentication (CHAT_AUTH=none), everybody who reaches {settings.host} could read and "
            "change everything. Set CHAT_AUTH=key (and CHAT_API_KEY), or say --insecure."
        )


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

    password = settings.tls_key_password
    uvicorn.run(
        "service.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        proxy_headers=settings.trusted_proxies is not None,
        forwarded_allow_ips=settings.trusted_proxies,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_keyfile_password=password.get_secret_value() if password else None,
        http=PatientProtocol,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=max(1, settings.shutdown_timeout_ms // 1000),
    )


keys_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[list[str], typer.Option(help="read, write or admin; may be said several times.")],
    tenant: Annotated[str, typer.Option(help="The one tenant whose data it reaches.")] = "",
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="After so many days it expires.")
    ] = None,
) -> None:
    """Make a key and print it, once: only a hash of it is stored."""
    from datetime import UTC, datetime, timedelta

    _require_tenant(tenant)
    unknown = set(scope) - {"read", "write", "admin"}
    if unknown:
        _fail(f"There is no scope {unknown.pop()!r}.")
    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    scopes: Any = sorted(set(scope))

    async def create(keys: Keys, said: dict[str, Any]) -> str:
        key, text = await keys.create(name, scopes, tenant=tenant, expires_at=expires_at)
        said |= {"tenant": tenant, "what": f"{key.id}: {'+'.join(scopes)}"}
        return text

    print(_with_keys("keys create", create))


@keys_app.command("list")
def list_keys() -> None:
    """List every key: its id, name, scopes, tenant, and what became of it."""
    for key in _with_keys("keys list", lambda keys, _: keys.list_all()):
        times = {"expires": key.expires_at, "revoked": key.revoked_at, "last used": key.last_used_at}
        said = [f"{what} {when:%Y-%m-%d %H:%M}" for what, when in times.items() if when is not None]
        print("\t".join([key.id, key.name, "+".join(key.scopes), key.tenant or "-", ", ".join(said)]))


@keys_app.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id, as `keys list` prints it.")]) -> None:
    """Revoke a key. A service that runs knows within CHAT_KEY_CACHE_MS."""

    async def revoke(keys: Keys, said: dict[str, Any]) -> bool:
        revoked = await keys.revoke(key_id)
        said |= {"what": key_id[:128], "status": 0 if revoked else 1}
        return revoked

    if not _with_keys("keys revoke", revoke):
        _fail(f"There is no key {key_id} that is not revoked already.")


@app.command("import")
def import_users(
    files: Annotated[
        list[Path], typer.Argument(help="Exports of users (NDJSON).", exists=True, dir_okay=False)
    ],
    tenant: Annotated[str, typer.Option(help="The tenant to import into.")] = "",
    user: Annotated[
        str | None, typer.Option(help="Refuse every file that has anything of another user, before storing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, and store nothing.")] = False,
) -> None:
    """Take exports back, exactly, ids and times included. It may be repeated: what is there is let be.

    Exit code 0: all of it is there. 1: a file is no whole export, or something else stands under an id; what
    came before it is stored.
    """
    from service.chat_service import is_id
    from service.importing import Imported, import_file
    from service.scopes import Scope

    _require_tenant(tenant)
    settings = _settings()

    async def run() -> None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            async with _lifecycle(settings) as (lifecycle, database):
                imported = functools.partial(import_file, lifecycle.of(Scope(tenant)), user_id=user)
                if user is not None:
                    for file in files:
                        await imported(file, Imported(), dry_run=True)
                for file in files:
                    task = bar.add_task(file.name, total=file.stat().st_size)
                    progress = functools.partial(_show, bar, task)
                    done = Imported()
                    async with _audited(settings, database, "import", unless=dry_run) as said:
                        said["tenant"] = tenant
                        try:
                            await imported(file, done, dry_run=dry_run, progress=progress)
                        finally:
                            said["user_id"] = done.user_id if is_id(done.user_id) else None
                            said["what"] = f"{done.conversations} conversations, {done.messages} messages"
                    print(
                        f"{file}: {done.conversations} conversations, {done.messages} messages imported"
                        f"{' (dry run)' if dry_run else ''}, {done.there} conversations were there"
                    )

    _on_database(settings, run)


def _show(bar: Progress, task: TaskID, size: int) -> None:
    bar.update(task, completed=size)


@app.command()
def expire(
    dry_run: Annotated[bool, typer.Option(help="Count, and remove nothing.")] = False,
) -> None:
    """Remove what has expired, as the service does every minute; or say what it would remove."""
    settings = _settings()

    async def run() -> Receipt:
        async with (
            _lifecycle(settings) as (lifecycle, database),
            _audited(settings, database, "expire", unless=dry_run) as said,
        ):
            removed = await lifecycle.expire(dry_run=dry_run)
            said["what"] = f"{removed.conversations} conversations, {removed.messages} messages"
            return removed

    done = _on_database(settings, run)
    what = "would expire" if dry_run else "expired"
    print(f"{done.conversations} conversations with {done.messages} messages {what}")


@contextlib.asynccontextmanager
async def _opened(settings: Settings, *, make_indexes: bool = True) -> AsyncIterator[Database]:
    from service.database import Database

    database = Database(settings)
    await database.open(make_indexes=make_indexes)
    try:
        yield database
    finally:
        await database.close()


@contextlib.asynccontextmanager
async def _lifecycle(settings: Settings) -> AsyncIterator[tuple[Lifecycle, Database]]:
    from service.chat_service import ChatService
    from service.lifecycle import Lifecycle

    # What a process was killed in the middle of is locked for as long as the database lets it, a minute.
    settings = settings.model_copy(update={"database_timeout_ms": max(settings.database_timeout_ms, 90_000)})
    async with _opened(settings) as database:
        yield Lifecycle(database, ChatService(database, settings), settings), database


@contextlib.asynccontextmanager
async def _audited(
    settings: Settings, database: Database, command: str, *, unless: bool = False
) -> AsyncIterator[dict[str, Any]]:
    """Note a command in the audit trail, where there is one, with what is put into the yielded facts."""
    from service.audit import Audit

    said: dict[str, Any] = {}
    status = 1
    try:
        yield said
        status = 0
    finally:
        if settings.audit_days is not None and not unless:
            audit = Audit(database)
            who = f"command:{_operator()}"
            facts = {"principal": who, "tenant": "", "method": "COMMAND", "route": command, "status": status}
            audit.note(**facts | said)
            await audit.stop()


def _operator() -> str:
    """Return the name of who runs this, or the number of a user who has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _require_tenant(tenant: str) -> None:
    """End unless this can be a tenant's name (or is empty, for the one without)."""
    from service.chat_service import is_id

    if tenant and not is_id(tenant):
        _fail(f"{tenant!r} is no name for a tenant.")


def _with_keys(command: str, work: Callable[[Keys, dict[str, Any]], Coroutine[Any, Any, T]]) -> T:
    """Do something with the keys in the database, the embedded engine's too, running or not.

    What the work puts into its second argument is noted in the audit trail.
    """
    from service.keys import Keys

    settings = _settings()

    async def run() -> T:
        async with _opened(settings) as database, _audited(settings, database, command) as said:
            return await work(Keys(database, settings), said)

    return _on_database(settings, run)


def _on_database(settings: Settings, run: Callable[[], Coroutine[Any, Any, T]], code: int = 1) -> T:
    """Run something on the database, with the embedded engine for as long, if no service has it running.

    Which database it is goes to stderr, since stdout may be data.
    """
    from service.errors import ChatHistoryError

    logs.configure(settings.model_copy(update={"log_level": "error"}))
    _say_what_was_read(settings)
    with contextlib.ExitStack() as stack:
        if settings.mongodb_url is None:
            try:
                stack.enter_context(engine_for_command(settings, _say))
            except EmbeddedEngineError as error:
                _fail(str(error), code)
        _say(f"works on {settings.database_name}")
        try:
            return asyncio.run(run())
        except ChatHistoryError as error:
            _fail(error.detail or error.title, code)


@app.command("mongo-url")
def mongo_url() -> None:
    """Print the URL of the database, as drivers and mongosh take it, with its password."""
    settings = _settings()
    _say_what_was_read(settings)
    if settings.mongodb_url is None:
        try:
            require_engine(settings)
        except EmbeddedEngineError as error:
            _fail(str(error))
    _say(f"this is {settings.database_name}")
    print(settings.url)


@app.command()
def verify(
    repair: Annotated[bool, typer.Option(help="Mend what can be mended without guessing.")] = False,
) -> None:
    """Walk the database and prove its invariants; a line for each violation.

    Exit code 0: all of them hold, or were mended. 1: some do not. 2: the database cannot be read.
    """
    settings = _settings()
    report = _on_database(settings, lambda: _verify(settings, repair=repair), 2)
    print(
        f"{report.conversations} conversations, {report.messages} messages, "
        f"{len(report.violations)} violations, {report.left} left"
    )
    raise typer.Exit(1 if report.left else 0)


async def _verify(settings: Settings, *, repair: bool) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    from service.chat_service import ChatService
    from service.verify import Verifier

    async with _opened(settings, make_indexes=False) as database:
        verifier = Verifier(database, ChatService(database, settings), repair=repair)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("verifying", total=None)
            async with _audited(settings, database, "verify --repair", unless=not repair) as said:
                report = await verifier.run(lambda done, total: bar.update(task, completed=done, total=total))
                said["what"] = f"{len(report.violations)} violations, {report.left} left"
        for violation in report.violations:
            print(violation)
        return report


def _settings(**overrides: Any) -> Settings:
    """Read the settings; what the command line says goes to the worker processes by the environment."""
    for name, value in overrides.items():
        if value is not None:
            os.environ[f"CHAT_{name.upper()}"] = str(value)
    try:
        return Settings()
    except ValidationError as error:
        _fail("\n".join(_fault(list(each["loc"]), each["msg"]) for each in error.errors()))
    except (SettingsError, OSError, UnicodeDecodeError) as error:
        _fail(f"The settings cannot be read: {error}.")


def _fault(place: list[int | str], message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"CHAT_{'.'.join(map(str, place)).upper()}: {message}" if place else message


def _say_what_was_read(settings: Settings) -> None:
    if settings.env_file_read is not None:
        _say(f"read {settings.env_file_read}")
    for name in settings.unknown_variables:
        _say(f"{name} is no setting of this service, so it has no effect")


def _say(message: str) -> None:
    """Say something beside the output, which may be data."""
    print(f"chat-history: {message}", file=sys.stderr, flush=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    _say(message)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
