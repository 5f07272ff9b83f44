"""The connection to MongoDB: the only module that names Motor (docs/decisions/0001-driver.md).

Motor runs PyMongo in threads. Where a call needs no thread, or several calls can share one, this module goes
from Motor's object to PyMongo's, so the rest of the package uses PyMongo's public API.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, overload

import pymongo
from beanie import Document, init_beanie
from bson.timestamp import Timestamp
from pymongo import monitoring
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import ConfigurationError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from service.database.driver_errors import unusable_url
from service.database.threads import DriverThreads
from service.documents import (
    ApiKey,
    AuditEntry,
    Backfill,
    Checkpoint,
    Conversation,
    Erasure,
    ErasureReceipt,
    Message,
    Secret,
)
from service.errors import UnsuitableDatabase
from service.formats.bson_codec import NeverDBRef
from service.settings import Settings
from service.telemetry import metrics

# Motor reads this when it is imported. Its default is five threads a core, so on a small machine a few slow
# calls would stop all others.
os.environ.setdefault("MOTOR_MAX_WORKERS", "32")

from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorClientSession

Session = AsyncIOMotorClientSession

# A majority has the commit in its journal before the commit is acknowledged, so no fail-over and no crash
# takes an acknowledged write back.
_DURABLE = WriteConcern("majority", j=True)
_CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Commit:
    """A commit: the server's time of it, and the cluster time, by which another server knows that time.

    The server signs the cluster time, so a client can hand it on and cannot change it. It is empty where the
    server said none.
    """

    time: Timestamp
    cluster_time: Mapping[str, Any]


# A commit that the reads of the running call must see, though another process was told of it.
READ_AFTER: ContextVar[Commit | None] = ContextVar("read_after", default=None)


class Connection(DriverThreads):
    """The client of one database, and the threads in which calls of the driver run."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._client: AsyncIOMotorClient[dict[str, Any]] | None = None
        # The latest commit that this process was told of.
        self.committed: Commit | None = None

    @property
    def is_connected(self) -> bool:
        """Tell whether there is a client; whether a server answers is another question."""
        return self._client is not None

    @property
    def knows_primary(self) -> bool:
        """Tell whether the driver knows a server that takes writes."""
        return bool(self._connected().delegate.topology_description.has_writable_server())

    @property
    def is_direct(self) -> bool:
        """Tell whether the driver speaks to one server only, and does not look for the others of its set."""
        return bool(self._connected().delegate.topology_description.topology_type_name == "Single")

    @property
    def retries_writes(self) -> bool:
        """Tell whether the driver itself repeats a write that lost its connection."""
        return bool(self._connected().delegate.options.retry_writes)

    def connect(self, *, retry_writes: bool | None = None) -> None:
        """Make the client, in place of an earlier one. Raises UnsuitableDatabase where a setting is wrong.

        A client connects in the background. Without `retry_writes` the URL or the driver decides.
        """
        if self._client is not None:
            self._client.close()
        settings = self._settings
        options: dict[str, Any] = {} if retry_writes is None else {"retryWrites": retry_writes}
        if settings.mongodb_tls_ca is not None:
            options |= {"tls": True, "tlsCAFile": str(settings.mongodb_tls_ca)}
        if settings.mongodb_tls_cert is not None:
            options |= {"tls": True, "tlsCertificateKeyFile": str(settings.mongodb_tls_cert)}
        try:
            url = settings.url
        except OSError as error:  # only the record of an embedded engine is read
            raise UnsuitableDatabase(
                f"CHAT_MONGODB_URL is not set, and no embedded engine runs on {settings.data_dir}. Start its "
                "service (chat-history serve), or name its data directory with CHAT_DATA_DIR, or set "
                "CHAT_MONGODB_URL."
            ) from error
        try:
            self._client = _client_of(
                url,
                appname="chat-history",
                document_class=NeverDBRef,
                tz_aware=True,
                w="majority",
                journal=True,
                # Reads see only what a majority has, so a fail-over cannot take back what was read.
                readConcernLevel="majority",
                readPreference="primary",
                connectTimeoutMS=settings.server_selection_timeout_ms,
                event_listeners=[CommandTimer()] if metrics.is_enabled() else [],
                **options,
            )
        except (ConfigurationError, OSError, TypeError, UserWarning, ValueError) as error:
            raise unusable_url(error) from error

    def database(self, name: str | None = None) -> Any:
        """Return Motor's database of this name, or the one to which Beanie binds the documents."""
        client = self._connected()
        return client[name] if name else client.get_default_database(self._settings.database)

    async def command(self, name: str, value: Any = 1) -> dict[str, Any]:
        """Run a command on the database `admin`."""
        answer: dict[str, Any] = await self._connected().admin.command(name, value)
        return answer

    def start_transaction(self) -> Session:
        """Start a session with a transaction. Neither speaks to the server, so neither needs a thread."""
        client = self._connected()
        session = AsyncIOMotorClientSession(client.delegate.start_session(), client)
        session.start_transaction(ReadConcern("snapshot"), _DURABLE)
        return session

    def snapshot_session(self) -> ClientSession:
        """Start a session whose reads all see one point in time, which the server chooses at the first.

        It is not before a cluster time that the server was told of, and the driver tells each server its own.
        """
        session: ClientSession = self._connected().delegate.start_session(snapshot=True)
        told = READ_AFTER.get()
        if told is not None:
            session.advance_cluster_time(told.cluster_time)
        return session

    def note_commit(self, session: ClientSession) -> None:
        """Remember a commit that was acknowledged, so later reads are not older than it."""
        time = session.operation_time
        if time is not None and (self.committed is None or time > self.committed.time):
            self.committed = Commit(time, session.cluster_time or {})

    def session_after_commits(self) -> contextlib.AbstractContextManager[ClientSession | None]:
        """Start a session whose reads see each commit that was noted, and what `READ_AFTER` names.

        Returns None where there was no commit.
        It sends no command of its own: the driver lends it an id from its pool, as it does to a read without
        a session, and the time is a field of the read.
        """
        committed, told = self.committed, READ_AFTER.get()
        if committed is None and told is None:
            return contextlib.nullcontext()
        session: ClientSession = self._connected().delegate.start_session(causal_consistency=True)
        for each in (committed, told):
            if each is not None:
                session.advance_operation_time(each.time)
        if told is not None:
            session.advance_cluster_time(told.cluster_time)
        return session

    async def close(self) -> None:
        """Close the connections, within about a second also where nothing answers."""
        if self._client is not None:
            client, self._client = self._client, None
            # The driver tells the server which sessions end. Where no server is known, the driver would look
            # for one for 30 s, so it gets a tenth of the time.
            known = client.delegate.topology_description.has_readable_server()
            with pymongo.timeout(_CLOSE_TIMEOUT_S if known else _CLOSE_TIMEOUT_S / 10):
                await asyncio.to_thread(client.close)
        self.close_threads()

    def _connected(self) -> AsyncIOMotorClient[dict[str, Any]]:
        assert self._client is not None
        return self._client


