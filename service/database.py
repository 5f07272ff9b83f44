"""Opens MongoDB: the only module that names Motor (docs/decisions/0001-driver.md).

What it holds to:

- Every write is part of a transaction that commits with write concern `majority`, journalled; every
  read is from the primary with read concern `majority`, so that what was once read cannot be rolled
  back by a fail-over.
- `transaction` may run its work several times, so work must be written to be run again. When a commit
  ends without an answer, nobody knows whether it took effect: `may_have_committed` then tells the next
  run, which finds out by the ids that it was about to insert.
- Everything in one `call` shares one deadline, counted from its beginning, and no driver's error
  leaves it: only those of `service.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pymongo
import structlog
from beanie import Document, init_beanie
from bson.raw_bson import RawBSONDocument
from pymongo import monitoring
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WTimeoutError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from service import metrics
from service.documents import BY_ACTIVITY, ApiKey, AuditEntry, Conversation, Erasure, Message, Secret
from service.errors import (
    BatchTooLarge,
    ChatHistoryError,
    DatabaseUnavailable,
    StorageFull,
    UnsuitableDatabase,
)
from service.payloads import NeverDBRef, split
from service.settings import Settings

# Motor runs the driver in threads, and reads this when it is imported. Its default is five a core,
# which on a small machine lets a few slow calls stop all others.
os.environ.setdefault("MOTOR_MAX_WORKERS", "32")

from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorClientSession

Session = AsyncIOMotorClientSession
T = TypeVar("T")
log = structlog.get_logger(__name__)

_DURABLE = WriteConcern("majority", j=True)
_RECONNECT_S = 1.0
_FOR_IDS = "conversation_ids"
_THREADS = 32
_READY_TIMEOUT_S = 1.0
# By how much the loop's deadline is later than the driver's.
_GRACE_S = 0.2
# How often a lost session is killed once the database answers again, and how many in one command.
_KILLS = 5
_KILLS_AT_ONCE = 1_000
# Indexes are made at start, and on an existing database of another shape that may take a while.
_INDEXES_TIMEOUT_S = 600.0
# Codes of the server: 14031 OutOfDiskSpace; 257 TransactionTooLarge and 388 TransactionTooLargeForCache;
# then 1 InternalError and 8 UnknownError, 24 LockTimeout, 50 MaxTimeMSExpired, 112 WriteConflict,
# 251 NoSuchTransaction, 290 TransactionExceededLifetimeLimit, and 91, 189, 10107, 11600, 11602, 13435
# and 13436: shutting down, or no longer the primary.
_OUT_OF_SPACE = {14031}
_TOO_LARGE = {257, 388}
_AWAY = {1, 8, 24, 50, 91, 112, 189, 251, 290, 10107, 11600, 11602, 13435, 13436}

_NO_ANSWER = (
    "It did not answer in time. A write whose answer is lost may have been stored: repeat it with the same "
    "Idempotency-Key or message ids, and it is stored once."
)
STANDALONE = (
    "This MongoDB is a standalone server, which has no transactions. Start it as a replica set of one: "
    "`mongod --replSet rs0`, and once `mongosh --eval 'rs.initiate()'`."
)


@dataclass
class Transaction:
    """What the work of a transaction is given: its session, and what an earlier run may have done."""

    session: Session | None = None
    may_have_committed: bool = False


class Database:
    """The connection, the indexes, transactions, and the raw reading and writing of messages.

    It opens without a database: `open` tries once, and goes on trying until it has prepared one.
    `reads_whole_match` is true on an engine that reads all that a filter matches before it cuts.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AsyncIOMotorClient[dict[str, Any]] | None = None
        self._prepared = False
        self._make_indexes = True
        self._why_not: ChatHistoryError = DatabaseUnavailable("No connection was made yet.")
        self._preparing: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")
        self._lost_sessions: dict[bytes, tuple[Mapping[str, Any], int]] = {}
        self._killing: asyncio.Task[None] | None = None
        self._secret: bytes | None = None
        self.embedded_engine = False
        self.engine = "unknown"

    @property
    def reads_whole_match(self) -> bool:
        """Tell whether a read must bound what it matches, since a limit does not (SecantusDB)."""
        return self.embedded_engine

    @property
    def why_not_ready(self) -> str:
        """Say why the database was never prepared, or that it does not answer now."""
        return "The database does not answer." if self._prepared else self._why_not.detail

    # -- opening -----------------------------------------------------------------------------------

    async def open(self, *, make_indexes: bool = True) -> None:
        """Connect and prepare, or, where nothing answers, go on trying in the background.

        Raises UnsuitableDatabase when a database answers that can never serve.
        """
        self._make_indexes = make_indexes
        self._preparing = asyncio.create_task(self._prepare_until_done())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.database_timeout_ms / 1000):
                await self._tried.wait()
        if isinstance(self._why_not, UnsuitableDatabase):
            await self.close()
            raise self._why_not

    async def close(self) -> None:
        """Stop trying, and close the connections."""
        self._prepared = False
        if self._preparing is not None:
            self._preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._preparing
        self._lost_sessions.clear()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2 * _RECONNECT_S)
        if self._client is not None:
            self._client.close()
            self._client = None
        self._threads.shutdown(wait=False)

    async def _prepare_until_done(self) -> None:
        while not self._prepared:
            try:
                await self._prepare()
            except UnsuitableDatabase as error:
                self._why_not = error
                log.error("database_unsuitable", detail=error.detail)
            except (PyMongoError, OSError) as error:
                self._why_not = DatabaseUnavailable("The database was not reached yet.")
                log.warning("database_unreachable", error=type(error).__name__)
            self._tried.set()
            if not self._prepared:
                await asyncio.sleep(_RECONNECT_S)

    async def _prepare(self) -> None:
        """Find out what answers, refuse what cannot serve, make the indexes (which is idempotent)."""
        if self._client is None:
            self._client = self._connect(retry_writes=None)
        with pymongo.timeout(self._timeout_s()):
            hello = await self._client.admin.command("hello")
            build = await self._client.admin.command("buildInfo")
        if "setName" not in hello and hello.get("msg") != "isdbgrid":
            raise UnsuitableDatabase(STANDALONE)
        self.embedded_engine = "secantusVersion" in build
        self.engine = (
            f"SecantusDB {build['secantusVersion']}"
            if self.embedded_engine
            else f"MongoDB {build['version']}"
        )
        if self.embedded_engine and self._client.delegate.options.retry_writes:
            self._client.close()
            self._client = self._connect(retry_writes=False)
        database = self._client.get_default_database(self._settings.database)
        await self._declare_documents(database)
        self._prepared = True
        log.info("database_ready", engine=self.engine, database=database.name)

    async def _declare_documents(self, database: Any) -> None:
        """Bind the documents to the database, and make their indexes where they are missing."""
        documents = [ApiKey, AuditEntry, Conversation, Erasure, Message, Secret]
        try:
            with pymongo.timeout(_INDEXES_TIMEOUT_S):
                await init_beanie(database, document_models=documents, skip_indexes=not self._make_indexes)
                if self._settings.shortest_retention_days and self._make_indexes:
                    await Conversation.get_motor_collection().create_indexes([BY_ACTIVITY])
                if self._settings.audit_days and self._make_indexes:
                    await self._keep_audit(self._settings.audit_days)
        except OperationFailure as error:
            if error.code in _AWAY:
                raise
            raise UnsuitableDatabase(
                f"An index cannot be made there (code {error.code}): it stands in another form, or what is "
                "stored contradicts it. `chat-history verify` says more."
            ) from error

    async def _keep_audit(self, days: int) -> None:
        """Have the database remove entries of the audit trail that are older than this."""
        collection, seconds = AuditEntry.get_motor_collection(), days * 86_400
        name = "at_1"
        existing = await collection.index_information()
        if name in existing and existing[name].get("expireAfterSeconds") != seconds:
            await collection.drop_index(name)  # another number of days
        await collection.create_index([("at", 1)], name=name, expireAfterSeconds=seconds)

    def _connect(self, *, retry_writes: bool | None) -> AsyncIOMotorClient[dict[str, Any]]:
        settings = self._settings
        options: dict[str, Any] = {} if retry_writes is None else {"retryWrites": retry_writes}
        if settings.mongodb_tls_ca is not None:
            options |= {"tls": True, "tlsCAFile": str(settings.mongodb_tls_ca)}
        if settings.mongodb_tls_cert is not None:
            options |= {"tls": True, "tlsCertificateKeyFile": str(settings.mongodb_tls_cert)}
        return AsyncIOMotorClient(
            settings.url,
            appname="chat-history",
            document_class=NeverDBRef,
            tz_aware=True,
            w="majority",
            journal=True,
            readConcernLevel="majority",
            readPreference="primary",
            connectTimeoutMS=settings.server_selection_timeout_ms,
            event_listeners=[_Timed()] if metrics.is_enabled() else [],
            **options,
        )

    def _timeout_s(self) -> float:
        """Return how long a call may take: all its time where a primary is known, else less.

        The driver, told a time for the whole call, would wait all of it for a server to appear.
        """
        assert self._client is not None
        known = self._client.delegate.topology_description.has_writable_server()
        times = [self._settings.database_timeout_ms]
        if not known:
            times.append(self._settings.server_selection_timeout_ms)
        return min(times) / 1000

    # -- calls -------------------------------------------------------------------------------------

    async def is_ready(self) -> bool:
        """Tell whether the database answers now, within a second."""
        if not self._prepared or self._client is None:
            return False
        try:
            with pymongo.timeout(_READY_TIMEOUT_S):
                await self._client.admin.command("ping")
        except PyMongoError:
            return False
        return True

    @contextlib.asynccontextmanager
    async def call(self, *, seconds: float | None = None) -> AsyncIterator[None]:
        """Bound all database work inside by one deadline, and turn driver errors into our own.

        `seconds` is for work that a client does not wait for; without it the setting counts. Raises
        DatabaseUnavailable, StorageFull or UnsuitableDatabase.
        """
        if not self._prepared:
            raise type(self._why_not)(self._why_not.detail)
        seconds = seconds or self._timeout_s()
        try:
            # The driver keeps the deadline by itself, but for what it does to connect; the loop's own
            # keeps it then, and leaves the driver's thread to end by itself.
            async with asyncio.timeout(seconds + _GRACE_S):
                with pymongo.timeout(seconds):
                    yield
        except TimeoutError as error:
            raise DatabaseUnavailable(_NO_ANSWER) from error
        except PyMongoError as error:
            raise domain_error(error) from error

    async def transaction(
        self, work: Callable[[Transaction], Awaitable[T]], transaction: Transaction | None = None
    ) -> T:
        """Run `work` in a transaction, again where it collided or lost its connection, and commit.

        Its writes become visible together, at the commit, or never. If we die before the commit,
        nothing happened; if we die just after it, all of it did and only the answer is lost, which is
        why callers retry with a key. A caller that passes `transaction` can read from it, after an
        exception too, whether an attempt may have committed.
        """
        transaction = transaction or Transaction()
        try:
            return await self._run_once(transaction, work)
        except PyMongoError as error:
            if not _worth_another_run(error):
                raise
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_worth_another_run),
            wait=wait_random_exponential(multiplier=0.005, max=0.25),
            stop=stop_after_delay(self._settings.database_timeout_ms / 1000),
            reraise=True,
        ):
            metrics.count("transaction_retries")
            with attempt:
                return await self._run_once(transaction, work)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _run_once(self, transaction: Transaction, work: Callable[[Transaction], Awaitable[T]]) -> T:
        assert self._client is not None
        # Neither this nor the end of a session that has committed speaks to the server, so neither needs
        # one of the threads that Motor would take for it.
        session = AsyncIOMotorClientSession(self._client.delegate.start_session(), self._client)
        session.start_transaction(ReadConcern("snapshot"), _DURABLE)
        transaction.session = session
        try:
            result = await work(transaction)
            try:
                await self._in_one_thread(session.delegate.commit_transaction)
            except PyMongoError:
                # The driver has asked twice already. A refusal may be the answer of a server that
                # restarted and forgot a transaction that it had committed, so it proves nothing either.
                transaction.may_have_committed = True
                raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                # A thread of the driver still works with this session, so it is not ours to end.
                self._lose(session)
                raise
            abandoned = self._background(self._abandon(session, lost=isinstance(error, ConnectionFailure)))
            if not _is_outage(error):
                await asyncio.shield(abandoned)
            raise
        session.delegate.end_session()
        return result

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something outside of the call that asked for it, and of its deadline."""
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _abandon(self, session: Session, *, lost: bool) -> None:
        """Abort, so that the conversation is not locked until the server finds the transaction too old.

        A statement that was lost on its way may still arrive after the abort, when the network heals, and
        would lock the conversation for a minute; so a lost session is killed, and killed again.
        """
        if lost:
            self._lose(session)
        with contextlib.suppress(PyMongoError):
            await session.end_session()

    def _lose(self, session: Session) -> None:
        session_id: Any = session.session_id  # a property, whatever Motor's type says
        self._lost_sessions[bytes(session_id["id"])] = (session_id, _KILLS)
        if self._killing is None or self._killing.done():
            self._killing = self._background(self._kill_lost_sessions())

    async def _kill_lost_sessions(self) -> None:
        """Kill the lost sessions once a second, while the database answers, a few times each."""
        while self._lost_sessions and self._client is not None:
            doomed = dict(list(self._lost_sessions.items())[:_KILLS_AT_ONCE])
            try:
                with pymongo.timeout(_READY_TIMEOUT_S):
                    await self._client.admin.command("killSessions", [each for each, _ in doomed.values()])
            except PyMongoError:
                await asyncio.sleep(_RECONNECT_S / 10)
                continue
            for key, (session_id, left) in doomed.items():
                self._lost_sessions.pop(key, None)
                if left > 1:  # behind those that are still to be killed for the first time
                    self._lost_sessions[key] = (session_id, left - 1)
            await asyncio.sleep(_RECONNECT_S)

    async def _in_one_thread(self, calls: Callable[[], T]) -> T:
        """Run one call of the driver, or several in a row, in one thread, with the deadline that holds here.

        Motor takes a thread for each, and several turns of the loop, which is most of what it costs.
        """
        context = contextvars.copy_context()  # which holds the deadline
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, calls)

    def require_room(self) -> None:
        """Raise StorageFull while the embedded engine's disk is all but full.

        Before the engine finds out: one whose log cannot be written any more has been seen to lose the last
        commit that it had acknowledged (docs/decisions/0003-embedded-engine.md).
        """
        settings = self._settings
        if settings.mongodb_url is None:
            free = shutil.disk_usage(settings.data_dir).free
            if free < settings.disk_reserve_bytes:
                raise StorageFull(f"{free} bytes are free, and {settings.disk_reserve_bytes} are kept.")

    async def secret(self) -> bytes:
        """Return the 32 random bytes that this deployment makes ids with, which no caller knows.

        They are in the database, so that every process has the same, and a backup has them, too.
        """
        if self._secret is None:
            try:
                self._secret = await self.transaction(_find_or_make_secret)
            except DuplicateKeyError:
                # Another process has just made it. This transaction began later, so it finds it.
                self._secret = await self.transaction(_find_or_make_secret)
        return self._secret

    # -- messages as bytes -------------------------------------------------------------------------

    async def read(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        *,
        sort: Sequence[tuple[str, int]] = (),
        limit: int = 0,
        session: Session | None = None,
    ) -> list[bytes]:
        """Find documents as the BSON that the server sent, undecoded."""
        found, own_session = _collection(document), _own(session)

        def find() -> list[bytes]:
            return _documents(
                found.find_raw_batches(query, session=own_session, limit=limit, sort=list(sort) or None)
            )

        return await self._in_one_thread(find)

    async def update(
        self,
        document: type[Document],
        query: Mapping[str, Any],
        changes: Mapping[str, Any],
        session: Session | None,
    ) -> bytes | None:
        """Update one document and return it as it then stands, undecoded, or None if there is none.

        Two commands, since the one that does both scans the whole collection on the embedded engine.
        """
        found, own_session = _collection(document), _own(session)

        def update_and_find() -> bytes | None:
            if not found.update_one(query, changes, session=own_session).matched_count:
                return None
            named = {"_id": query["_id"]}
            return _documents(found.find_raw_batches(named, session=own_session, limit=1))[0]

        return await self._in_one_thread(update_and_find)

    async def insert(
        self, document: type[Document], documents: Sequence[bytes], session: Session | None
    ) -> None:
        """Insert documents that are BSON already. Raises DuplicateKeyError where an `_id` is taken."""
        many = [RawBSONDocument(raw) for raw in documents]
        insert = functools.partial(_collection(document).insert_many, many, session=_own(session))
        try:
            await self._in_one_thread(insert)
        except BulkWriteError as error:
            if any(each.get("code") == 11000 for each in error.details.get("writeErrors", [])):
                raise DuplicateKeyError(str(error), 11000, error.details) from error
            raise


async def _find_or_make_secret(transaction: Transaction) -> bytes:
    """Return the secret, which is made if it is not there; either is certain once the transaction commits."""
    found = await Secret.find_one({"_id": _FOR_IDS}, session=transaction.session)
    if found is None:
        found = Secret(id=_FOR_IDS, value=secrets.token_bytes(32))
        await found.insert(session=transaction.session)
    return found.value


class _Timed(monitoring.CommandListener):
    """Takes the time of each command; what a command says is none of its business."""

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        """Nothing to note yet."""

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Note its time."""
        metrics.command(event.command_name, event.duration_micros / 1e6, failed=False)

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Note its time, and that it failed."""
        metrics.command(event.command_name, event.duration_micros / 1e6, failed=True)


def _collection(document: type[Document]) -> Collection[dict[str, Any]]:
    """Return the driver's own collection, for calls that are in one of its threads already."""
    collection: Collection[dict[str, Any]] = document.get_motor_collection().delegate
    return collection  # `get_pymongo_collection` in Beanie 2


