"""The commands on the data: `import`, `expire`, `verify`, `indexes`, `mongo-url`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shlex
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from service.cli.context import (
    audited,
    cancelled_by_signals,
    fail,
    opened_database,
    read_settings,
    require_engine,
    require_tenant,
    run_on_database,
    say,
    say_what_was_read,
)
from service.embedded.data_directory import EmbeddedEngineError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from service.history.store import ConversationStore
    from service.maintenance.verify import Verifier
    from service.maintenance.walk import KeyRange
    from service.settings import Settings
    from service.user_data.erasure import RemovedCounts

# While a process that was killed still holds a lock in the database, a transaction waits for the database to
# release the lock, which takes up to a minute. So a command has more time for it than a request has.
_DATABASE_TIMEOUT_MS = 90_000


def import_users(
    files: Annotated[
        list[Path],
        typer.Argument(help="Exports of users (NDJSON); - is the standard input."),
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
    from service.tenancy import TenantScope, is_valid_id
    from service.user_data import UserData
    from service.user_data.exporting import ImportCounts, import_file

    require_tenant(tenant)
    for file in files:
        if str(file) != "-" and not (file.exists() and not file.is_dir()):
            fail(f"{file} is a directory, and no export." if file.is_dir() else f"{file} does not exist.")
    settings = read_settings()

    async def run() -> None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar, _plain_files(files) as plain:
            async with _opened_store(settings) as store:
                imported = functools.partial(import_file, UserData(store, TenantScope(tenant)), user_id=user)
                if user is not None:
                    for name, file in plain:
                        await imported(file, ImportCounts(), dry_run=True, name=name)
                for name, file in plain:
                    task = bar.add_task(Path(name).name, total=file.stat().st_size)
                    progress = functools.partial(_show_progress, bar, task)
                    done = ImportCounts()
                    async with audited(settings, store.database, "import", unless=dry_run) as facts:
                        facts["tenant"] = tenant
                        try:
                            await imported(file, done, dry_run=dry_run, progress=progress, name=name)
                        finally:
                            facts["user_id"] = done.user_id if is_valid_id(done.user_id) else None
                            facts["what"] = f"{done.conversations} conversations, {done.messages} messages"
                    print(
                        f"{name}: {done.conversations} conversations, {done.messages} messages imported"
                        f"{' (dry run)' if dry_run else ''}, {done.already_stored} conversations were there"
                    )
                    for what, count in done.changed.items():
                        print(f"  {count} {what}")

    run_on_database(settings, run)


@contextlib.contextmanager
def _plain_files(files: list[Path]) -> Iterator[list[tuple[str, Path]]]:
    """Yield each name with a file that can be read from its beginning more than once.

    The standard input and pipes are copied to temporary files, because `--user` reads a file twice, and the
    progress needs its size.
    """
    with tempfile.TemporaryDirectory(prefix="chat-history-") as directory:
        plain = []
        for number, file in enumerate(files):
            is_stdin = str(file) == "-"
            path = file if file.is_file() and not is_stdin else Path(directory, str(number))
            if path != file:
                with path.open("wb") as copy, _opened(file) as source:
                    shutil.copyfileobj(source, copy)
            plain.append(("standard input" if is_stdin else str(file), path))
        yield plain


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if str(file) == "-":
        if sys.stdin is None:
            fail("The standard input is closed, so there is nothing to import.")
        yield sys.stdin.buffer
    else:
        with file.open("rb") as opened:
            yield opened


def _show_progress(bar: Progress, task: TaskID, size: int) -> None:
    bar.update(task, completed=size)


def expire(
    dry_run: Annotated[bool, typer.Option(help="Count, and remove nothing.")] = False,
) -> None:
    """Remove what has expired, as the service does every minute; or say what it would remove."""
    settings = read_settings()

    from service.maintenance import due_times, sweep

    async def run() -> RemovedCounts:
        async with (
            _opened_store(settings) as store,
            audited(settings, store.database, "expire", unless=dry_run) as facts,
        ):
            if dry_run:
                return await sweep.count_expired(store)
            # Looked at first, because this command may have other settings than the service had.
            await due_times.fill_in_all(store)
            removed = await sweep.expire(store)
            facts["what"] = f"{removed.conversations} conversations, {removed.messages} messages"
            return removed

    done = run_on_database(settings, run)
    what = "would expire" if dry_run else "expired"
    print(f"{done.conversations} conversations with {done.messages} messages {what}")


@contextlib.asynccontextmanager
async def _opened_store(settings: Settings) -> AsyncIterator[ConversationStore]:
    from service.history.store import ConversationStore

    timeout_ms = max(settings.database_timeout_ms, _DATABASE_TIMEOUT_MS)
    settings = settings.model_copy(update={"database_timeout_ms": timeout_ms})
    async with opened_database(settings) as database:
        yield ConversationStore(database, settings)


def mongo_url() -> None:
    """Print the URL of the database, as drivers and mongosh take it, with its password."""
    settings = read_settings()
    say_what_was_read(settings)
    if settings.mongodb_url is None:
        try:
            require_engine(settings)
        except EmbeddedEngineError as error:
            fail(str(error))
    say(f"this is {settings.database_name}")
    print(settings.url)


def indexes() -> None:
    """Build the indexes that are missing, and wait for them; a line for each.

    Run it before a release whose service needs a new index. It may run beside services. Exit code 0: all
    indexes are there. 1: one cannot be made, or the database cannot be used.
    """
    settings = read_settings()
    run_on_database(settings, lambda: _build_indexes(settings))


async def _build_indexes(settings: Settings) -> None:
    async with opened_database(settings, indexes="ignore") as database:
        async with database.deadline():
            await database.indexes.look()
            await database.indexes.set_expiry()
        await database.indexes.build_all(print, say)
    print("all indexes are there")


def verify(
    repair: Annotated[bool, typer.Option(help="Repair what needs no guess.")] = False,
    tenant: Annotated[str, typer.Option(help="Only this tenant; --from and --to are then its ids.")] = "",
    begin: Annotated[
        str | None, typer.Option("--from", help="Only from this conversation on, as this command names it.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", help="Only conversations before this one, as this command names it.")
    ] = None,
) -> None:
    """Walk the database, or a part of it, and prove its invariants; a line for each violation.

    Exit code 0: all of them hold, or were repaired. 1: some do not. 2: the database cannot be read (any
    more). 3: it was interrupted. With 2 and 3 the last line on stderr is the command that goes on.
    """
    settings = read_settings()
    within = _range(tenant, begin, end)
    raise typer.Exit(run_on_database(settings, lambda: _verify(settings, within, repair=repair), 2))


def _range(tenant: str, begin: str | None, end: str | None) -> KeyRange:
    """Return the range of keys that the options mean, or end the command where they mean none."""
    from service.errors import ConversationNotFound
    from service.maintenance.walk import KeyRange
    from service.tenancy import TenantScope

    low, high = begin or None, end or None
    if tenant:
        require_tenant(tenant)
        scope = TenantScope(tenant)
        try:
            low = scope.conversation_key(low) if low else scope.prefix
            high = scope.conversation_key(high) if high else scope.end
        except ConversationNotFound:
            fail("With --tenant, --from and --to are ids of the tenant, without its name.", 2)
    if low is not None and high is not None and low >= high:
        fail(f"Nothing lies between --from {low} and --to {high}. --to must come after --from.", 2)
    return KeyRange(low, high)


async def _verify(settings: Settings, within: KeyRange, *, repair: bool) -> int:
    from service.errors import ChatHistoryError
    from service.history.store import ConversationStore
    from service.maintenance.verify import Verifier

    # No indexes are made, because a database that violates a unique index must be readable, too.
    async with opened_database(settings, indexes="ignore") as database:
        verifier = Verifier(ConversationStore(database, settings), repair=repair, within=within, note=print)
        code = 0
        try:
            async with audited(settings, database, "verify --repair", unless=not repair) as facts:
                try:
                    await _run_with_progress(verifier)
                finally:
                    facts["what"] = f"{verifier.report.violations} violations, {verifier.report.left} left"
        except asyncio.CancelledError:
            code = 3
            say("interrupted")
        except ChatHistoryError as error:
            if not verifier.has_read:
                raise
            code = 2
            say(error.detail or error.title)
    print(verifier.report, flush=True)
    if code:
        say(f"to go on: {_command(verifier.position, within.high, repair=repair)}")
    return code or int(verifier.report.left > 0)


async def _run_with_progress(verifier: Verifier) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar, cancelled_by_signals():
        task = bar.add_task("verifying", total=None)
        await verifier.run(lambda done, key: bar.update(task, completed=done, description=escape(key)))


def _command(low: str | None, high: str | None, *, repair: bool) -> str:
    """Return the command that verifies a range, for a shell."""
    options = {"--from": low, "--to": high}
    words = [word for name, key in options.items() if key is not None for word in (name, key)]
    return shlex.join(["chat-history", "verify", *(["--repair"] if repair else []), *words])
