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
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pymongo
import structlog
from beanie import Document, init_beanie
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument
from pydantic import ValidationError
from pymongo import monitoring
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
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
    MalformedDocument,
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
# How often a lost session is killed once the database answers again, how many in one command, and how long
# the pauses are while it does not answer.
_KILLS = 5
_KILLS_AT_ONCE = 1_000
_KILL_PAUSE_S, _KILL_PAUSE_MOST_S = 0.1, 5.0
# The server ends a transaction that is older than 60 s, and looks for such every 30 s. So much later a lost
# session needs no killing, and no more of them than this are kept.
_SERVER_ENDS_S = 90.0
_LOST_MOST = 10_000
# How long no session is killed after the server has refused to kill one.
_REFUSED_S = 600.0
_ABORT_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 1.0
# Indexes are made at start, and on an existing database of another shape that may take a while.
_INDEXES_TIMEOUT_S = 600.0
# Codes of the server, which names them in its `error_codes.yml`.
_OUT_OF_SPACE = {14031}
# A document that an update would make larger than 16 MiB: 10334 BSONObjectTooLarge, and 17419 of an update.
DOCUMENT_TOO_LARGE = {10334, 17419}
_TOO_LARGE = {257, 388}
_UNAUTHORIZED = 13
_WRONG_CREDENTIALS = {18, 334}  # AuthenticationFailed, MechanismUnavailable
_ATLAS = 8000  # everything that Atlas refuses, told apart only by the text
# An index stands in another form, or what is stored contradicts it.
_CONTRADICTED = {67, 85, 86, 197, 11000}
# The database, or a part of it, cannot serve now, and will: the same call later may succeed.
_AWAY = frozenset(
    {
        # It is not the primary, no longer or not yet, or it is shutting down.
        *(91, 94, 109, 123, 133, 149, 189, 216, 308, 333, 372, 10058, 10107, 11600, 11602, 13435, 13436),
        # A node does not reach another one, or not in time.
        *(6, 7, 71, 74, 83, 89, 107, 145, 172, 173, 174, 190, 199, 202, 230, 303, 317, 384, 407, 9001, 56846),
        # It was interrupted, took too long, or its cursor or plan was ended.
        *(24, 43, 46, 50, 90, 143, 175, 194, 237, 262, 279, 281, 282, 290, 310, 312, 314, 355, 442, 453),
        *(11601, 46841, 91331, 10045600),
        # A majority was not there.
        *(64, 75, 79, 100, 134),
        # The transaction or its session is gone, or collided with something.
        *(112, 117, 206, 217, 225, 228, 251, 267, 356, 358, 363, 413, 50915),
        # Its view of the cluster, or of time, was out of date: chunks, databases or shards are being moved.
        *(63, 70, 135, 150, 203, 209, 210, 211, 215, 227, 234, 239, 246, 249, 250, 272, 319, 338, 342, 343),
        *(406, 412, 414, 9996, 13388),
        # An index is being built.
        *(276, 285, 12586, 12587),
        # It has too much to do, or lets nobody write for now.
        *(208, 261, 264, 365, 371, 402, 433, 449, 450, 462),
        # Who we are must be proved again, which the driver does by itself.
        391,
        # InternalError and UnknownError: it does not say.
        *(1, 8),
    }
)
_PASSING_LABELS = (
    "TransientTransactionError",
    "UnknownTransactionCommitResult",
    "RetryableWriteError",
    "RetryableError",
    "SystemOverloadedError",
)

_MAY_BE_STORED = (
    "A write may have been stored nevertheless: repeat it with the same Idempotency-Key or message ids, and "
    "it is stored once."
)
_NO_ANSWER = f"The database did not answer in time, or could not serve this call. {_MAY_BE_STORED}"
_NO_PRIVILEGE = (
    "The database user lacks a privilege (code 13). Grant it the role `readWrite` on the database of the "
    "service; if CHAT_MONGODB_URL names no user, name one."
)
_NO_LOGIN = (
    "The database refuses the user name or the password of CHAT_MONGODB_URL (code {code}). Correct them, and "
    "let `authSource` name the database in which the user is defined."
)
_NO_URL = "CHAT_MONGODB_URL, or a setting that goes with it, cannot be used: {why}."
STANDALONE = (
    "This MongoDB is a standalone server, which has no transactions. Start it as a replica set of one: "
    "`mongod --replSet rs0`, and once `mongosh --eval 'rs.initiate()'`."
)