def _documents(cursor: Any) -> list[bytes]:
    """Take apart what a raw cursor (which has no type of its own) returns: BSON, one after the other."""
    return [document for batch in cursor for document in split(batch)]


def _own(session: Session | None) -> ClientSession | None:
    return None if session is None else session.delegate


def _worth_another_run(error: BaseException) -> bool:
    """Tell whether a transaction may succeed when it is run again, the database being there."""
    if isinstance(error, ServerSelectionTimeoutError) or not isinstance(error, PyMongoError):
        return False
    return (
        isinstance(error, ConnectionFailure)
        or error.has_error_label("TransientTransactionError")
        or error.has_error_label("UnknownTransactionCommitResult")
    )


def domain_error(error: PyMongoError) -> ChatHistoryError:
    """Name a driver's error as the domain does; what it says of content is left behind."""
    code = error.code if isinstance(error, OperationFailure) else None
    if code in _OUT_OF_SPACE or "no space left" in str(error).lower():
        return StorageFull("Nothing was stored.")
    if code in _TOO_LARGE:
        return BatchTooLarge("Append it in smaller parts; nothing was stored.")
    if _is_outage(error) or code in _AWAY:
        return DatabaseUnavailable(_NO_ANSWER)
    return ChatHistoryError(f"The database failed with code {code}.")


def _is_outage(error: BaseException) -> bool:
    """Tell whether the database did not answer, or not in time."""
    return isinstance(error, PyMongoError) and (
        error.timeout or isinstance(error, ConnectionFailure | WTimeoutError)
    )
