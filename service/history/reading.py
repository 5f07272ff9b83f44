"""Reading: a conversation, a message, a page, a stream. It costs what it returns, not what it skips."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Generic, Literal, TypedDict, TypeVar

from pymongo import ASCENDING

from service import clock
from service.database import Budget
from service.documents import Message
from service.errors import MessageNotFound
from service.formats.openai_items import Role
from service.formats.strict_json import Json
from service.history import encoded_pages, records, seq_range
from service.history.records import ConversationRecord, ConversationState
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.tenancy import ConversationKey, ConversationRef

Order = Literal["asc", "desc"]
# A message: an object, or its JSON.
M = TypeVar("M")

# The first part of a stream is small, because the size of the messages is not known yet. Later parts aim at
# `_PART_BYTES`; a part that turns out larger than `_PART_BYTES_MAX` is cut.
_FIRST_PART_ITEMS = 4
_PART_BYTES = 512 * 1024
_PART_BYTES_MAX = 8 * _PART_BYTES
_PART_GROWTH = 16
_PART_ITEMS_MAX = 1_000
# A binary search for a time ends when it is this near. The index of times finds the message itself.
_HALVING_SEQS = 64
_BY_TIME = [("created_at", ASCENDING), ("seq", ASCENDING)]


class HistoryFilter(TypedDict, total=False):
    """Which messages of a history: seqs exclusive, times (aware) inclusive, one role or all."""

    after: int | None
    before: int | None
    since: datetime | None
    until: datetime | None
    role: Role | None


@dataclass(frozen=True)
class MessagePage(Generic[M]):
    """A page of messages; `boundary_seq` is the `seq` of its last, from which the next page goes on.

    The page is of this `version` of the conversation, or of a later one.
    """

    messages: list[M]
    has_more: bool
    boundary_seq: int | None
    version: int = 0

    @property
    def next(self) -> int | None:
        """The `seq` to continue from, or None where nothing follows."""
        return self.boundary_seq if self.has_more else None


async def conversation(store: ConversationStore, ref: ConversationRef) -> ConversationRecord:
    """Return a conversation. Raises ConversationNotFound."""
    async with store.deadline():
        return records.conversation(await store.find(ref))


async def version(store: ConversationStore, ref: ConversationRef) -> int:
    """Return the version of a conversation. Raises ConversationNotFound."""
    async with store.deadline():
        return (await store.state(ref)).version


async def message(store: ConversationStore, ref: ConversationRef, message_id: str) -> Json:
    """Return one message. Raises ConversationNotFound, MessageNotFound."""
    async with store.reading():
        # A majority read, so a message that is not durable yet is not shown. Until it is durable, it is true
        # that the message does not exist.
        found = await seq_range.find_message(store, await store.state(ref), message_id)
    if found is None:
        raise MessageNotFound(f"There is no message {message_id} in this conversation.")
    return found


async def page(
    store: ConversationStore,
    ref: ConversationRef,
    which: HistoryFilter,
    *,
    limit: int | None,
    last: int | None,
    order: Order,
) -> MessagePage[Json]:
    """Return a page of messages, or the newest `last` of them; see `ChatService.get_chat_history`."""
    wanted = _Wanted(which, limit, last, order)
    return await _page(store, ref, wanted, _read_page, lambda each: int(each["seq"]))


async def encoded_page(
    store: ConversationStore,
    ref: ConversationRef,
    which: HistoryFilter,
    *,
    limit: int | None,
    last: int | None,
    order: Order,
) -> MessagePage[bytes]:
    """Return the same page, its messages as JSON."""
    wanted = _Wanted(which, limit, last, order)
    read = functools.partial(encoded_pages.read, generation=store.kept_pages.generation)
    found = await _page(store, ref, wanted, read, lambda each: each.seq)
    messages = [each.json for each in found.messages]
    return MessagePage(messages, found.has_more, found.boundary_seq, found.version)


@dataclass(frozen=True)
class _Wanted:
    """Which page is asked for: `last` in place of `limit` and `order`."""

    which: HistoryFilter
    limit: int | None
    last: int | None
    order: Order


async def _page(
    store: ConversationStore,
    ref: ConversationRef,
    wanted: _Wanted,
    read: Callable[
        [ConversationStore, ConversationState, SeqRange, int, bool], Awaitable[tuple[list[M], bool]]
    ],
    seq_of: Callable[[M], int],
) -> MessagePage[M]:
    last = wanted.last
    count = store.page_items(*((wanted.limit, "limit") if last is None else (last, "last")))
    backwards = wanted.order == "desc" or last is not None
    async with store.reading():
        of = await store.state(ref)
        while True:
            part = await _range_of(store, of, wanted.which)
            # One more than the page has, which tells whether any follow.
            found, cut = await read(store, of, part, count + 1, backwards)
            newest = seq_of(found[0 if backwards else -1]) if found else None
            if not _reaches_end(of, part, newest, backwards, full=cut or len(found) > count):
                break
            now = await store.state(ref)
            if now.last_seq == of.last_seq:
                break
            of = now  # its end was cut off, and it went on, while this was read
    messages = found[:count]
    boundary_seq = seq_of(messages[-1]) if messages else None
    if last is not None:
        messages.reverse()
    return MessagePage(messages, cut or len(found) > count, boundary_seq, of.version)


def _reaches_end(
    of: ConversationState, part: SeqRange, newest: int | None, backwards: bool, *, full: bool
) -> bool:
    """Tell whether a page ends where the history does, and does not have the newest message.

    That message was deleted before the page was read, or while it was. In the second case others may stand
    behind its place, which the range does not reach, and the page would show an end that there never was.
    """
    return 0 < part.high == of.last_seq != newest and (backwards or not full)


async def stream(
    store: ConversationStore,
    ref: ConversationRef,
    which: HistoryFilter,
    *,
    limit: int | None,
    order: Order,
) -> AsyncIterator[list[Json]]:
    """Yield a history in parts, each read when it is asked for; see `ChatService.stream_chat_history`."""
    backwards = order == "desc"
    async with store.reading():
        part = await _range_of(store, await store.state(ref), which)
    # The range ends at the `last_seq` of now, so messages that are appended meanwhile do not make the stream
    # longer, and it ends.
    async for found in parts(store, part, limit=limit, backwards=backwards):
        yield found


async def parts(
    store: ConversationStore, part: SeqRange, *, limit: int | None = None, backwards: bool = False
) -> AsyncIterator[list[Json]]:
    """Yield a range of a history in parts, of which the first may be empty."""
    left = limit if limit is not None else part.high - part.low
    wanted = min(left, _FIRST_PART_ITEMS)
    while True:
        budget = Budget(_PART_BYTES_MAX)
        # A deadline and a view for each part, because the reader decides how long the stream takes, and a
        # server keeps an old view for minutes only. A later view has all messages up to the `last_seq` of an
        # earlier one.
        async with store.reading():
            found = await seq_range.read(store, part, wanted, backwards=backwards, budget=budget)
        yield records.messages(found)
        left -= len(found)
        if left <= 0 or (len(found) < wanted and not budget.spent):
            return
        part = part.rest_after(records.message(found[-1])["seq"], backwards)
        wanted = min(left, _part_items(found))


def _part_items(part: Sequence[bytes]) -> int:
    """Return how many messages of the size of these make a part of a stream.

    The number grows by `_PART_GROWTH` at most, because the next messages may be much larger.
    """
    typical = max(1, sum(map(len, part)) // len(part))
    return max(1, min(_PART_BYTES // typical, len(part) * _PART_GROWTH, _PART_ITEMS_MAX))


async def _read_page(
    store: ConversationStore, _: ConversationState, part: SeqRange, count: int, backwards: bool
) -> tuple[list[Json], bool]:
    """Read up to `count` messages, and tell whether they were cut short because of their size."""
    budget = Budget(store.settings.page_bytes_max)
    found, chunk = list[Json](), list[bytes]()
    while len(found) < count and part.low < part.high:
        wanted = encoded_pages.next_chunk(store, count - len(found), chunk)
        chunk = await seq_range.read(store, part, wanted, backwards=backwards, budget=budget)
        found += records.messages(chunk)
        if len(chunk) < wanted or budget.spent:
            break
        part = part.rest_after(found[-1]["seq"], backwards)
    return found, budget.spent


# -- times -----------------------------------------------------------------------------------------


async def _range_of(store: ConversationStore, of: ConversationState, which: HistoryFilter) -> SeqRange:
    """Turn a filter into a range of seqs, bounded on both sides by the conversation's own."""
    low = which.get("after") or 0
    high = of.last_seq
    if (before := which.get("before")) is not None:
        high = min(high, before - 1)
    part = replace(SeqRange.whole(of), low=low, high=max(low, high), role=which.get("role"))
    if (since := which.get("since")) is not None:
        part = part.clip(await _last_seq_before(store, of, clock.to_milliseconds(since)), part.high)
    if (until := which.get("until")) is not None:
        last = clock.to_milliseconds(until)
        if last < of.updated_at:  # else no message is newer, because no message is newer than `updated_at`
            just_after = last + timedelta(milliseconds=1)
            part = part.clip(part.low, await _last_seq_before(store, of, just_after))
    return part