def _client_of(url: str, **options: Any) -> AsyncIOMotorClient[dict[str, Any]]:
    """Make a client. Raises UserWarning for an option that is misspelt or has no valid value.

    The driver only warns of such an option and ignores it, so a misspelt `tls` would send everything in the
    clear, and its warning may quote a part of a password that is not escaped.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return AsyncIOMotorClient(url, **options)


@overload
def pymongo_session(session: None) -> None: ...
@overload
def pymongo_session(session: Session) -> ClientSession: ...
def pymongo_session(session: Session | None) -> ClientSession | None:
    """Return PyMongo's session, for calls that run in one of its threads already."""
    return None if session is None else session.delegate


def has_sent(session: ClientSession) -> bool:
    """Tell whether a transaction has sent a statement; before that, the server does not know of it.

    This is also how the driver itself decides whether the end of a session sends an abort.
    """
    return not session._transaction.starting()  # which the driver says nowhere else


def motor_collection(document: type[Document]) -> Any:
    """Return Motor's collection of a document, for calls from the event loop."""
    return document.get_motor_collection()  # `get_pymongo_collection` in Beanie 2


def pymongo_collection(document: type[Document]) -> Collection[dict[str, Any]]:
    """Return PyMongo's collection of a document, for calls that run in one of its threads already."""
    collection: Collection[dict[str, Any]] = motor_collection(document).delegate
    return collection


class CommandTimer(monitoring.CommandListener):
    """Records how long each command took. It must not read the command, which contains message content."""

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        """Record nothing: the event of the answer has the duration."""

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Record the duration."""
        metrics.command(event.command_name, event.duration_micros / 1e6, failed=False)

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Record the duration, and that the command failed."""
        metrics.command(event.command_name, event.duration_micros / 1e6, failed=True)


_DOCUMENTS = (
    *(ApiKey, AuditEntry, Backfill, Checkpoint, Conversation, Erasure, ErasureReceipt, Message, Secret),
)


async def declare_documents(database: Any) -> None:
    """Bind the documents to the database, without making their indexes."""
    await init_beanie(database, document_models=[*_DOCUMENTS], skip_indexes=True)
