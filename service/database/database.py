"""Opens MongoDB, bounds every call to it by a deadline, and reads and writes documents as bytes.

- Every write is part of a transaction that commits with write concern `majority`, journalled. Every read is
  from the primary with read concern `majority`, so a fail-over cannot take back what was once read.
- A read outside of a transaction waits until the server has what this process was told is committed, or what
  a token says another process was told of (`read_after`), so a new primary, or one that was cut off, does not
  answer with an older view. On a cluster all reads inside one
  `one_view` see the same point in time (`tests/integration/test_views.py`).
- All database work inside one `deadline` shares one deadline, counted from its beginning. Only the
  errors of `service.errors` leave a call, never an error of the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import pymongo
import structlog
from beanie import Document
from bson.errors import InvalidBSON
from pydantic import ValidationError
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError

from service.database import changes, raw_documents
from service.database.changes import Change
from service.database.driver import (
    READ_AFTER,
    Connection,
    Session,
    declare_documents,
    pymongo_collection,
    pymongo_session,
)
from service.database.driver_errors import NO_ANSWER, domain_error, opening_error, reason
from service.database.indexes import Indexes, IndexPolicy
from service.database.raw_documents import Budget
from service.database.shared import Leases, commit_of, find_or_make_secret, token_of
from service.database.suitability import (
    is_cluster,
    prove_transactions,
    require_shard_keys,
    require_suitable,
    takes_writes,
)
from service.database.transactions import Transaction, Transactions, snapshot_view, view_session
from service.embedded.data_directory import require_free_disk
from service.errors import (
    ChatHistoryError,
    DatabaseUnavailable,
    MalformedDocument,
    UnsuitableDatabase,
)
from service.formats.bson_codec import iter_documents
from service.settings import Settings

T = TypeVar("T")
log = structlog.get_logger(__name__)

_RECONNECT_S = 1.0
_READY_TIMEOUT_S = 1.0
_NO_PRIMARY = (
    "The database answers, and takes no writes: the server that answered is not the primary of its set."
)
# The event loop's deadline is later than the driver's by this, so that the driver can end its call by itself.
_GRACE_S = 0.2


class Database:
    """One MongoDB: opening, deadlines, transactions, and reading and writing documents as bytes.

    `open` returns also where no database answers, and goes on trying in the background. `sharded` is true on
    a cluster, where an `_id` is unique on each shard only.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection = Connection(settings)
        self._transactions = Transactions(self._connection, settings.database_timeout_ms / 1000)
        self._prepared = False
        self._index_policy: IndexPolicy = "require"
        self._why_not: ChatHistoryError = DatabaseUnavailable(
            "The service has not connected to the database yet. Try again."
        )
        self._preparing: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._secret: bytes | None = None
        self.leases = Leases(self._connection)
        self.indexes = Indexes(self._connection, self.leases, settings)
        self.embedded_engine = False
        self.sharded = False
        self.engine = "unknown"

    @property
    def limit_reads_whole_match(self) -> bool:
        """Tell whether the engine reads all documents that a filter matches, also where a limit is set.

        SecantusDB does, so there the filter itself must be bounded.
        """
        return self.embedded_engine

    @property
    def why_not_ready(self) -> str:
        """Say why the database was never prepared, or why it could not serve when `is_ready` asked last."""
        return self._why_not.detail

    # -- opening -----------------------------------------------------------------------------------

    async def open(self, *, indexes: IndexPolicy = "require") -> None:
        """Connect and prepare, or, where nothing answers, go on trying in the background.

        Raises UnsuitableDatabase when a database answers that can never serve.
        """
        self._index_policy = indexes
        self._preparing = asyncio.create_task(self._prepare_until_done())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.database_timeout_ms / 1000):
                await self._tried.wait()
        if isinstance(self._why_not, UnsuitableDatabase):
            await self.close()
            raise self._why_not

    async def close(self) -> None:
        """Stop trying, and close the connections, within about two seconds also where nothing answers."""
        self._prepared = False
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.wait([self._preparing])
        await self.indexes.close()
        await self._transactions.close()
        await self._connection.close()

    async def _prepare_until_done(self) -> None:
        while not self._prepared:
            try:
                await self._prepare()
            except Exception as error:  # noqa: BLE001  (whatever it is, the next attempt may go better)
                self._why_not = opening_error(error)
                cause = error.__cause__ if isinstance(error.__cause__, PyMongoError) else error
                code = cause.code if isinstance(cause, OperationFailure) else None
                facts = {"error": type(cause).__name__, "code": code, "reason": reason(cause)}
                if isinstance(self._why_not, UnsuitableDatabase):
                    log.error("database_unsuitable", detail=self._why_not.detail, **facts)
                elif error is self._why_not:
                    log.warning("database_not_ready", detail=self._why_not.detail)
                else:
                    log.warning("database_unreachable", **facts)
            self._tried.set()
            if not self._prepared:
                await asyncio.sleep(_RECONNECT_S)

    async def _prepare(self) -> None:
        """Ask the server what it is, refuse one that cannot serve, and make the indexes.

        Every step may be repeated, because an attempt may fail after any of them.
        """
        connection = self._connection
        if not connection.is_connected:
            connection.connect()
        with pymongo.timeout(self._timeout_s()):
            hello = await connection.command("hello")
            build = await connection.command("buildInfo")
        require_suitable(hello, build["version"], direct=connection.is_direct)
        self.embedded_engine = "secantusVersion" in build
        self.sharded = is_cluster(hello)
        self.indexes.declare(embedded_engine=self.embedded_engine)
        self.engine = (
            f"SecantusDB {build['secantusVersion']}"
            if self.embedded_engine
            else f"MongoDB {build['version']}"
        )
        if self.embedded_engine and connection.retries_writes:
            # The engine scans its table of retryable writes at every write, and transactions need no such
            # retry (docs/decisions/0003-embedded-engine.md).
            connection.connect(retry_writes=False)
        with pymongo.timeout(self._settings.database_timeout_ms / 1000):
            await declare_documents(connection.database())
        if self._index_policy != "ignore":
            await self._prove()
        self._prepared = True
        log.info("database_ready", engine=self.engine, database=connection.database().name)

    async def _prove(self) -> None:
        """Refuse a database that cannot keep the promises, and see to its indexes."""
        connection = self._connection
        if self.sharded:
            with pymongo.timeout(self._settings.database_timeout_ms / 1000):
                await require_shard_keys(connection)
        await self.indexes.prepare(build=self._index_policy == "build")
        # The embedded engine is known to have transactions, and the attempt would cost each of its starts
        # 10 to 90 ms (measured).
        if not self.embedded_engine:
            with pymongo.timeout(self._settings.database_timeout_ms / 1000):
                await prove_transactions(connection)
                await self.secret()  # which tokens need

    def _timeout_s(self) -> float:
        """Return how long a call may take: the whole time-out where a primary is known, else less.

        The driver waits for a server to appear as long as the call's deadline allows, so without a primary
        every call would wait for the whole time-out.
        """
        times = [self._settings.database_timeout_ms]
        if not self._connection.knows_primary:
            times.append(self._settings.server_selection_timeout_ms)
        return min(times) / 1000

    # -- calls -------------------------------------------------------------------------------------

    async def is_ready(self) -> bool:
        """Tell whether the database answers now, within a second, and takes writes."""
        if not self._prepared:
            return False
        try:
            with pymongo.timeout(_READY_TIMEOUT_S):
                hello = await self._connection.command("hello")
        except PyMongoError:
            self._why_not = DatabaseUnavailable("The database does not answer.")
            return False
        if not takes_writes(hello):
            self._why_not = DatabaseUnavailable(_NO_PRIMARY)
            return False
        return True

    @contextlib.asynccontextmanager
    async def deadline(self, *, seconds: float | None = None) -> AsyncIterator[None]:
        """Bound all database work inside by one deadline, and turn the driver's errors into the domain's.

        `seconds` is for work that no client waits for; without it the setting counts. Raises
        DatabaseUnavailable, StorageFull, UnsuitableDatabase or MalformedDocument.
        """
        if not self._prepared:
            raise type(self._why_not)(self._why_not.detail)
        seconds = seconds or self._timeout_s()
        try:
            # The driver keeps its deadline in everything but connecting. There the event loop's deadline
            # ends the call, and leaves the driver's thread to end by itself.
            async with asyncio.timeout(seconds + _GRACE_S):
                with pymongo.timeout(seconds):
                    yield
        except TimeoutError as error:
            raise DatabaseUnavailable(NO_ANSWER) from error
        except PyMongoError as error:
            raise domain_error(error) from error
        except (ValidationError, InvalidBSON) as error:
            raise MalformedDocument(
                "A stored document that this call reads is not well formed. It was changed by hand."
            ) from error

    def one_view(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Let all reads inside, outside of transactions, see one point in time on a cluster.

        A replica set shows a transaction at once, so there the reads stay as they are.
        """
        return snapshot_view(self._connection) if self.sharded else contextlib.nullcontext()

    async def transaction(
        self, work: Callable[[Transaction], Awaitable[T]], transaction: Transaction | None = None
    ) -> T:
        """Run `work` in a transaction and commit, as `Transactions.run` says."""
        return await self._transactions.run(work, transaction)

    async def statistics(self) -> Mapping[str, Any]:
        """Return the server's `dbStats`. The embedded engine reads every document for it."""
        statistics: dict[str, Any] = await self._connection.database().command("dbStats")
        return statistics

    async def estimated_count(self, document: type[Document]) -> int:
        """Return how many documents the server says that it has, without counting them."""
        return await self._connection.run_in_thread(pymongo_collection(document).estimated_document_count)

    async def watch(self, opened: Callable[[], None], changed: Callable[[Change], None]) -> None:
        """Call `opened`, and then `changed` for each change of a conversation, until cancelled.

        Raises the domain's errors where there is no change stream, or no more.
        """
        if not self._prepared:
            raise type(self._why_not)(self._why_not.detail)
        try:
            await changes.watch(self._connection, opened, changed)
        except PyMongoError as error:
            raise domain_error(error) from error

    def require_free_disk(self) -> None:
        """Raise StorageFull while the embedded engine's disk is all but full."""
        require_free_disk(self._settings)

    async def secret(self) -> bytes:
        """Return the 32 random bytes that this deployment makes ids with, which no caller knows.

        The database stores them, so that every process has the same bytes, and a backup has them, too.
        """
        if self._secret is None:
            try:
                self._secret = await self.transaction(find_or_make_secret)
            except DuplicateKeyError:
                # Another process has just committed the secret. The next transaction begins after that
                # commit, so it finds the secret.
                self._secret = await self.transaction(find_or_make_secret)
        return self._secret

    @property
    def commit_token(self) -> str | None:
        """The token of the latest commit that this process was told of, for reads of other processes.

        None on the embedded engine, whose reads all see every commit.
        """
        commit = self._connection.committed
        if self.embedded_engine or self._secret is None or commit is None or not commit.cluster_time:
            return None
        return token_of(commit, self._secret)

    def read_after(self, token: str) -> None:
        """Let the reads of the running call see the commit of this token. Raises InvalidRequest."""
        if self._secret is not None and not self.embedded_engine:
            READ_AFTER.set(commit_of(token, self._secret))

    # -- documents as bytes ------------------------------------------------------------------------

    async def read(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        *,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
        session: Session | None = None,
        fields: Sequence[str] | None = None,
        budget: Budget | None = None,
    ) -> list[bytes]:
        """Find documents as the BSON that the server sent, undecoded: whole, or only some of their fields.

        Without a session it is a majority read that sees every commit that this process was told of, or it
        sees the point in time of `one_view`.

        With a budget the list ends before the first document that does not fit. The server sends at most
        16 MiB in one batch and is not asked for a batch after that document, so the memory used is bounded by
        the budget and one batch, and small documents still come with one command.
        """
        find = functools.partial(
            raw_documents.find,
            pymongo_collection(document),
            query,
            fields,
            sort=sort,
            limit=limit,
            budget=budget,
        )
        own_session = view_session() if session is None else pymongo_session(session)

        def find_after_commits() -> list[bytes]:
            with self._connection.session_after_commits() as within:
                return find(within)

        # The embedded engine is one server, which has its own commits.
        if own_session is None and not self.embedded_engine:
            return await self._connection.run_in_thread(find_after_commits)
        return await self._connection.run_in_thread(functools.partial(find, own_session))

    async def pages(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        *,
        size: int,
        sort: Sequence[tuple[str, int]] = (),
        fields: Sequence[str] | None = None,
        seconds: float | None = None,
    ) -> AsyncIterator[list[bytes]]:
        """Find any number of documents, and yield them undecoded, at most `size` at a time.

        Only one page is held in memory. Each command has a deadline of its own (`seconds`, or the setting).
        It is a read outside of transactions, of what a majority has. The driver closes the cursor of a
        generator that is not read to its end.
        """
        cursor: Any = None
        while True:
            async with self.deadline(seconds=seconds):
                if cursor is None:
                    collection = pymongo_collection(document)
                    cursor = collection.find_raw_batches(
                        query, fields, batch_size=size, sort=list(sort) or None
                    )
                batch = await self._connection.run_in_thread(functools.partial(next, cursor, None))
            if batch is None:
                return
            if found := list(iter_documents(batch)):
                yield found

    async def update(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        changes: Mapping[str, Any],
        session: Session | None,
        fields: Sequence[str] | None = None,
    ) -> bytes | None:
        """Update one document and return it as it is then stored, undecoded, or None if there is none.

        With `fields` only the `_id` and these fields are returned, so a large field is not moved.
        """
        update = raw_documents.update_and_find if self.embedded_engine else raw_documents.find_one_and_update
        arguments = (pymongo_collection(document), query, changes, fields, pymongo_session(session))
        return await self._connection.run_in_thread(functools.partial(update, *arguments))

    async def update_if_equal(
        self,
        document: type[Document],
        key: str,
        expected: Mapping[str, Any],
        changes: Mapping[str, Any],
        session: Session | None,
    ) -> bool:
        """Change the document with this `_id` if the expected fields still have these values.

        Returns whether it has; `changes` are new values, or expressions of the aggregation.
        """
        arguments = (pymongo_collection(document), key, expected, changes, pymongo_session(session))
        return await self._connection.run_in_thread(
            functools.partial(raw_documents.update_if_equal, *arguments)
        )

    async def insert(
        self, document: type[Document], documents: Sequence[bytes], session: Session | None
    ) -> None:
        """Insert documents that are BSON already. Raises DuplicateKeyError where an `_id` is taken."""
        arguments = (pymongo_collection(document), documents, pymongo_session(session))
        await self._connection.run_in_thread(functools.partial(raw_documents.insert_many, *arguments))

    async def replace(
        self, document: type[Document], documents: Sequence[bytes], session: Session | None
    ) -> None:
        """Replace the messages that have the ids of these, which are BSON already."""
        arguments = (pymongo_collection(document), documents, "conversation_id", pymongo_session(session))
        await self._connection.run_in_thread(functools.partial(raw_documents.replace_many, *arguments))
