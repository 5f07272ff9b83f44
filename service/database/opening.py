"""Opens the database: connects, refuses one that cannot keep the promises, and says whether it is ready."""

from __future__ import annotations

import asyncio
import contextlib

import pymongo
import structlog
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError

from service.database.driver import (
    Connection,
    declare_documents,
)
from service.database.driver_errors import opening_error, reason
from service.database.indexes import Indexes, IndexPolicy
from service.database.shared import Leases, find_or_make_secret
from service.database.suitability import (
    is_cluster,
    prove_transactions,
    require_shard_keys,
    require_suitable,
    takes_writes,
)
from service.database.transactions import Transactions
from service.errors import (
    ChatHistoryError,
    DatabaseUnavailable,
    UnsuitableDatabase,
)
from service.settings import Settings

log = structlog.get_logger(__name__)

_RECONNECT_S = 1.0
_READY_TIMEOUT_S = 1.0
_NO_PRIMARY = (
    "The database answers, and takes no writes: the server that answered is not the primary of its set."
)


class OpenDatabase:
    """A database that is being opened, or is open.

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
    def why_not_ready(self) -> str:
        """Say why the database was never prepared, or why it could not serve when `is_ready` asked last."""
        return self._why_not.detail

    def require_prepared(self) -> None:
        """Raise why the database was never prepared."""
        if not self._prepared:
            raise type(self._why_not)(self._why_not.detail)

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

    async def secret(self) -> bytes:
        """Return the 32 random bytes that this deployment makes ids with, which no caller knows.

        The database stores them, so that every process has the same bytes, and a backup has them, too.
        """
        if self._secret is None:
            try:
                self._secret = await self._transactions.run(find_or_make_secret)
            except DuplicateKeyError:
                # Another process has just committed the secret. The next transaction begins after that
                # commit, so it finds the secret.
                self._secret = await self._transactions.run(find_or_make_secret)
        return self._secret

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