@dataclass
class Transaction:
    """What the work of a transaction is given: its session, and what an earlier run may have done.

    Work that changes nothing in a run says so by `wrote`: if the commit of that run ends without an answer,
    there is nothing that may have taken effect.
    """

    session: Session | None = None
    may_have_committed: bool = False
    wrote: bool = True


@dataclass(slots=True)
class _LostSession:
    """A session whose transaction may still be open on the server, where nobody would end it.

    `in_use` is the session itself, where a thread of the driver was still at work with it.
    """

    id: Mapping[str, Any]
    in_use: ClientSession | None
    since: float
    kills_left: int = _KILLS

    @property
    def has_sent(self) -> bool:
        return self.in_use is None or _has_sent(self.in_use)


@dataclass
class Budget:
    """How many bytes an answer may still have. The first document is let in whatever its size."""

    left: int
    untouched: bool = True
    spent: bool = False

    def admits(self, document: bytes) -> bool:
        """Take a document's size off, and tell whether it fits; `spent` says that one did not."""
        self.left -= len(document)
        self.spent = self.left < 0 and not self.untouched
        self.untouched = False
        return not self.spent


class Database:
    """The connection, the indexes, transactions, and the raw reading and writing of messages.

    It opens without a database: `open` tries once, and goes on trying until it has prepared one.
    `reads_whole_match` is true on an engine that reads all that a filter matches before it cuts; `sharded` is
    true on a cluster, where an `_id` is unique on each shard only.
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
        self._lost_sessions: dict[bytes, _LostSession] = {}
        self._no_kills_until = 0.0
        self._killing: asyncio.Task[None] | None = None
        self._secret: bytes | None = None
        self.embedded_engine = False
        self.sharded = False
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
        """Stop trying, and close the connections, within about two seconds also where nothing answers."""
        self._prepared = False
        ours = [task for task in (self._preparing, self._killing) if task is not None]
        for task in ours:
            task.cancel()
        if ours:
            await asyncio.wait(ours)
        self._lost_sessions.clear()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
        if self._client is not None:
            client, self._client = self._client, None
            # The driver tells the server which sessions end, and would look for one that is away for 30 s.
            known = client.delegate.topology_description.has_readable_server()
            with pymongo.timeout(_CLOSE_TIMEOUT_S if known else _CLOSE_TIMEOUT_S / 10):
                await asyncio.to_thread(client.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _prepare_until_done(self) -> None:
        while not self._prepared:
            try:
                await self._prepare()
            except Exception as error:  # noqa: BLE001  (whatever it is, the next attempt may go better)
                self._why_not = _why_not_opened(error)
                code = error.code if isinstance(error, OperationFailure) else None
                facts = {"error": type(error).__name__, "code": code, "reason": _reason(error)}
                if isinstance(self._why_not, UnsuitableDatabase):
                    log.error("database_unsuitable", detail=self._why_not.detail, **facts)
                else:
                    log.warning("database_unreachable", **facts)
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
        self.sharded = hello.get("msg") == "isdbgrid"
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
            if error.code not in _CONTRADICTED:
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
        try:
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
        except (ConfigurationError, OSError, TypeError, ValueError) as error:
            # The rest of what the driver says may quote the URL, and with it the password.
            why = re.split('"|: ', str(error))[0].strip(" .")
            raise UnsuitableDatabase(_NO_URL.format(why=why)) from error

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
        DatabaseUnavailable, StorageFull, UnsuitableDatabase or MalformedDocument.
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
        except (ValidationError, InvalidBSON) as error:
            raise MalformedDocument("A document that this call reads is stored in another form.") from error

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
        transaction.wrote = True
        try:
            result = await work(transaction)
            try:
                await self._in_one_thread(session.delegate.commit_transaction)
            except PyMongoError:
                # The driver has asked twice already. A refusal may be the answer of a server that
                # restarted and forgot a transaction that it had committed, so it proves nothing either.
                transaction.may_have_committed |= transaction.wrote
                raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                # A thread of the driver still works with this session, so it is not ours to end.
                self._lose(session, in_use=True)
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
        if not _has_sent(session.delegate):
            session.delegate.end_session()  # which sends nothing
            return
        if lost:
            self._lose(session)
        # With a deadline, since otherwise aborts would pile up for as long as the database is away.
        with contextlib.suppress(PyMongoError), pymongo.timeout(_ABORT_TIMEOUT_S):
            await session.end_session()

    def _lose(self, session: Session, *, in_use: bool = False) -> None:
        """Have the session killed; what is there already is forgotten, oldest first, where it is too much."""
        now, own = time.monotonic(), session.delegate
        if now < self._no_kills_until:
            return
        if len(self._lost_sessions) >= _LOST_MOST:
            self._lost_sessions.pop(next(iter(self._lost_sessions)))
        self._lost_sessions[bytes(own.session_id["id"])] = _LostSession(
            own.session_id, own if in_use else None, now
        )
        if self._killing is None or self._killing.done():
            self._killing = self._background(self._kill_lost_sessions())

    async def _kill_lost_sessions(self) -> None:
        """Kill the lost sessions once a second, while the database answers, a few times each."""
        pause = _KILL_PAUSE_S
        while self._lost_sessions and self._client is not None:
            doomed = self._doomed()
            try:
                if doomed:
                    with pymongo.timeout(_READY_TIMEOUT_S):
                        ids = [self._lost_sessions[key].id for key in doomed]
                        await self._client.admin.command("killSessions", ids)
            except PyMongoError as error:
                if isinstance(error, OperationFailure) and not _is_away(error):
                    self._give_up_killing(error)
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _KILL_PAUSE_MOST_S)
                continue
            pause = _KILL_PAUSE_S
            for key in doomed:
                lost = self._lost_sessions.get(key)
                if lost is not None:
                    lost.kills_left -= 1
                    if not lost.kills_left:
                        del self._lost_sessions[key]
            await asyncio.sleep(_RECONNECT_S)

    def _doomed(self) -> list[bytes]:
        """Choose the sessions to kill next, those first that were killed least; forget what needs no kill."""
        now = time.monotonic()
        # By then the thread that was at work with a session has given up, and will send nothing any more.
        settled_s = 2 * self._settings.database_timeout_ms / 1000
        for key, lost in list(self._lost_sessions.items()):
            if now - lost.since > (_SERVER_ENDS_S if lost.has_sent else min(settled_s, _SERVER_ENDS_S)):
                del self._lost_sessions[key]
        sent = [key for key, lost in self._lost_sessions.items() if lost.has_sent]
        return sorted(sent, key=lambda key: -self._lost_sessions[key].kills_left)[:_KILLS_AT_ONCE]

    def _give_up_killing(self, error: OperationFailure) -> None:
        """Take a refusal for the answer: this user, or this MongoDB, kills no sessions."""
        self._lost_sessions.clear()
        self._no_kills_until = time.monotonic() + _REFUSED_S
        log.warning("sessions_not_killed", code=error.code, reason=_reason(error), again_in_s=_REFUSED_S)

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
        fields: Sequence[str] | None = None,
        budget: Budget | None = None,
    ) -> list[bytes]:
        """Find documents as the BSON that the server sent, undecoded: whole, or only some of their fields.

        With a budget it ends before the first document that does not fit. A server sends at most 16 MiB at
        once, and is not asked for more behind that document, so memory stays that of the budget and of one
        such batch, while documents that are small still come with one command.
        """
        found, own_session = _collection(document), _own(session)

        def find() -> list[bytes]:
            with found.find_raw_batches(
                query, fields, session=own_session, limit=limit, batch_size=limit, sort=list(sort) or None
            ) as cursor:
                return _documents(cursor, budget)

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


def _documents(cursor: Any, budget: Budget | None = None) -> list[bytes]:
    """Take apart what a raw cursor (which has no type of its own) returns, as far as the budget goes."""
    found: list[bytes] = []
    for batch in cursor:
        for document in split(batch):
            if budget is not None and not budget.admits(document):
                return found
            found.append(document)
    return found


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
    codes, text = _codes(error), str(error).lower()
    if isinstance(error, WriteConcernError):
        return DatabaseUnavailable(_NO_ANSWER)  # it is stored on the primary at least, whatever the code
    if codes & _OUT_OF_SPACE or "no space left" in text or (_ATLAS in codes and "quota" in text):
        return StorageFull("Nothing was stored.")
    if codes & _TOO_LARGE:
        return BatchTooLarge("Append it in smaller parts; nothing was stored.")
    if (refusal := _refusal(codes, text)) is not None:
        return refusal
    if _is_away(error) or _ATLAS in codes:
        return DatabaseUnavailable(_NO_ANSWER)
    code = error.code if isinstance(error, OperationFailure) else None
    return ChatHistoryError(f"The database failed with code {code}. {_MAY_BE_STORED}")


def _refusal(codes: set[int], text: str) -> ChatHistoryError | None:
    """Name the error of a database that knows us not, or lets us not do this; text is in lower case."""
    atlas = _ATLAS in codes
    if codes & _WRONG_CREDENTIALS or (atlas and ("bad auth" in text or "authentication failed" in text)):
        return UnsuitableDatabase(_NO_LOGIN.format(code=min(codes & {*_WRONG_CREDENTIALS, _ATLAS})))
    if _UNAUTHORIZED in codes or (atlas and ("not allowed" in text or "not authorized" in text)):
        return ChatHistoryError(_NO_PRIVILEGE)
    return None


def _why_not_opened(error: Exception) -> ChatHistoryError:
    """Say why a database could not be opened: UnsuitableDatabase where trying again cannot help."""
    if isinstance(error, UnsuitableDatabase):
        return error
    if isinstance(error, OperationFailure):
        refusal = _refusal(_codes(error), str(error).lower())
        if refusal is not None:
            return UnsuitableDatabase(refusal.detail)
    return DatabaseUnavailable("The database was not reached yet.")


def _reason(error: Exception) -> str:
    """Return what the driver says of an outage or a refusal, without its description of the topology."""
    if isinstance(error, OperationFailure):
        return str((error.details or {}).get("errmsg", ""))[:300]
    return str(error).partition(", Timeout:")[0][:300] if isinstance(error, ConnectionFailure) else ""


def _codes(error: BaseException) -> set[int]:
    """Return the codes of a server's error, those of the single writes of a batch, too."""
    if not isinstance(error, OperationFailure):
        return set()
    details = error.details or {}
    parts = [*details.get("writeErrors", ()), *details.get("writeConcernErrors", ())]
    return {code for code in (error.code, *(each.get("code") for each in parts)) if code is not None}


def _is_away(error: PyMongoError) -> bool:
    """Tell whether the database did not answer, or said that it cannot serve for now."""
    return (
        _is_outage(error)
        or isinstance(error, WriteConcernError)
        or any(map(error.has_error_label, _PASSING_LABELS))
        or bool(_codes(error) & _AWAY)
    )


def _is_outage(error: BaseException) -> bool:
    """Tell whether the database did not answer, or not in time."""
    return isinstance(error, PyMongoError) and (error.timeout or isinstance(error, ConnectionFailure))


def _has_sent(session: ClientSession) -> bool:
    """Tell whether a transaction has sent a statement; before that, the server does not know of it."""
    return not session._transaction.starting()  # noqa: SLF001  (the driver says it nowhere else)
