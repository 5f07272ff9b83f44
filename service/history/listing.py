"""A user's conversations, latest activity first.

A list costs what its page holds. The position of a page's last conversation begins the next page, so nothing
is skipped by counting.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import structlog
from bson.errors import InvalidBSON
from pymongo import ASCENDING, DESCENDING

from service import clock
from service.clock import EPOCH
from service.database import Budget
from service.documents import Conversation
from service.errors import MalformedDocument
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import records, written_types
from service.history.records import ConversationRecord
from service.history.store import ConversationStore
from service.tenancy import OWNER_WHILE_DELETED, OwnerKey, TenantScope, escaped, local_id, tenant_of

log = structlog.get_logger(__name__)

# The time of a conversation that has none, because somebody made it by hand. It is the end of the list.
UNDATED = EPOCH - timedelta(milliseconds=1)
# The first window of time on an engine that reads its whole match, and the factor by which each next window
# is wider: eleven windows reach back to 1970, and the first ones hold little more than a page.
_WINDOW = timedelta(seconds=1)
_WINDOW_GROWTH = 8
# How many conversations a walk over a whole tenant reads at once.
_WALK_ITEMS = 1_000
# Of so many users the length of a short list is remembered, by a hash of the user's key.
_LENGTHS_MOST = 10_000
_FAR = 2**63
_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)
# The time that orders the list. It is `updated_at` while conversations of an earlier version may be without
# the other one. It is never before `active_at`, so a cursor that stands at such a time skips nothing later.
Order = Literal["active_at", "updated_at"]


@dataclass(frozen=True)
class ListPosition:
    """A place in a list of conversations: behind the one with this time and this id."""

    time: datetime
    conversation_id: str


@dataclass(frozen=True)
class ConversationPage:
    """A page of conversations, latest activity first, and whether any follow.

    `left_out` are the ids of those within the page that cannot be read; `boundary` is where the page ends.
    """

    conversations: list[ConversationRecord]
    has_more: bool
    boundary: ListPosition | None
    left_out: Sequence[str] = ()

    @property
    def next(self) -> ListPosition | None:
        """The position to continue from, or None where nothing follows."""
        return self.boundary if self.has_more else None


@dataclass(frozen=True)
class _Listed:
    """A conversation in the list, and its place; None where it is not well formed."""

    place: ListPosition
    conversation: ConversationRecord | None


async def page(
    store: ConversationStore,
    scope: TenantScope,
    user_id: str,
    limit: int | None,
    after: ListPosition | None,
) -> ConversationPage:
    """Return a page of a user's conversations; see `ChatService.list_conversations`."""
    limit = store.page_items(limit)
    owner, order = scope.owner_key(user_id), _order(store)
    budget = Budget(store.settings.page_bytes_max)
    async with store.deadline():
        found = await _whole(store, owner, order, limit) if after is None else None
        if found is None:
            found = []
            for query in _queries(store, scope, owner, order, after):
                found += await _read(store, query, order, limit + 1 - len(found), budget)
                if len(found) > limit or budget.spent:
                    break
    if after is None:
        ended = len(found) <= limit and not budget.spent
        _remember_length(store, owner, len(found), all_of_it=ended)
    shown = found[:limit]
    return ConversationPage(
        [each.conversation for each in shown if each.conversation],
        len(found) > limit or budget.spent,
        shown[-1].place if shown else None,
        [each.place.conversation_id for each in shown if not each.conversation],
    )


async def page_of_tenant(
    store: ConversationStore, scope: TenantScope, limit: int | None, after: ListPosition | None
) -> ConversationPage:
    """Return a page of all conversations of a tenant; see `ChatService.list_conversations`.

    It walks over the keys and times of all of them, with no more than a page in memory. An index in this
    order would make that cheaper, and every append dearer, by 6 to 8% on the embedded engine.
    """
    limit, order = store.page_items(limit), _order(store)
    found: list[tuple[timedelta, str]] = []
    fields = ("user_id", order)
    async for part in store.database.pages(Conversation, _of_tenant(scope), size=_WALK_ITEMS, fields=fields):
        places = [_sort_key(each, order) for each in map(bson_codec.decode_anything, part)]
        behind = [each for each in places if each and _is_behind(each, scope, after)]
        found = heapq.nsmallest(limit + 1, [*found, *behind])
    keys = {"_id": {"$in": [key for _, key in found]}, "user_id": {"$ne": OWNER_WHILE_DELETED}}
    budget = Budget(store.settings.page_bytes_max)
    async with store.deadline():
        listed = await _read(store, keys, order, limit, budget) if found else []
    shown = listed[:limit]
    return ConversationPage(
        [each.conversation for each in shown if each.conversation],
        len(found) > limit or budget.spent,
        shown[-1].place if shown else None,
        [each.place.conversation_id for each in shown if not each.conversation],
    )


def _of_tenant(scope: TenantScope) -> Json:
    return {"_id": {"$gt": scope.prefix, "$lt": scope.end}} if scope.end else {}


def _sort_key(fields: Json, order: Order) -> tuple[timedelta, str] | None:
    """Return what sorts a conversation into the list, or None for one that is deleted, or made by hand."""
    key, time = fields["_id"], fields.get(order)
    if not isinstance(key, str) or fields.get("user_id") == OWNER_WHILE_DELETED:
        return None
    return EPOCH - (time if isinstance(time, datetime) else UNDATED), key


