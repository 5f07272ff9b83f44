"""Compares the indexes that exist with those that the documents declare, and builds what is missing.

- Calls are served as soon as the unique index of `messages` is there, or there is no message. Without any
  other index the answers are the same, only slower (`tests/integration/test_indexes.py`).
- An index of an empty collection is made at once. One of a collection with documents may take hours to build,
  so it is built beside the service, by one process of all, without a time limit, because MongoDB throws a
  build away when its command is interrupted.
- A build that failed is tried again, after a growing pause. What no other attempt can repair ends the start
  of a process with a sentence that says what to do (`_final`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pymongo
import structlog
from beanie import Document
from pymongo import IndexModel
from pymongo.errors import OperationFailure, PyMongoError

from service.database.driver import Connection, motor_collection, pymongo_collection
from service.database.driver_errors import INDEX_CONTRADICTED, is_unavailable, reason, refusal
from service.database.shared import Leases
from service.documents import (
    BY_DUE_TIME,
    BY_DUE_TIME_EMBEDDED,
    EARLIER_LIST_INDEX,
    AuditEntry,
    Checkpoint,
    Conversation,
    ErasureReceipt,
    Message,
)
from service.errors import DatabaseUnavailable, UnsuitableDatabase
from service.settings import Settings
from service.telemetry import metrics

log = structlog.get_logger(__name__)

# What to do about missing indexes. "build": build them, beside the service where that takes long. "require":
# make what takes no time, and require the one without which no call may be served. "ignore": open the
# database as it is, for the commands that examine it or repair it.
IndexPolicy = Literal["build", "require", "ignore"]

_LEASE, _LEASE_S = "indexes", 60.0
# How long a start waits for the first attempt at a build. A refusal comes within this time; a build that
# takes longer goes on beside the service.
_FIRST_ATTEMPT_S = 1.0
# The pauses between the attempts: the first, and the longest, to which they double.
_PAUSE_S, _PAUSE_MAX_S = 1.0, 60.0
_LIST = list(Conversation.Settings.indexes[0].document["key"].items())
# The options in which an index must be as it is declared. The expiry is set without building anew.
_OPTIONS = ("unique", "sparse", "partialFilterExpression", "collation")

_NO_PRIVILEGE = (
    "The database user lacks a privilege (code 13): `createIndex`, and these indexes are missing: {names}. "
    "Grant the user the role `readWrite` on the database of the service, or let a user who has it run "
    "`chat-history indexes` once. Where all indexes are there, the service needs no `createIndex`."
)
_CONTRADICTED = (
    "The index {name} cannot be made (code {code}). Either an index of this name or of these fields exists "
    "in another form: drop that index in mongosh (`db.{collection}.dropIndex(…)`). Or stored documents "
    "contradict it: `chat-history verify` names them. Then start the service again."
)
_ESSENTIAL = (
    "The index {name}, which keeps each `seq` unique, is missing. No call is served until a running service "
    "or `chat-history indexes` has built it."
)
_EXPIRY_NOT_CHANGED = (
    "The entries of the audit trail expire after {existing} s as before, and not after {seconds} s, because "
    "the database refuses `collMod` (code {code}). Grant the database user the action `collMod`, or run in "
    "mongosh: "
    '`db.runCommand({{collMod: "{collection}", index: {{name: "{name}", expireAfterSeconds: {seconds}}}}})`.'
)


@dataclass(frozen=True, eq=False)
class Index:
    """One index that the documents declare."""

    document: type[Document]
    model: IndexModel

    @property
    def name(self) -> str:
        """Return the names of the collection and of the index, as people say them: `messages.at_1`."""
        return f"{self.collection}.{self.model.document['name']}"

    @property
    def collection(self) -> str:
        """Return the name of the collection."""
        return str(motor_collection(self.document).name)

    @property
    def is_essential(self) -> bool:
        """Tell whether no call may be served without the index while there are messages."""
        return self.document is Message and bool(self.model.document.get("unique"))

    def is_like(self, other: Mapping[str, Any]) -> bool:
        """Tell whether an existing index has the same fields in the same order, and the same options."""
        mine = self.model.document
        return list(mine["key"].items()) == list(other["key"]) and all(
            # An index that was made by hand may say `sparse: false`, which is the default.
            (mine.get(option) or None) == (other.get(option) or None)
            for option in _OPTIONS
        )


def declared(settings: Settings, *, embedded_engine: bool) -> list[Index]:
    """Return the indexes that this engine and these settings need, the essential one first."""
    documents = (Message, Conversation, Checkpoint, ErasureReceipt)
    found = [Index(document, model) for document in documents for model in document.Settings.indexes]
    found.append(Index(Conversation, BY_DUE_TIME_EMBEDDED if embedded_engine else BY_DUE_TIME))
    if settings.audit_days:
        found.append(Index(AuditEntry, _audit_expiry(settings.audit_days)))
    return sorted(found, key=lambda index: not index.is_essential)


def _audit_expiry(days: int) -> IndexModel:
    """Return the index by which the database removes entries of the audit trail that are older than this."""
    return IndexModel([("at", 1)], name="at_1", expireAfterSeconds=days * 86_400)


@dataclass(frozen=True)
class _Expiry:
    """After how many seconds an index lets documents expire: as it exists, and as it is declared."""

    name: str
    existing: int | None
    seconds: int


class Indexes:
    """The indexes of one database: what is missing, and building it."""

    def __init__(self, connection: Connection, leases: Leases, settings: Settings) -> None:
        self._connection = connection
        self._leases = leases
        self._settings = settings
        self._declared: list[Index] = []
        self._timeout_s = settings.database_timeout_ms / 1000
        self._missing: list[Index] = []
        self._expiry: _Expiry | None = None
        # Whether the index of an earlier version is there that orders the list by `updated_at`.
        self.has_earlier_list = False
        self._building: asyncio.Task[None] | None = None
        self._attempted = asyncio.Event()
        self._refusal: UnsuitableDatabase | None = None

    @property
    def missing(self) -> list[str]:
        """Return the names of the indexes that were missing when this process looked last."""
        return [index.name for index in self._missing]

    @property
    def has_list(self) -> bool:
        """Tell whether the index of the list was there when this process looked last."""
        return not any(index.is_like({"key": _LIST}) for index in self._missing)

    def declare(self, *, embedded_engine: bool) -> None:
        """Choose the indexes, which the engine must be known for; the first call of all."""
        self._declared = declared(self._settings, embedded_engine=embedded_engine)

    async def prepare(self, *, build: bool) -> None:
        """Make what can be made at once, and with `build` begin to build the rest beside the service.

        Raises UnsuitableDatabase where an index can never be made, and DatabaseUnavailable while the
        essential index is missing.
        """
        with pymongo.timeout(self._timeout_s):
            await self.look()
            await self.set_expiry()
            await self._make_on_empty_collections()
            may_serve = not any(index.is_essential for index in self._missing) or await _is_empty(Message)
        if build and self._missing:
            if self._building is None:
                self._building = asyncio.create_task(self._build_until_none_is_missing())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._attempted.wait(), _FIRST_ATTEMPT_S)
            if self._refusal is not None:
                raise self._refusal
        if not may_serve and any(index.is_essential for index in self._missing):
            raise DatabaseUnavailable(_ESSENTIAL.format(name=self._declared[0].name))

    async def look(self) -> None:
        """Compare what exists with what is declared."""
        missing = []
        for document, indexes in _by_document(self._declared):
            existing = await motor_collection(document).index_information()
            if document is Conversation:
                earlier = list(EARLIER_LIST_INDEX.items())
                self.has_earlier_list = any(list(each["key"]) == earlier for each in existing.values())
            for index in indexes:
                like = next((name for name, each in existing.items() if index.is_like(each)), None)
                if like is None:
                    missing.append(index)
                elif document is AuditEntry:
                    seconds = index.model.document["expireAfterSeconds"]
                    self._expiry = _Expiry(like, existing[like].get("expireAfterSeconds"), seconds)
        self._missing = missing
        metrics.set_missing_indexes(len(missing))

    async def set_expiry(self) -> None:
        """Let the audit trail expire after the days of the settings.

        `collMod` changes the index in place, and changes nothing where another process has done so already.
        Where it is refused, the service does without.
        """
        expiry = self._expiry
        if expiry is None or expiry.existing == expiry.seconds:
            return
        audit = motor_collection(AuditEntry)
        try:
            changes = {"name": expiry.name, "expireAfterSeconds": expiry.seconds}
            await audit.database.command("collMod", audit.name, index=changes)
        except OperationFailure as error:
            if is_unavailable(error):
                raise
            detail = _EXPIRY_NOT_CHANGED.format(**asdict(expiry), code=error.code, collection=audit.name)
            log.warning("audit_days_not_changed", detail=detail, code=error.code)

    async def drop_earlier_list(self) -> None:
        """Drop the index of the list of earlier versions, because each append would go on moving it."""
        if self.has_earlier_list and self.has_list:
            await motor_collection(Conversation).drop_index(list(EARLIER_LIST_INDEX.items()))
            self.has_earlier_list = False

    async def build(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Build what is missing, collection by collection, however long it takes; `say` is told of each.

        Raises UnsuitableDatabase where an index can never be made, and PyMongoError.
        """
        for document, indexes in _by_document(self._missing):
            say(f"building {', '.join(index.name for index in indexes)}")
            log.info("indexes_building", indexes=[index.name for index in indexes])
            models = [index.model for index in indexes]
            try:
                # One command for all indexes of a collection, because the server then reads it once.
                create = functools.partial(pymongo_collection(document).create_indexes, models)
                await self._connection.run_without_limit(create)
            except OperationFailure as error:
                if (final := _final(error, indexes)) is not None:
                    raise final from error
                raise
            say(f"built {', '.join(index.name for index in indexes)}")
        with pymongo.timeout(self._timeout_s):
            await self.look()

    async def build_all(self, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        """Build what is missing, and try again what failed, until nothing is missing; for a command.

        `say` is told of each index, and `warn` of each attempt that failed.
        Raises UnsuitableDatabase where an index can never be made.
        """
        pause = _PAUSE_S
        while self._missing:
            try:
                # The lease keeps the services from building beside this command. They may be building
                # already: the server lets a second command for the same index wait for the first.
                async with self._leases.held(_LEASE, _LEASE_S):
                    await self.build(say)
            except PyMongoError as error:
                code = error.code if isinstance(error, OperationFailure) else None
                warn(f"trying again in {pause:.0f} s: {type(error).__name__} (code {code}), {reason(error)}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX_S)

    async def close(self) -> None:
        """Stop trying. A build that is under way is left to the server."""
        if self._building is not None:
            self._building.cancel()
            await asyncio.wait([self._building])

    async def _make_on_empty_collections(self) -> None:
        """Make the missing indexes of collections without documents, which takes no time and no lease."""
        for document, indexes in _by_document(self._missing):
            if await _is_empty(document):
                try:
                    await motor_collection(document).create_indexes([index.model for index in indexes])
                except OperationFailure as error:
                    if (final := _final(error, indexes)) is not None:
                        raise final from error
                    _log_failure(error)
        if self._missing:
            await self.look()

    async def _build_until_none_is_missing(self) -> None:
        pause = _PAUSE_S
        while True:
            try:
                await self._attempt()
                self._refusal = None
            except UnsuitableDatabase as error:
                # An operator may repair it while the service runs, so it is tried again.
                self._refusal = error
                log.error("indexes_refused", detail=error.detail)
            except PyMongoError as error:
                _log_failure(error)
            self._attempted.set()
            if not self._missing:
                log.info("indexes_complete")
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_MAX_S)

    async def _attempt(self) -> None:
        with pymongo.timeout(self._timeout_s):
            await self.look()
        if self._missing:
            async with self._leases.held(_LEASE, _LEASE_S) as is_mine:
                if is_mine:
                    await self.build()


def _by_document(indexes: list[Index]) -> Iterator[tuple[type[Document], list[Index]]]:
    """Group indexes by their collection; the essential one comes first and alone, since calls wait for it."""
    groups: dict[tuple[type[Document], bool], list[Index]] = {}
    for index in indexes:
        groups.setdefault((index.document, index.is_essential), []).append(index)
    for (document, _), group in groups.items():
        yield document, group


async def _is_empty(document: type[Document]) -> bool:
    return await motor_collection(document).find_one({}, {"_id": 1}) is None


def _final(error: OperationFailure, indexes: list[Index]) -> UnsuitableDatabase | None:
    """Return the error that says what to do, where trying again cannot help."""
    names = ", ".join(index.name for index in indexes)
    if error.code in INDEX_CONTRADICTED:
        detail = _CONTRADICTED.format(name=names, code=error.code, collection=indexes[0].collection)
        return UnsuitableDatabase(detail)
    refused = refusal(error)
    if refused is None:
        return None
    if isinstance(refused, UnsuitableDatabase):
        return refused
    return UnsuitableDatabase(_NO_PRIVILEGE.format(names=names))


def _log_failure(error: PyMongoError) -> None:
    code = error.code if isinstance(error, OperationFailure) else None
    log.warning("indexes_not_built_yet", error=type(error).__name__, code=code, reason=reason(error))