async def _last_seq_before(store: ConversationStore, of: ConversationState, time: datetime) -> int:
    """Return the seq up to which all messages are older than `time`, and above which none is.

    It exists because `created_at` never decreases along `seq`.
    """
    if time > of.updated_at:
        return of.last_seq
    # The filter has both ends, because the embedded engine reads all that it matches, whatever the limit.
    newest = await _time_to_look_until(store, of, time)
    if newest is None:
        return of.last_seq
    query = time_window_filter(of.key, time, newest)
    found = await store.database.read(Message, query, sort=_BY_TIME, limit=1)
    return int(records.message(found[0])["seq"]) - 1 if found else of.last_seq


async def _time_to_look_until(
    store: ConversationStore, of: ConversationState, time: datetime
) -> datetime | None:
    """Return the time of some message not older than `time` and near the first such, or None."""
    if not store.database.limit_reads_whole_match:
        query = {"conversation_id": of.key, "created_at": {"$gte": time}}
        found = await store.database.read(Message, query, sort=[("created_at", ASCENDING)], limit=1)
        return records.message(found[0])["created_at"] if found else None
    # A binary search by seq, because `created_at` never decreases along it. Messages up to `low` are older
    # than `time`; of those above `high`, none is.
    low, high, newest = 0, of.last_seq, None
    while high - low > _HALVING_SEQS or newest is None:
        middle = low + (high - low) // 2
        upper = replace(SeqRange.whole(of), low=middle, high=high, owner=None)
        found_at = await seq_range.read(store, upper, 1, backwards=False)
        if not found_at:  # deletions left nothing between the two
            if middle == low:
                break
            high = middle
            continue
        first = records.message(found_at[0])
        if first["created_at"] >= time:
            high, newest = middle, first["created_at"]
        else:
            low = first["seq"]
        if low >= high:
            break
    return newest


def time_window_filter(key: ConversationKey, begin: datetime, end: datetime) -> Json:
    """Return the filter of one conversation's messages in a window of time, both ends included."""
    return {"conversation_id": key, "created_at": {"$gte": begin, "$lte": end}}
