"""Fills in when conversations are due: `due_at`, and `active_at` of those that an earlier version stored.

A walk looks at every conversation once, in the order of their ids, for conversations that were stored
without `active_at` or `due_at`, or under other retention settings. It notes how far it has come, so that
another process can go on. It is made for each change of the settings, and made again an hour later, because
processes of an earlier version, or with the earlier settings, may still have written during the first walk.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta

import structlog
from pymongo import ASCENDING
from pymongo.errors import DuplicateKeyError

from service import clock
from service.database import Transaction
from service.documents import Backfill, Conversation
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import retention
from service.history.store import ConversationStore
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, ConversationRef, OwnerKey

# The fields that decide when a conversation is due, and its count. Its metadata may be large.
FIELDS = ("user_id", "created_at", "updated_at", "active_at", "expires_at", "message_count", "due_at")
_WALK_ID = "due_at"
_WALK_ITEMS = 200
_WALKS, _WALK_PAUSE = 2, timedelta(hours=1)
# For so long a walk goes on in one sweep, so that a walk of days does not keep what is due waiting.
_WALK_S = 30.0
# The read of all ids, on the engine that reads everything that matches before it applies a limit.
_WALK_READ_S = 60.0
log = structlog.get_logger(__name__)


async def fill_in(store: ConversationStore) -> None:
    """Go on with the walk that is due, for some seconds, if there is one."""
    settings = retention.fingerprint(store.settings)
    begun = await noted(store)
    walk = begun if begun and begun.settings == settings else Backfill(id=_WALK_ID, settings=settings)
    if is_done(store, walk):
        await _end_earlier_list(store)
        return
    if walk.ended_at is not None and clock.now() - walk.ended_at < _WALK_PAUSE:
        return
    until = time.monotonic() + _WALK_S
    count = 0
    async for page in pages(store, walk.position):
        count += await _fill_page(store, page)
        walk.position = bson_codec.decode_anything(page[-1])["_id"]
        await _note(store, walk)
        if time.monotonic() > until:
            log.info("due_times_going_on", changed=count)
            return
    walk.walks, walk.position, walk.ended_at = walk.walks + 1, None, clock.now()
    await _note(store, walk)
    log.info("due_times_filled_in", changed=count, walk=walk.walks)
    if is_done(store, walk):
        await _end_earlier_list(store)


async def _end_earlier_list(store: ConversationStore) -> None:
    """List by `active_at` from now on. The embedded engine has no other process that needs the old index."""
    store.all_have_active_at = True
    if store.database.embedded_engine:
        async with store.deadline():
            await store.database.indexes.drop_earlier_list()


def is_done(store: ConversationStore, walk: Backfill) -> bool:
    """Tell whether the walks for the present settings have ended."""
    return walk.walks >= _WALKS and walk.settings == retention.fingerprint(store.settings)


async def fill_in_all(store: ConversationStore) -> None:
    """Look at every conversation now, whatever was noted; for a command."""
    async for page in pages(store):
        await _fill_page(store, page)


async def pages(store: ConversationStore, after: str | None = None) -> AsyncIterator[Sequence[bytes]]:
    """Yield all conversations by their ids, page by page, with FIELDS of each."""
    embedded, sort = store.database.limit_reads_whole_match, [("_id", ASCENDING)]
    while True:
        # Only texts: every conversation's id is one, and another kind was made by hand.
        query: Json = {"_id": {"$gte": ""} if after is None else {"$gt": after}}
        async with store.database.deadline(seconds=_WALK_READ_S):
            found = await store.database.read(
                Conversation, query, sort=sort, limit=0 if embedded else _WALK_ITEMS, fields=FIELDS
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
    return await store.for_each("due_time_not_set", page, functools.partial(fill_one, store))


async def fill_one(store: ConversationStore, raw: bytes) -> bool:
    """Set a conversation's `due_at` if it has another one, or no `active_at`; tell whether it had."""
    fields = bson_codec.decode_anything(raw)
    due_at = due_at_of(store, fields)
    if fields.get("due_at") == due_at and fields.get("active_at") is not None:
        return False
    await set_due_at(store, fields, due_at)
    return True


def due_at_of(store: ConversationStore, fields: Json) -> datetime | None:
    """Return the `due_at` of a stored conversation, well formed or not."""
    expires_at, active = fields.get("expires_at"), fields.get("active_at") or fields.get("updated_at")
    if fields.get("user_id") == OWNER_WHILE_DELETED:
        return None  # it is being deleted, or imported
    if not isinstance(active, datetime):
        active = clock.now()
    expires_at = expires_at if isinstance(expires_at, datetime) else None
    return retention.due_at(store.settings, fields["_id"], expires_at=expires_at, active=active)


async def noted(store: ConversationStore) -> Backfill | None:
    """Return how far the walk has come, as a process noted it last."""
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