def _is_behind(place: tuple[timedelta, str], scope: TenantScope, after: ListPosition | None) -> bool:
    if tenant_of(place[1]) != scope.tenant:
        return False
    return after is None or place > (EPOCH - after.time, scope.conversation_key(after.conversation_id))


def position_of(store: ConversationStore, conversation: ConversationRecord) -> ListPosition:
    """Return the present place of a conversation in its user's list."""
    return ListPosition(getattr(conversation, _order(store)), conversation.id)


def _order(store: ConversationStore) -> Order:
    return "updated_at" if store.lists_by_update else "active_at"


def _remember_length(store: ConversationStore, owner: OwnerKey, found: int, *, all_of_it: bool) -> None:
    """Remember how many conversations a user has, if a page had all of them, else forget it."""
    lengths, user = store.list_lengths, hash(owner)
    if all_of_it:
        if len(lengths) >= _LENGTHS_MOST:
            lengths.clear()
        lengths[user] = found
    else:
        lengths.pop(user, None)


async def _whole(store: ConversationStore, owner: OwnerKey, order: Order, limit: int) -> list[_Listed] | None:
    """Return all of a list that was no longer than a page lately, or None where it may be longer.

    For the embedded engine: to sort costs that engine twice what reading does, and reading in windows of time
    still more.
    """
    if not store.database.limit_reads_whole_match or store.list_lengths.get(hash(owner), _FAR) > limit:
        return None
    budget = Budget(store.settings.page_bytes_max)
    found = await _read(store, {"user_id": owner}, order, limit + 1, budget, in_order=False)
    if len(found) > limit or budget.spent:
        return None
    return sorted(found, key=lambda each: (EPOCH - each.place.time, escaped(each.place.conversation_id)))


def _queries(
    store: ConversationStore, scope: TenantScope, owner: OwnerKey, order: Order, after: ListPosition | None
) -> Iterator[Json]:
    """Yield the filters that together find the list behind a position, in its order.

    Where a limit saves no reading, these are windows of time.
    """
    in_windows = store.database.limit_reads_whole_match
    if after is None and not in_windows:
        yield {"user_id": owner}
        return
    behind: Json = {}
    if after is not None:
        # First the conversations of the same millisecond as the last one of the page before, by their ids.
        # Without this query, the rest of those would be left out.
        behind = {"_id": {"$gt": scope.conversation_key(after.conversation_id)}}
        if after.time == UNDATED:
            yield {"user_id": owner, order: None, **behind}
            return
        yield {"user_id": owner, order: after.time, **behind}
    for begin, end in _windows(after, in_windows=in_windows):
        yield window_filter(owner, begin, end, order)
    yield {"user_id": owner, order: None}


async def _read(
    store: ConversationStore,
    query: Json,
    order: Order,
    limit: int,
    budget: Budget,
    *,
    in_order: bool = True,
) -> list[_Listed]:
    generation = store.kept_pages.generation
    sort = [(order, DESCENDING), ("_id", ASCENDING)] if in_order else []
    found = await store.database.read(Conversation, query, sort=sort, limit=limit, budget=budget)
    return [store.kept_pages.listed(order, each, _listed, generation) for each in found]


def _listed(raw: bytes, order: Order) -> _Listed:
    """Return a conversation with its place, or only the place if it is not well formed, and log that.

    It is left out, because otherwise one bad document would hide all others of the user. Its place is needed
    still, where it is the last of the page.
    """
    with contextlib.suppress(InvalidBSON, MalformedDocument):
        stored = bson_codec.decode(raw)
        if written_types.is_as_written(stored):
            shown = records.as_written(stored)
            return _Listed(ListPosition(stored.get(order) or UNDATED, shown.id), shown)
    fields = bson_codec.decode_anything(raw)
    time = fields.get(order)
    place = ListPosition(time if isinstance(time, datetime) else UNDATED, local_id(str(fields["_id"])))
    try:
        return _Listed(place, records.conversation(raw))
    except MalformedDocument as error:
        name = records.printable_id(fields["_id"])
        log.error("document_malformed", id=name, error=type(error.__cause__).__name__)
        return _Listed(place, None)


def _windows(after: ListPosition | None, *, in_windows: bool) -> Iterator[tuple[datetime, datetime]]:
    """Cut the past into windows, newest first: one, or growing ones where a limit saves no reading.

    The newest window has no end, because the clock of another process may be ahead of ours.
    """
    end = after.time if after else _FOREVER
    if not in_windows:
        yield EPOCH, end
        return
    begin, width = min(end, clock.now()), _WINDOW
    while begin > EPOCH:
        begin = begin - width if begin - EPOCH > width else EPOCH
        yield begin, end
        end, width = begin, width * _WINDOW_GROWTH


def window_filter(owner: OwnerKey, begin: datetime, end: datetime, order: Order = "active_at") -> Json:
    """Return the filter of one user's conversations in a window of time, `begin` included, `end` not.

    `begin` is given as what it is greater than, a millisecond before, because an inclusive bound at the far
    end of an index that has more fields behind it misses its equals on the embedded engine.
    """
    return {"user_id": owner, order: {"$gt": begin - timedelta(milliseconds=1), "$lt": end}}
