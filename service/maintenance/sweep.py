"""The sweep of every minute: resumes interrupted deletions and erasures, and removes what has expired.

- Of many processes one sweeps: the one that has the lease. When it dies, another one takes the lease within
  40 seconds (tests/unit/test_sweep.py).
- An expired conversation is deleted like any other: it is gone at once, and its messages are removed later.
- The sweep reads what is due, along one index, and nothing else, however many conversations there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from pymongo import ASCENDING
from pymongo.errors import DuplicateKeyError, PyMongoError

from service import clock
from service.access.audit import Audit
from service.database import Transaction
from service.documents import Backfill, Conversation
from service.errors import ConversationNotFound, DatabaseUnavailable
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import deleting, records, retention
from service.history.deleting import resume_deletions
from service.history.store import ConversationStore
from service.telemetry import metrics
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, ConversationRef, OwnerKey
from service.user_data.erasure import RemovedCounts, resume_erasures

# The fields that decide when a conversation is due, and its count. Its metadata may be large.
_FIELDS = ("user_id", "created_at", "updated_at", "active_at", "expires_at", "message_count", "due_at")
_WALK_ID = "due_at"
_WALK_ITEMS = 200
_WALKS, _WALK_PAUSE = 2, timedelta(hours=1)
# For so long a walk goes on in one sweep, so that a walk of days does not keep what is due waiting.
_WALK_S = 30.0
# The read of all ids, on the engine that reads everything that matches before it applies a limit.
_WALK_READ_S = 60.0
_EVERY_S = 60.0
_LEASE, _LEASE_S, _RENEWED_EVERY_S = "sweep", 30.0, 10.0
_PAGE_ITEMS = 1_000
_EARLIEST = datetime.min.replace(tzinfo=UTC)
log = structlog.get_logger(__name__)


async def run(store: ConversationStore, audit: Audit | None) -> None:
    """Sweep now and every minute, while this process is the one that does."""
    is_mine = asyncio.Event()
    keeping = asyncio.create_task(_keep_lease(store, is_mine))
    try:
        while True:
            await is_mine.wait()
            await _sweep(store, audit)
            await asyncio.sleep(_EVERY_S)
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])
        if is_mine.is_set():
            # So that another process need not wait for the lease to expire, as it does if this one dies.
            with contextlib.suppress(PyMongoError):
                await store.database.leases.release(_LEASE)


async def _keep_lease(store: ConversationStore, is_mine: asyncio.Event) -> None:
    """Take the lease, or take it again, every few seconds; `is_mine` says whether this process has it."""
    database = store.database
    while True:
        taken = False
        try:
            taken = await database.is_ready() and await database.leases.take(_LEASE, _LEASE_S)
            if store.lists_by_update:
                walk = await _noted(store)  # of the process that sweeps
                store.all_have_active_at = walk is not None and _is_done(store, walk)
        except Exception as error:  # noqa: BLE001  (whatever it is, the next attempt may go better)
            log.warning("sweep_lease_not_taken", error=type(error).__name__)
        if taken:
            is_mine.set()
        elif is_mine.is_set():
            is_mine.clear()
            metrics.set_oldest_due(0)  # from now on another process says it
        await asyncio.sleep(_RENEWED_EVERY_S)


async def _sweep(store: ConversationStore, audit: Audit | None) -> None:
    steps: dict[str, Callable[[], Awaitable[None]]] = {
        "due_times": functools.partial(fill_in, store),
        "deletions": functools.partial(_finish_deletions, store),
        "erasures": functools.partial(_finish_erasures, store),
        "expiry": functools.partial(_expire, store, audit),
    }
    failed = False
    for name, step in steps.items():
        try:
            await step()
        except DatabaseUnavailable as error:
            failed = True
            log.warning("sweep_postponed", step=name, problem=error.slug())
        except Exception as error:  # an error in one step must not end the other steps, or this task
            failed = True
            log.error("sweep_failed", step=name, exc_info=error)
    if not failed:
        store.swept_at = datetime.now(UTC)
    metrics.swept(failed=failed)


async def _finish_deletions(store: ConversationStore) -> None:
    if count := await resume_deletions(store):
        log.info("deletions_finished", conversations=count)


async def _finish_erasures(store: ConversationStore) -> None:
    if count := await resume_erasures(store):
        log.info("erasures_finished", users=count)


async def _expire(store: ConversationStore, audit: Audit | None) -> None:
    if (expired := await expire(store)).conversations:
        log.info("expired", conversations=expired.conversations, messages=expired.messages)
        if audit is not None:
            audit.note(
                principal="service",
                tenant="",
                method="TASK",
                route="expire",
                status=0,
                what=f"{expired.conversations} conversations, {expired.messages} messages",
            )


@dataclass
class _Sum:
    """How much was removed, or would be."""

    conversations: int = 0
    messages: int = 0

    def add(self, conversation: Conversation) -> None:
        self.conversations += 1
        self.messages += conversation.message_count


async def expire(store: ConversationStore, now: datetime | None = None) -> RemovedCounts:
    """Remove what is due, and return how much that was."""
    now, removed = now or datetime.now(UTC), _Sum()
    last: Json | None = None
    while found := await _page_of_due(store, now, last):
        if last is None:
            metrics.set_oldest_due((now - bson_codec.decode_anything(found[0])["due_at"]).total_seconds())
        await store.for_each("not_expired", found, functools.partial(_expire_one, store, now, removed))
        last = bson_codec.decode_anything(found[-1])
    if last is None:
        metrics.set_oldest_due(0)
    return RemovedCounts(removed.conversations, removed.messages)


async def count_expired(store: ConversationStore, now: datetime | None = None) -> RemovedCounts:
    """Count what is due by looking at every conversation, so that it is true for any settings."""
    now, due = now or datetime.now(UTC), _Sum()

    async def count(raw: bytes) -> None:
        if _is_due(store, raw, now):
            due.add(records.document(raw))

    async for page in _pages(store):
        await store.for_each("not_counted", page, count)
    return RemovedCounts(due.conversations, due.messages)


async def _expire_one(store: ConversationStore, now: datetime, removed: _Sum, raw: bytes) -> None:
    """Remove a conversation if it is due, and else set when it will be.

    The reason is in the filter of the deletion, so a conversation stays that somebody has written to since
    it was read, and that is not due any more.
    """
    conversation = records.document(raw)
    if conversation.active_at is None:
        await _fill_one(store, raw)  # because the reason below is about `active_at`
    if not _is_due(store, raw, now):
        fields = bson_codec.decode_anything(raw)
        await set_due_at(store, fields, _due_at_of(store, fields))
        return
    key = ConversationKey(conversation.id)
    reason = retention.still_due(store.settings, key, expires_at=conversation.expires_at, now=now)
    ref = ConversationRef(key, OwnerKey(conversation.user_id), reason)
    with contextlib.suppress(ConversationNotFound):
        await deleting.delete_conversation(store, ref)
        removed.add(conversation)


def _is_due(store: ConversationStore, raw: bytes, now: datetime) -> bool:
    due_at = _due_at_of(store, bson_codec.decode_anything(raw))
    return due_at is not None and due_at < now


async def _page_of_due(store: ConversationStore, now: datetime, last: Json | None) -> list[bytes]:
    """Read a page along the index, after the last conversation of the page before.

    Conversations with the same time as that one come first, by their ids, so none is skipped or read again.
    """
    windows: list[Json] = [{"due_at": {"$gte": _EARLIEST, "$lt": now}}]
    if last is not None:
        time = last["due_at"]
        windows = [
            {"due_at": {"$gte": time, "$lte": time}, "_id": {"$gt": last["_id"]}},
            {"due_at": {"$gt": time, "$lt": now}},
        ]
    if not store.database.embedded_engine:
        for window in windows:
            window["due_at"]["$type"] = "date"  # see BY_DUE_TIME
    found: list[bytes] = []
    sort = [("due_at", ASCENDING), ("_id", ASCENDING)]
    async with store.deadline():
        for window in windows:
            left = _PAGE_ITEMS - len(found)
            if left:
                found += await store.database.read(
                    Conversation, window, sort=sort, limit=left, fields=_FIELDS
                )
    return found


# -- filling in `due_at` and `active_at` -------------------------------------------------------------

# A walk looks at every conversation once, in the order of their ids, for conversations that were stored
# without `active_at` or `due_at`, or under other retention settings. It notes how far it has come, so that
# another process can go on. It is made for each change of the settings, and made again an hour later, because
# processes of an earlier version, or with the earlier settings, may still have written during the first walk.


async def fill_in(store: ConversationStore) -> None:
    """Go on with the walk that is due, for some seconds, if there is one."""
    settings = retention.fingerprint(store.settings)
    begun = await _noted(store)
    walk = begun if begun and begun.settings == settings else Backfill(id=_WALK_ID, settings=settings)
    if _is_done(store, walk):
        await _end_earlier_list(store)
        return
    if walk.ended_at is not None and clock.now() - walk.ended_at < _WALK_PAUSE:
        return
    until = time.monotonic() + _WALK_S
    count = 0
    async for page in _pages(store, walk.position):
        count += await _fill_page(store, page)
        walk.position = bson_codec.decode_anything(page[-1])["_id"]
        await _note(store, walk)
        if time.monotonic() > until:
            log.info("due_times_going_on", changed=count)
            return
    walk.walks, walk.position, walk.ended_at = walk.walks + 1, None, clock.now()
    await _note(store, walk)
    log.info("due_times_filled_in", changed=count, walk=walk.walks)
    if _is_done(store, walk):
        await _end_earlier_list(store)


async def _end_earlier_list(store: ConversationStore) -> None:
    """List by `active_at` from now on. The embedded engine has no other process that needs the old index."""
    store.all_have_active_at = True
    if store.database.embedded_engine:
        async with store.deadline():
            await store.database.indexes.drop_earlier_list()


def _is_done(store: ConversationStore, walk: Backfill) -> bool:
    return walk.walks >= _WALKS and walk.settings == retention.fingerprint(store.settings)


async def fill_in_all(store: ConversationStore) -> None:
    """Look at every conversation now, whatever was noted; for a command."""
    async for page in _pages(store):
        await _fill_page(store, page)


async def _pages(store: ConversationStore, after: str | None = None) -> AsyncIterator[Sequence[bytes]]:
    """Yield all conversations by their ids, page by page, with _FIELDS of each."""
    embedded, sort = store.database.limit_reads_whole_match, [("_id", ASCENDING)]
    while True:
        # Only texts: every conversation's id is one, and another kind was made by hand.
        query: Json = {"_id": {"$gte": ""} if after is None else {"$gt": after}}
        async with store.database.deadline(seconds=_WALK_READ_S):
            found = await store.database.read(
                Conversation, query, sort=sort, limit=0 if embedded else _WALK_ITEMS, fields=_FIELDS
            )
        for begin in range(0, len(found), _WALK_ITEMS):
            yield found[begin : begin + _WALK_ITEMS]
        if embedded or len(found) < _WALK_ITEMS:
            return
        after = bson_codec.decode_anything(found[-1])["_id"]


async def set_due_at(store: ConversationStore, fields: Json, due_at: datetime | None) -> None:
    """Set `due_at` of a conversation that was read, unless its `expires_at` is another one by now.

    An append meanwhile does not matter, because it only puts the removal off. A conversation of an earlier
    version gets its `active_at`, too, which never moves back.
    """
    active = fields.get("active_at") or fields.get("updated_at")
    changes: Json = {"$set": {"due_at": due_at}}
    if isinstance(active, datetime):
        changes["$max"] = {"active_at": active}

    named = {"_id": fields["_id"], "expires_at": fields.get("expires_at")}

    async def update(transaction: Transaction) -> None:
        await store.database.update(Conversation, named, changes, transaction.session)

    ref = ConversationRef(ConversationKey(fields["_id"]), OwnerKey(fields.get("user_id", "")))
    async with store.deadline():
        await store.run_exclusive(ref, update)


async def _fill_page(store: ConversationStore, page: Sequence[bytes]) -> int:
    return await store.for_each("due_time_not_set", page, functools.partial(_fill_one, store))


async def _fill_one(store: ConversationStore, raw: bytes) -> bool:
    """Set a conversation's `due_at` if it has another one, or no `active_at`; tell whether it had."""
    fields = bson_codec.decode_anything(raw)
    due_at = _due_at_of(store, fields)
    if fields.get("due_at") == due_at and fields.get("active_at") is not None:
        return False
    await set_due_at(store, fields, due_at)
    return True


