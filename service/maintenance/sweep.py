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
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog
from pymongo import ASCENDING
from pymongo.errors import PyMongoError

from service.access.audit import Audit
from service.documents import Conversation
from service.errors import ConversationNotFound, DatabaseUnavailable
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import deleting, records, retention
from service.history.deleting import resume_deletions
from service.history.store import ConversationStore
from service.maintenance import due_times
from service.telemetry import metrics
from service.tenancy import ConversationKey, ConversationRef, OwnerKey
from service.user_data.erasure import RemovedCounts, resume_erasures

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
                walk = await due_times.noted(store)  # of the process that sweeps
                store.all_have_active_at = walk is not None and due_times.is_done(store, walk)
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
        "due_times": functools.partial(due_times.fill_in, store),
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


async def expire(store: ConversationStore, now: datetime | None = None) -> RemovedCounts:
    """Remove what is due, and return how much that was."""
    now, removed = now or datetime.now(UTC), Counter[str]()
    last: Json | None = None
    while found := await _page_of_due(store, now, last):
        if last is None:
            metrics.set_oldest_due((now - bson_codec.decode_anything(found[0])["due_at"]).total_seconds())
        await store.for_each("not_expired", found, functools.partial(_expire_one, store, now, removed))
        last = bson_codec.decode_anything(found[-1])
    if last is None:
        metrics.set_oldest_due(0)
    return RemovedCounts(removed["conversations"], removed["messages"])


async def count_expired(store: ConversationStore, now: datetime | None = None) -> RemovedCounts:
    """Count what is due by looking at every conversation, so that it is true for any settings."""
    now, due = now or datetime.now(UTC), Counter[str]()

    async def count(raw: bytes) -> None:
        if _is_due(store, raw, now):
            due.update(conversations=1, messages=records.document(raw).message_count)

    async for page in due_times.pages(store):
        await store.for_each("not_counted", page, count)
    return RemovedCounts(due["conversations"], due["messages"])


async def _expire_one(store: ConversationStore, now: datetime, removed: Counter[str], raw: bytes) -> None:
    """Remove a conversation if it is due, and count it; else set when it will be due.

    The reason is in the filter of the deletion, so a conversation stays that somebody has written to since
    it was read, and that is not due any more.
    """
    conversation = records.document(raw)
    if conversation.active_at is None:
        await due_times.fill_one(store, raw)  # because the reason below is about `active_at`
    if not _is_due(store, raw, now):
        fields = bson_codec.decode_anything(raw)
        await due_times.set_due_at(store, fields, due_times.due_at_of(store, fields))
        return
    key = ConversationKey(conversation.id)
    reason = retention.still_due(store.settings, key, expires_at=conversation.expires_at, now=now)
    ref = ConversationRef(key, OwnerKey(conversation.user_id), reason)
    with contextlib.suppress(ConversationNotFound):
        await deleting.delete_conversation(store, ref)
        removed.update(conversations=1, messages=conversation.message_count)


def _is_due(store: ConversationStore, raw: bytes, now: datetime) -> bool:
    due_at = due_times.due_at_of(store, bson_codec.decode_anything(raw))
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
                    Conversation, window, sort=sort, limit=left, fields=due_times.FIELDS
                )
    return found
