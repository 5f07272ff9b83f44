"""The base of every verb: finding a conversation, locking it, and running one write to it at a time.

A transaction sees the primary's latest data, which no majority may have yet; a majority read outside of it
may see less, and nobody guarantees what a transaction saw that then aborts. So whatever a transaction found
(a duplicate, an absence) is answered only from a transaction that commits with `majority`, which waits until
what it read is durable, or fails, and then the answer is 503 (`run_exclusive`, `read_committed`;
test_decisions).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog

from service import clock
from service.database import Database, Transaction
from service.documents import Conversation
from service.errors import (
    BrokenCounter,
    ChatHistoryError,
    ConversationIdTaken,
    ConversationNotFound,
    DatabaseUnavailable,
    IdempotencyConflict,
    InvalidRequest,
)
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import records
from service.history.doorbell import Doorbell
from service.history.kept_pages import KeptPages
from service.history.records import STATE_FIELDS, ConversationState
from service.settings import Settings
from service.tenancy import ConversationKey, ConversationRef, OwnerKey, local_id

T = TypeVar("T")
log = structlog.get_logger(__name__)

# The pause before a transaction is tried again because another request got in its way. It doubles, from the
# first to the second.
PAUSE_S = 0.005
PAUSE_S_MAX = 0.25
# Of so many conversations the state is remembered.
_LEFT_MOST = 4_000
# The errors that a read in `read_committed` may raise as its result. They commit; any other error aborts.
_FINDINGS = (BrokenCounter, ConversationIdTaken, ConversationNotFound, IdempotencyConflict)


class ConversationStore:
    """The conversations of all tenants in one database, and this process's locks on them."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        # One table for all callers of the process: appends to one conversation wait for each other here,
        # because waiting is cheaper than colliding in the database. Appends of other processes collide there,
        # and are run again. A lock that nobody holds or waits for is dropped.
        self._locks: WeakValueDictionary[tuple[ConversationKey, OwnerKey | None], asyncio.Lock] = (
            WeakValueDictionary()
        )
        # The STATE_FIELDS of conversations as this process left them, of the embedded engine only. It is no
        # more than a guess, because others write, too, and a transaction may fail.
        self._left: dict[ConversationKey, Json] = {}
        # The appends that wait for each other, of each conversation (see `group_commit`).
        self.append_queues: dict[tuple[ConversationKey, OwnerKey | None], deque[Any]] = {}
        # Wakes those who follow a conversation.
        self.doorbell = Doorbell(database)
        # What is kept of the histories that were read.
        self.kept_pages = KeptPages(database, settings.cache_bytes)
        # How many conversations a user had lately, on the embedded engine (see `listing`). A guess.
        self.list_lengths: dict[int, int] = {}
        # Whether the maintenance has found that every conversation has an `active_at`.
        self.all_have_active_at = False
        # Work that goes on when its caller is gone.
        self._tasks: set[asyncio.Task[Any]] = set()
        # When the last sweep of this process ended well; another process may be the one that sweeps.
        self.swept_at: datetime | None = None
        # The erasures that this process is at work with (see `user_data.erasure`).
        self.erasures: dict[tuple[OwnerKey, str], asyncio.Task[Any]] = {}

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin work that does not end with its caller, nor with the deadline of the caller."""
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End the work that goes on, when no caller waits for it any more."""
        self.doorbell.close()
        self.kept_pages.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def lists_by_update(self) -> bool:
        """Tell whether the list is still in the order of an earlier version, by `updated_at`.

        It is while conversations of that version may have no `active_at`, or its index is being built.
        """
        indexes = self.database.indexes
        return indexes.has_earlier_list and not (self.all_have_active_at and indexes.has_list)

    def deadline(self) -> AbstractAsyncContextManager[None]:
        """Give all database work inside one deadline, and raise domain errors instead of the driver's."""
        return self.database.deadline()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Give all reads inside one deadline, and on a cluster one point in time (`Database.one_view`)."""
        async with self.database.deadline(), self.database.one_view():
            yield

    async def find(
        self,
        ref: ConversationRef,
        transaction: Transaction | None = None,
        fields: Sequence[str] | None = None,
    ) -> bytes:
        """Find the conversation, undecoded: whole, or only these fields and its `_id`.

        Missing and another user's are one query and one answer.

        Without a transaction it is a majority read, for verbs that read: what they show is durable, and what
        they miss was not acknowledged. Verbs that write ask in a transaction. Raises ConversationNotFound.
        """
        session = transaction.session if transaction else None
        found = await self.database.read(Conversation, ref.filter(), limit=1, session=session, fields=fields)
        if not found:
            raise no_conversation(ref)
        return found[0]

    async def state(self, ref: ConversationRef, transaction: Transaction | None = None) -> ConversationState:
        """Find a conversation's owner and counters. Raises ConversationNotFound, MalformedDocument."""
        return records.state(await self.find(ref, transaction, STATE_FIELDS))

    async def lock_and_update(
        self,
        transaction: Transaction,
        ref: ConversationRef,
        changes: Mapping[str, Any],
        fields: Sequence[str] | None = STATE_FIELDS,
        *,
        active: bool = False,
    ) -> bytes:
        """Update the conversation, and return these fields of it as they then stand, undecoded.

        None stands for the whole conversation, which may hold large metadata. Raises ConversationNotFound.

        The update locks it until the commit against every other write. Its `updated_at` moves to now, and
        with `active` its `active_at`, too, but never backwards, whatever the clock of this process says.
        """
        self._left.pop(ref.key, None)
        now = clock.now()
        update = {**changes, "$max": {"updated_at": now, "active_at": now} if active else {"updated_at": now}}
        found = await self.database.update(Conversation, ref.filter(), update, transaction.session, fields)
        if found is None:
            raise no_conversation(ref)
        return found

    async def lock_and_count(
        self, transaction: Transaction, ref: ConversationRef, counts: Mapping[str, int]
    ) -> ConversationState:
        """Add to counters of the conversation, for new messages, and return its state as it then stands.

        It locks the conversation as `lock_and_update` does, and raises the same. On the embedded engine the
        first attempt is an update that expects the conversation as this process left it, because with that
        the state is known and need not be read. That saves one command of four.
        """
        left = self._left.pop(ref.key, None)
        if left is not None and ref.owner in {None, left["user_id"]} and not ref.conditions:
            now = clock.now()
            changes = {name: left[name] + by for name, by in counts.items()}
            changes["updated_at"] = max(left["updated_at"], now)
            set_active = {"active_at": {"$max": ["$active_at", now]}}
            if await self.database.update_if_equal(
                Conversation, ref.key, left, {**changes, **set_active}, transaction.session
            ):
                return self._state_to_remember({**left, **changes})
        locked = await self.lock_and_update(transaction, ref, {"$inc": counts}, active=True)
        return self._state_to_remember(records.state_fields(locked))

    def _state_to_remember(self, stored: Json) -> ConversationState:
        of = records.state_of(stored)
        # An older version stored fewer of them, and a shell may have stored anything.
        counters = [stored.get(name) for name in STATE_FIELDS if name not in {"user_id", "updated_at"}]
        if self.database.embedded_engine and all(isinstance(each, int) for each in counters):
            if len(self._left) >= _LEFT_MOST:
                self._left.clear()
            self._left[of.key] = stored
        return of

    async def run_exclusive(
        self,
        ref: ConversationRef,
        work: Callable[[Transaction], Awaitable[T]],
        transaction: Transaction | None = None,
    ) -> T:
        """Run a transaction when it is this caller's turn at the conversation in this process.

        Callers who name different owners do not wait for each other, because only one of them can be right:
        the others are refused without waiting, and keep nobody waiting. A caller who names no owner may
        collide with one who does; the database then runs one of the two again.

        Where the conversation is not found, the first statement has changed nothing, and the transaction is
        committed all the same, because the commit waits until what it read is durable. A conversation whose
        deletion a lost primary would undo is thus a 503, and no 404 after which nobody would delete it again.
        """
        try:
            async with self.turn(ref):
                return await self.run(work, transaction)
        finally:
            # Also after an error, because an answer may be lost of a transaction that has committed.
            self.doorbell.ring(ref.key)

    def is_free(self, ref: ConversationRef) -> bool:
        """Tell whether nobody in this process writes to the conversation now."""
        lock = self._locks.get((ref.key, ref.owner))
        return lock is None or not lock.locked()

    @contextlib.asynccontextmanager
    async def turn(self, ref: ConversationRef) -> AsyncIterator[None]:
        """Wait for this caller's turn at the conversation in this process, and hold its lock."""
        lock = self._locks.get((ref.key, ref.owner))
        if lock is None:
            lock = self._locks[ref.key, ref.owner] = asyncio.Lock()
        try:
            # Bounded, because the deadline of the call is the driver's, and does not end this wait.
            async with asyncio.timeout(self.settings.database_timeout_ms / 1000):
                await lock.acquire()
        except TimeoutError as error:
            raise DatabaseUnavailable("Too many writers wait for this conversation. Try again.") from error
        try:
            yield
        finally:
            # Only now, after the commit or the abort: the next caller then finds the database's lock free.
            lock.release()

    async def run(
        self, work: Callable[[Transaction], Awaitable[T]], transaction: Transaction | None = None
    ) -> T:
        """Run a transaction that commits also where the conversation is not found (see `run_exclusive`)."""

        async def conclude(transaction: Transaction) -> T | ConversationNotFound:
            try:
                return await work(transaction)
            except ConversationNotFound as error:
                transaction.wrote = False
                return error

        result = await self.database.transaction(conclude, transaction)
        if isinstance(result, ConversationNotFound):
            raise result
        return result

    async def read_committed(self, look: Callable[[Transaction], Awaitable[T]]) -> T:
        """Look in a transaction that commits with `majority`, and return or raise what was found.

        It is for what another transaction found, and could not commit. If what this one read does not become
        durable in time, nobody can tell, and the answer is DatabaseUnavailable.
        """

        async def conclude(transaction: Transaction) -> T | ChatHistoryError:
            transaction.wrote = False
            try:
                return await look(transaction)
            except _FINDINGS as error:
                return error

        result = await self.database.transaction(conclude)
        if isinstance(result, ChatHistoryError):
            raise result
        return result

    def page_items(self, items: int | None, name: str = "limit") -> int:
        """Return how many items a page has where so many are asked for. Raises InvalidRequest."""
        most = self.settings.page_items_max
        if items is None:
            return min(self.settings.page_items_default, most)
        if not 1 <= items <= most:
            raise InvalidRequest.at((name,), f"must be 1 to {most}")
        return items

    async def for_each(
        self, failed: str, documents: Iterable[T], work: Callable[[T], Awaitable[object]]
    ) -> int:
        """Do the work for each document, or key, by itself, and return for how many it was done.

        Work that returns False had nothing to do. A document whose work fails is logged as `failed`, with its
        id and the error's type, and does not stop the rest; only a database that does not answer stops it.
        """
        done = 0
        for each in documents:
            try:
                done += await work(each) is not False
            except Exception as error:  # an error in one document must not keep the others waiting
                key = bson_codec.decode_anything(each)["_id"] if isinstance(each, bytes) else each
                log.error(failed, id=records.printable_id(key), error=type(error).__name__)
                if isinstance(error, DatabaseUnavailable) and not await self.database.is_ready():
                    raise
        return done


def no_conversation(ref: ConversationRef) -> ConversationNotFound:
    """Return the error for a conversation that is not there, or is another user's."""
    return ConversationNotFound(f"There is no conversation {local_id(ref.key)}.")