def _due_at_of(store: ConversationStore, fields: Json) -> datetime | None:
    """Return the `due_at` of a stored conversation, well formed or not."""
    expires_at, active = fields.get("expires_at"), fields.get("active_at") or fields.get("updated_at")
    if fields.get("user_id") == OWNER_WHILE_DELETED:
        return None  # it is being deleted, or imported
    if not isinstance(active, datetime):
        active = clock.now()
    expires_at = expires_at if isinstance(expires_at, datetime) else None
    return retention.due_at(store.settings, fields["_id"], expires_at=expires_at, active=active)


async def _noted(store: ConversationStore) -> Backfill | None:
    async with store.deadline():
        found = await store.database.read(Backfill, {"_id": _WALK_ID}, limit=1)
        return Backfill.model_validate(bson_codec.decode(found[0])) if found else None


async def _note(store: ConversationStore, walk: Backfill) -> None:
    """Remember how far a walk has come. If the process dies before, its last page is looked at again."""
    fields = walk.model_dump(exclude={"id", "revision_id"})

    async def note(transaction: Transaction) -> None:
        named = {"_id": _WALK_ID}
        if await store.database.update(Backfill, named, {"$set": fields}, transaction.session) is None:
            await Backfill(id=_WALK_ID, **fields).insert(session=transaction.session)

    async with store.deadline():
        with contextlib.suppress(DuplicateKeyError):  # another process has just noted its own walk
            await store.database.transaction(note)
