"""Every rule and every query of the service; knows no HTTP.

The model. A conversation has one owner and a counter, `last_seq`. A message belongs to one conversation
and has a place in it, `seq`, that it never leaves. The invariants, each with the test that proves it
(tests/integration):

- `seq` is 1, 2, 3 … in the order of commits; a reader that has seen n + 1 will never find a new n or
  less (test_concurrency).
- All messages of one append commit together with the counters that count them, and stand together
  (test_concurrency).
- `created_at` never decreases along `seq`, whatever the clocks of several processes say (test_history).
- An append that is repeated with its key, or with its ids, is stored once (test_idempotency).
- A message always has its conversation: an append and a deletion of the conversation exclude each other
  (test_concurrency).
- A read costs what it returns, not what it passes over (test_flat_cost).

One append is one transaction. Its first statement updates the conversation, which locks it against every
other append, so that no two can take the same `seq`; then it reads what it took, inserts, and commits.
Appends to one conversation wait for each other inside this process (`_turns`), because waiting is cheaper
than colliding; those of other processes collide, and are run again.

A message's id is known before the first attempt: the caller's own, or made from the idempotency key, or
random. That is what makes every repetition safe, our own included: the id is already there or it is not.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, TypeVar, Unpack
from weakref import WeakValueDictionary

import bson
from pydantic import TypeAdapter, ValidationError
from pymongo import ASCENDING, DESCENDING
from pymongo.errors import DuplicateKeyError

from service import metrics, payloads, times
from service.database import Database, Transaction
from service.documents import (
    NOBODY,
    OWNED_FIELDS,
    Conversation,
    Id,
    Message,
    MessageFields,
    Title,
)
from service.errors import (
    FAULTS_MAX,
    ConversationIdTaken,
    ConversationNotFound,
    DatabaseUnavailable,
    Fault,
    IdempotencyConflict,
    InvalidRequest,
    MessageNotFound,
)
from service.payloads import Path
from service.roles import Role
from service.scopes import Key, Owner, Scope, message_key, own_id
from service.settings import DELETE_BATCH_ITEMS, WINDOW_SEQS_MAX, Settings

Json = dict[str, Any]
Order = Literal["asc", "desc"]
P = ParamSpec("P")
T = TypeVar("T")

# How many messages one read of a page fetches before it looks at how large they are.
_CHUNK_ITEMS = 64
# A stream begins with few messages, since nobody knows how large they are, and then aims at this size.
_FIRST_PART_ITEMS = 4
_PART_BYTES = 512 * 1024
_PART_GROWTH = 16
_PART_ITEMS_MAX = 1_000
# A time range begins where a search by halves has come this near, and the index of times does the rest.
_HALVING_SEQS = 64
# The list's first window of time on an engine that reads its whole match, and how it grows.
_LIST_WINDOW = timedelta(seconds=1)
_LIST_WINDOW_GROWTH = 8
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)

UNSET: Any = object()


@dataclass(frozen=True)
class Appended:
    """The stored messages as BSON, in order, and whether an earlier request had stored them."""

    documents: list[bytes]
    replayed: bool

    @property
    def messages(self) -> list[Json]:
        """The messages as callers see them, decoded at each call."""
        return _all_public(self.documents)

    @property
    def size(self) -> int:
        """How many bytes they are, as `payloads.beside` asks."""
        return sum(map(len, self.documents))


@dataclass(frozen=True)
class History:
    """A page of messages; `next` is the `seq` to go on from while `has_more`."""

    messages: list[Json]
    has_more: bool
    edge: int | None

    @property
    def next(self) -> int | None:
        """The `seq` to continue from, or None where nothing follows."""
        return self.edge if self.has_more else None


@dataclass(frozen=True)
class Span:
    """What part of a history is meant: `low` < seq <= `high`, of one role or of all."""

    key: Key
    low: int
    high: int
    role: Role | None = None

    def query(self) -> Json:
        """Say it as a filter that one index serves, bounded on both sides."""
        query: Json = {"conversation_id": self.key}
        if self.role is not None:
            query["role"] = self.role
        query["seq"] = {"$gt": self.low, "$lte": self.high}
        return query

    def between(self, low: int, high: int) -> Span:
        """Return the part of it that lies in `low` < seq <= `high`."""
        return Span(self.key, max(low, self.low), min(high, self.high), self.role)

    def beyond(self, seq: int, backwards: bool) -> Span:
        """Return the part of it that is left to read after this seq."""
        return self.between(self.low, seq - 1) if backwards else self.between(seq, self.high)


class HistoryFilters(TypedDict, total=False):
    """Which messages of a history: seqs exclusive, times (aware) inclusive, one role or all."""

    after: int | None
    before: int | None
    since: datetime | None
    until: datetime | None
    role: Role | None


@dataclass(frozen=True)
class ListPosition:
    """Where a list of conversations stands: after the one with these two."""

    updated_at: datetime
    conversation_id: str


@dataclass(frozen=True)
class ConversationList:
    """A page of conversations, latest activity first, and whether any follow."""

    conversations: list[Conversation]
    has_more: bool

    @property
    def next(self) -> ListPosition | None:
        """The position to continue from, or None where nothing follows."""
        if not self.has_more:
            return None
        last = self.conversations[-1]
        return ListPosition(last.updated_at, last.id)


@dataclass(frozen=True)
class _NewMessage:
    """A message on its way in: its id, and its fields as BSON, checked and encoded once."""

    id: str
    fields: bytes


@dataclass(frozen=True)
class Naming:
    """How messages without an id of their own get one.

    `key` is an idempotency key. `prefixes`, one for each message, are for a caller who needs ids to begin as
    he says (`msg`, `fc`); then a key may come with ids of the caller's own, which count before it.
    """

    key: str | None = None
    prefixes: Sequence[str] | None = None


@dataclass(frozen=True)
class Batch:
    """What one append brings, checked and encoded.

    `follower` ends the id that a longer batch of its key would go on with.
    """

    messages: list[_NewMessage]
    follower: str | None

    @property
    def ids(self) -> list[str]:
        """The ids of its messages, in order."""
        return [message.id for message in self.messages]


def _in_one_call(
    method: Callable[Concatenate[ChatService, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ChatService, P], Coroutine[Any, Any, T]]:
    """Give a verb one deadline for all its database work, and our errors instead of the driver's."""

    @functools.wraps(method)
    async def bounded(self: ChatService, *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._database.call():
            return await method(self, *args, **kwargs)

    return bounded  # type: ignore[return-value]  # mypy calls the same type by another name


class ChatService:
    """The verbs of the service, for the HTTP routes and for Python callers alike.

    Wherever a `user_id` may be given, the conversation must be that user's; one that is not raises
    ConversationNotFound, just as one that does not exist. Every verb may raise DatabaseUnavailable.
    Messages are plain dicts: `id`, `conversation_id`, `user_id`, `seq` (int), `created_at` (aware
    datetime, UTC, milliseconds), then the caller's fields in the caller's order.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._turns: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._scope = Scope()

    def of(self, scope: Scope) -> ChatService:
        """Return this service as one tenant's, or one user's: nothing else exists in it."""
        narrowed = copy.copy(self)
        narrowed._scope = scope  # noqa: SLF001  (its own)
        return narrowed

    # -- conversations -----------------------------------------------------------------------------

    @_in_one_call
    async def get_or_create_conversation(
        self,
        user_id: str,
        conversation_id: str | None = None,
        *,
        title: str | None = None,
        metadata: Json | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[Conversation, bool]:
        """Return the user's conversation under this id and False, or a new one and True.

        Title, metadata and expiry are those of a new one; an existing one stays as it is. Raises
        ConversationIdTaken where the id is somebody else's, InvalidRequest for what cannot be stored.
        """
        self._database.require_room()
        _validate(_ID, user_id, "user_id")
        _validate(_TITLE, title, "title")
        if conversation_id is not None:
            _validate(_ID, conversation_id, "id")
        wanted = self._new_conversation(conversation_id, user_id, title, metadata)
        wanted.expires_at = times.whole_ms(expires_at) if expires_at else None
        existing = await self._existing(wanted) if conversation_id is not None else None
        found, created = (existing, False) if existing else await self._create(wanted)
        return _shown(found), created

    def _new_conversation(
        self, conversation_id: str | None, user_id: str, title: str | None, metadata: Json | None
    ) -> Conversation:
        now = times.now()
        return Conversation(
            id=self._scope.key(conversation_id or f"conv_{secrets.token_hex(12)}"),
            user_id=self._scope.owner_of(user_id),
            title=title,
            **self._metadata_fields(metadata),
            created_at=now,
            updated_at=now,
        )

    def _metadata_fields(self, metadata: Json | None) -> Json:
        """Check metadata, and return it with its exact copy where the engine would bend it."""
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict):
            raise _invalid(("metadata",), "must be an object")
        raw = payloads.encode({"metadata": metadata}, keep_exact_copy=False)
        bent = self._database.embedded_engine and payloads.bends(raw)
        return {"metadata": metadata, "exact_metadata": raw if bent else None}

    async def _existing(self, wanted: Conversation) -> Conversation | None:
        """Find what stands under this id; somebody else's is a conflict, not a secret: ids are chosen."""
        found = await Conversation.find_one({"_id": wanted.id})
        if found is None:
            return None
        if found.user_id == NOBODY:
            await self.finish_deletion(Key(wanted.id))
            return None
        if found.user_id != wanted.user_id:
            raise ConversationIdTaken(f"The id {own_id(wanted.id)} is not free; choose another.")
        return found

    async def _create(self, wanted: Conversation, batch: Batch | None = None) -> tuple[Conversation, bool]:
        """Insert a conversation with its first messages; or return what stands there, if it is the same."""
        key, owner = Key(wanted.id), Owner(wanted.user_id)

        async def insert(transaction: Transaction) -> None:
            await wanted.insert(session=transaction.session)
            if batch is not None:
                await self._store(_owned(key, owner), batch, transaction)

        transaction = Transaction()
        try:
            await self._write(key, insert, transaction)
        except DuplicateKeyError:
            # Another request was faster, or our own first attempt was, whose answer was lost.
            existing = await self._existing(wanted)
            if existing is None:
                return await self._create(wanted, batch)
            if batch is not None:
                await self._stored_before(key, owner, batch)
            return existing, transaction.may_have_committed
        return wanted, True

    @_in_one_call
    async def start_conversation(
        self,
        user_id: str,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        metadata: Json | None = None,
        idempotency_key: str | None = None,
        batch: Batch | None = None,
    ) -> Conversation:
        """Create a conversation with its first messages: all of it commits together, or nothing.

        They are given as they are, or as the `batch` that `batch_of` made of them. With a key the request
        may be repeated, and returns the conversation that it made first. Raises what
        `add_messages` raises, IdempotencyConflict where the key made one with other messages.
        """
        self._database.require_room()
        _validate(_ID, user_id, "user_id")
        user_id = self._scope.user_id or user_id
        by_key = f"conv_{_digest(f'{user_id}/{idempotency_key}')}" if idempotency_key is not None else None
        wanted = self._new_conversation(by_key, user_id, None, metadata)
        if messages:
            batch = self.batch_of(messages, idempotency_key=idempotency_key)
        conversation, _ = await self._create(wanted, batch)
        return _shown(conversation)

    @_in_one_call
    async def get_conversation(self, conversation_id: str, user_id: str | None = None) -> Conversation:
        """Return the conversation. Raises ConversationNotFound."""
        return _shown(await self._conversation(*self._named(conversation_id, user_id)))

    @_in_one_call
    async def update_conversation(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        title: str | None = UNSET,
        metadata: Json | None = UNSET,
        expires_at: datetime | None = UNSET,
    ) -> Conversation:
        """Set the title, the expiry, or the metadata as a whole, and return the conversation as it is then.

        What is not given stays as it is; None clears it. Raises ConversationNotFound, InvalidRequest.
        """
        self._database.require_room()
        changes: Json = {}
        if title is not UNSET:
            changes["title"] = _validate(_TITLE, title, "title")
        if metadata is not UNSET:
            changes |= self._metadata_fields(metadata)
        if expires_at is not UNSET:
            changes["expires_at"] = times.whole_ms(expires_at) if expires_at else None
        key, owner = self._named(conversation_id, user_id)
        if not changes:
            return _shown(await self._conversation(key, owner))

        async def update(transaction: Transaction) -> Conversation:
            return await self._lock(transaction, _owned(key, owner), {"$set": changes})

        return _shown(await self._write(key, update))

    @_in_one_call
    async def list_conversations(
        self, user_id: str, *, limit: int | None = None, after: ListPosition | None = None
    ) -> ConversationList:
        """Return a page of the user's conversations, latest activity first, after a position."""
        limit = self._page_items(limit)
        owner = self._scope.owner_of(user_id)
        found: list[Conversation] = []
        if after is not None:
            # Those of the very millisecond at which the page before ended come first, by their ids.
            same_time = {
                "user_id": owner,
                "updated_at": after.updated_at,
                "_id": {"$gt": self._scope.key(after.conversation_id)},
            }
            found = await self._listed(same_time, limit + 1)
        for begin, end in self._list_windows(after):
            if len(found) > limit:
                break
            query = list_query(owner, begin, end)
            found += await self._listed(query, limit + 1 - len(found))
        return ConversationList([_shown(each) for each in found[:limit]], len(found) > limit)

    async def _listed(self, query: Json, limit: int) -> list[Conversation]:
        found = await self._database.read(Conversation, query, sort=_LATEST_FIRST, limit=limit)
        return [_loaded(each) for each in found]

    def _list_windows(self, after: ListPosition | None) -> Iterator[tuple[datetime, datetime]]:
        """Cut the past into windows, newest first: one, or growing ones where a limit saves no reading.

        A clock of another process may be ahead of ours, so the newest window has no end.
        """
        end = after.updated_at if after else _FOREVER
        if not self._database.reads_whole_match:
            yield _BEGINNING, end
            return
        begin, width = min(end, times.now()), _LIST_WINDOW
        while begin > _BEGINNING:
            begin = begin - width if begin - _BEGINNING > width else _BEGINNING
            yield begin, end
            end, width = begin, width * _LIST_WINDOW_GROWTH

    async def delete_conversation(self, conversation_id: str, user_id: str | None = None) -> None:
        """Delete the conversation with all its messages. Raises ConversationNotFound.

        It is gone for everybody at once. A long one then loses its messages batch by batch; should we
        die in between, `finish_deletions` takes it up again.
        """
        key, owner = self._named(conversation_id, user_id)
        await self.remove(key, _owned(key, owner))

    async def remove(
        self,
        key: Key,
        owned: Json,
        also: Callable[[Transaction, Conversation], Awaitable[None]] | None = None,
    ) -> None:
        """Delete a conversation of any tenant, if `owned` matches it; `also` is part of the deletion.

        What `also` writes commits with the moment at which the conversation is gone. Raises
        ConversationNotFound.
        """

        async def begin(transaction: Transaction) -> bool:
            changes = {"$set": {"user_id": NOBODY}}
            try:
                found = await self._lock(transaction, owned, changes)
            except ConversationNotFound:
                if transaction.may_have_committed:
                    return False  # by ourselves, the answer to which was lost; what is left is finished below
                raise
            if also is not None:
                await also(transaction, found)
            if found.message_count <= DELETE_BATCH_ITEMS:
                await self._remove(transaction, key)
            return found.message_count <= DELETE_BATCH_ITEMS

        async with self._database.call():
            gone = await self._write(key, begin)
        if not gone:
            await self.finish_deletion(key)

    @staticmethod
    async def _remove(transaction: Transaction, key: Key) -> None:
        """Delete what is left: the messages and the conversation commit together, so none is orphaned."""
        # Beanie's `delete` forgets the session of its `find`: it must be told again, or it would
        # delete outside of the transaction.
        session = transaction.session
        await Message.find({"conversation_id": key}).delete(session=session)
        await Conversation.find_one({"_id": key}).delete(session=session)

    async def finish_deletion(self, key: Key) -> None:
        """Remove the messages of a conversation that is nobody's, newest first, and then itself."""
        nobodys = {"_id": key, "user_id": NOBODY}
        async with self._database.call():
            found = await Conversation.find_one(nobodys)
        if found is None:
            return
        await self._delete_span(Span(key, 0, found.last_seq), nobodys)

        async def remove(transaction: Transaction) -> None:
            await self._remove(transaction, key)

        async with self._database.call():
            await self._write(key, remove)

    async def finish_deletions(self) -> int:
        """Take up the deletions that a crash or an outage interrupted, of all tenants; return how many."""
        async with self._database.call():
            found = await Conversation.find({"user_id": NOBODY}).to_list()
        for each in found:
            await self.finish_deletion(Key(each.id))
        return len(found)

    # -- appending ---------------------------------------------------------------------------------

    async def add_message(
        self,
        conversation_id: str,
        message: Mapping[str, Any],
        user_id: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Appended:
        """Append one message; see `add_messages`, whose errors then begin at the message itself."""
        self._database.require_room()
        batch = self.batch_of([message], idempotency_key=idempotency_key, field=None)
        return await self.append(conversation_id, batch, user_id)

    async def add_messages(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]],
        user_id: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Appended:
        """Append a batch, whole or not at all, and return what is stored.

        A message has a `role` and whatever else JSON can say; its `id` may be the caller's own. A request
        with a key or with ids may be repeated: it is stored once, and `replayed` then says so. Raises
        ConversationNotFound, InvalidRequest (with the path of each fault) and IdempotencyConflict.
        """
        self._database.require_room()
        batch = self.batch_of(messages, idempotency_key=idempotency_key)
        return await self.append(conversation_id, batch, user_id)

    def batch_of(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        prefixes: Sequence[str] | None = None,
        field: str | None = "messages",
    ) -> Batch:
        """Check messages, name and encode them, for `append`. It waits for nothing, so a thread may do it.

        `prefixes` are those of `Naming`; `field` is what the caller's request calls the batch, and None
        where the request is the one message. Raises InvalidRequest, with the path of each fault.
        """
        places = [()] if field is None else self._places(messages, field)
        return self._incoming(messages, places, Naming(idempotency_key, prefixes))

    def _places(self, messages: Sequence[Any], field: str) -> list[Path]:
        """Return the path of each message of a batch, which is neither empty nor too long."""
        most = self._settings.batch_items_max
        if not 1 <= len(messages) <= most:
            raise _invalid((field,), f"must have 1 to {most} {field}, and has {len(messages)}")
        return [(field, index) for index in range(len(messages))]

    async def append(self, conversation_id: str, batch: Batch, user_id: str | None = None) -> Appended:
        """Append what `batch_of` made; see `add_messages`."""
        self._database.require_room()
        async with self._database.call():
            key, owner = self._named(conversation_id, user_id)
            transaction = Transaction()
            try:
                store = functools.partial(self._store, _owned(key, owner), batch)
                stored = await self._write(key, store, transaction)
            except DuplicateKeyError:
                stored = await self._stored_before(key, owner, batch)
                replayed = not transaction.may_have_committed
            else:
                replayed = False
        metrics.count("replays" if replayed else "appends")
        if not replayed:
            metrics.count("messages_appended", len(stored))
        return Appended(stored, replayed)

    def _incoming(
        self, messages: Sequence[Mapping[str, Any]], places: Sequence[Path], naming: Naming
    ) -> Batch:
        """Check every message, name it, and encode it; nothing is stored unless all of them pass."""
        key_alone = naming.key is not None and naming.prefixes is None
        found = (
            fault
            for each, at in zip(messages, places, strict=True)
            for fault in _faults(each, at, key_alone=key_alone)
        )
        if faults := list(islice(found, FAULTS_MAX + 1)):
            raise InvalidRequest(f"{faults[0].path}: {faults[0].message}.", faults)
        ids, follower = message_ids(messages, naming)
        _refuse_repeated(ids, places)
        encoded = [
            payloads.encode(
                {name: value for name, value in message.items() if name != "id"},
                at,
                keep_exact_copy=self._database.embedded_engine,
            )
            for message, at in zip(messages, places, strict=True)
        ]
        return Batch(list(map(_NewMessage, ids, encoded)), follower)

    async def _store(self, owned: Json, batch: Batch, transaction: Transaction) -> list[bytes]:
        """Take the next seqs and insert: the counters and the messages commit together, or neither."""
        count = len(batch.messages)
        taken = {"$inc": {"last_seq": count, "message_count": count}}
        conversation = await self._lock(transaction, owned, taken)
        first = conversation.last_seq - count + 1
        documents = [
            payloads.splice(_header(conversation, message.id, seq), message.fields)
            for seq, message in enumerate(batch.messages, first)
        ]
        await self._database.insert(Message, documents, transaction.session)
        return documents

    async def _stored_before(self, key: Key, owner: Owner | None, batch: Batch) -> list[bytes]:
        """Return what an earlier request stored under these ids, if it was this very request."""
        await self._conversation(key, owner)
        first = await self._message(key, batch.messages[0].id)
        if first is None:
            raise IdempotencyConflict("Some of these messages are stored already, and some are not.")
        low, count = first["seq"] - 1, len(batch.messages)
        span = Span(key, low, low + count + 1)
        documents = await self._database.read(Message, span.query(), sort=_ASC)
        await payloads.beside(sum(map(len, documents)), lambda: _require_same(batch, documents))
        return documents[:count]

    # -- reading -----------------------------------------------------------------------------------

    @_in_one_call
    async def get_chat_history(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        limit: int | None = None,
        last: int | None = None,
        order: Order = "asc",
        **filters: Unpack[HistoryFilters],
    ) -> History:
        """Return a page of messages, oldest first, or newest first with `order="desc"`.

        `last` asks for the newest so many, oldest first, in place of `limit` and `order`. A page has at
        most `limit` messages, and fewer, with `has_more`, where they are large (`CHAT_PAGE_BYTES_MAX`).
        Raises ConversationNotFound, InvalidRequest.
        """
        count = self._page_items(limit if last is None else last, "limit" if last is None else "last")
        backwards = order == "desc" or last is not None
        span = await self._span(await self._conversation(*self._named(conversation_id, user_id)), filters)
        found, cut = await self._read_page(span, count + 1, backwards)
        page = found[:count]
        edge = page[-1]["seq"] if page else None
        if last is not None:
            page.reverse()
        return History(page, cut or len(found) > count, edge)

    async def stream_chat_history(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        limit: int | None = None,
        order: Order = "asc",
        **filters: Unpack[HistoryFilters],
    ) -> AsyncIterator[list[Json]]:
        """Yield the whole history in parts, each read when it is asked for; memory stays that of a part.

        It ends at the last message that was there when it began. The arguments are those of
        `get_chat_history`, but that `limit` may be any number, or None for all. The first part may be
        empty; errors of the arguments come with it.
        """
        async with self._database.call():
            span = await self._span(await self._conversation(*self._named(conversation_id, user_id)), filters)
        left = limit if limit is not None else span.high - span.low
        wanted = min(left, _FIRST_PART_ITEMS)
        while True:
            async with self._database.call():
                part = await self._read_windows(span, wanted, order == "desc")
            yield _all_public(part)
            left -= len(part)
            if left <= 0 or len(part) < wanted:
                return
            span = span.beyond(_public(part[-1])["seq"], order == "desc")
            wanted = min(left, _part_items(part))

    @_in_one_call
    async def get_message(self, conversation_id: str, message_id: str, user_id: str | None = None) -> Json:
        """Return one message. Raises ConversationNotFound, MessageNotFound."""
        key, owner = self._named(conversation_id, user_id)
        await self._conversation(key, owner)
        found = await self._message(key, message_id)
        if found is None:
            raise _no_message(message_id)
        return found

    async def _message(self, key: Key, message_id: str) -> Json | None:
        found = await self._database.read(Message, {"_id": message_key(key, message_id)})
        return _public(found[0]) if found else None

    async def _span(self, conversation: Conversation, filters: HistoryFilters) -> Span:
        """Turn what was asked for into a range of seqs, bounded on both sides by the conversation's own."""
        low = filters.get("after") or 0
        high = conversation.last_seq
        if (before := filters.get("before")) is not None:
            high = min(high, before - 1)
        span = Span(Key(conversation.id), low, max(low, high), filters.get("role"))
        if (since := filters.get("since")) is not None:
            low = await self._last_seq_before(conversation, times.whole_ms(since))
            span = span.between(low, span.high)
        if (until := filters.get("until")) is not None:
            last = times.whole_ms(until)
            if last < conversation.updated_at:  # else no message is newer
                just_after = last + timedelta(milliseconds=1)
                span = span.between(span.low, await self._last_seq_before(conversation, just_after))
        return span

    async def _last_seq_before(self, conversation: Conversation, time: datetime) -> int:
        """Return the seq below which all messages are older than `time`, and above which none is.

        It exists because `created_at` never decreases along `seq`.
        """
        if time > conversation.updated_at:
            return conversation.last_seq
        newest = await self._time_to_look_until(conversation, time)
        if newest is None:
            return conversation.last_seq
        found = await self._database.read(
            Message, time_query(Key(conversation.id), time, newest), sort=_BY_TIME, limit=1
        )
        return _public(found[0])["seq"] - 1 if found else conversation.last_seq

    async def _time_to_look_until(self, conversation: Conversation, time: datetime) -> datetime | None:
        """Return the time of some message not older than `time` and near the first such, or None."""
        if not self._database.reads_whole_match:
            query = {"conversation_id": conversation.id, "created_at": {"$gte": time}}
            found = await self._database.read(Message, query, sort=[("created_at", ASCENDING)], limit=1)
            return _public(found[0])["created_at"] if found else None
        low, high, newest = 0, conversation.last_seq, None
        while high - low > _HALVING_SEQS or newest is None:
            middle = low + (high - low) // 2
            span = Span(Key(conversation.id), middle, high)
            found_at = await self._read_windows(span, 1, backwards=False)
            if not found_at:
                if middle == low:
                    break
                high = middle
                continue
            message = _public(found_at[0])
            if message["created_at"] >= time:
                high, newest = middle, message["created_at"]
            else:
                low = message["seq"]
            if low >= high:
                break
        return newest

    async def _read_page(self, span: Span, count: int, backwards: bool) -> tuple[list[Json], bool]:
        """Read up to `count` messages; True with them where they were cut short for their size."""
        found: list[Json] = []
        size = 0
        while len(found) < count and span.low < span.high:
            wanted = min(count - len(found), _CHUNK_ITEMS)
            chunk = await self._read_windows(span, wanted, backwards)
            for fits, raw in enumerate(chunk):
                size += len(raw)
                if size > self._settings.page_bytes_max and (found or fits):
                    return found + _all_public(chunk[:fits]), True
            found += _all_public(chunk)
            if len(chunk) < wanted:
                break
            span = span.beyond(found[-1]["seq"], backwards)
        return found, False

    async def _read_windows(
        self, span: Span, count: int, backwards: bool, transaction: Transaction | None = None
    ) -> list[bytes]:
        """Read up to `count` messages in order, in one query, or in windows where a limit saves nothing.

        On the embedded engine a query costs what it matches, so it may match little more than `count`.
        Where deletions, or another role, left nothing in a window, the next is twice as wide, up to
        WINDOW_SEQS_MAX, beyond which a dense stretch behind the hole would cost too much.
        """
        sort = _DESC if backwards else _ASC
        session = transaction.session if transaction else None
        if not self._database.reads_whole_match:
            return await self._database.read(Message, span.query(), sort=sort, limit=count, session=session)
        found: list[bytes] = []
        low, high, width = span.low, span.high, count
        while low < high and len(found) < count:
            if backwards:
                window = span.between(max(low, high - width), high)
            else:
                window = span.between(low, min(high, low + width))
            left = count - len(found)
            found += await self._database.read(
                Message, window.query(), sort=sort, limit=left, session=session
            )
            low, high = (low, window.low) if backwards else (window.high, high)
            width = min(width * 2, max(count, WINDOW_SEQS_MAX))
        return found

    # -- deleting messages -------------------------------------------------------------------------

    @_in_one_call
    async def delete_message(self, conversation_id: str, message_id: str, user_id: str | None = None) -> None:
        """Delete one message; its seq stays empty. Raises ConversationNotFound, MessageNotFound."""
        key, owner = self._named(conversation_id, user_id)

        async def delete(transaction: Transaction) -> None:
            await self._lock(transaction, _owned(key, owner), _ONE_LESS)
            await self._delete_one(transaction, key, message_id)

        transaction = Transaction()
        try:
            await self._write(key, delete, transaction)
        except MessageNotFound:
            if not transaction.may_have_committed:
                raise

    @staticmethod
    async def _delete_one(transaction: Transaction, key: Key, message_id: str) -> None:
        """Delete a message that was uncounted already: both commit together."""
        named = {"_id": message_key(key, message_id)}
        result = await Message.find(named).delete(session=transaction.session)
        if not result or not result.deleted_count:
            raise _no_message(message_id)

    @_in_one_call
    async def pop_message(self, conversation_id: str, user_id: str | None = None) -> Json | None:
        """Delete the newest message and return it, or None where there is none: no two callers get one.

        Not to be repeated when its answer is lost, for it would delete another. Raises ConversationNotFound.
        """
        key, owner = self._named(conversation_id, user_id)
        popped: list[Json] = []

        async def pop(transaction: Transaction) -> Json:
            if transaction.may_have_committed and popped:
                before = popped[-1]
                if await self._message(key, before["id"]) is None:
                    return before  # popped by ourselves, the answer to which was lost
            conversation = await self._lock(transaction, _owned(key, owner), _ONE_LESS)
            span = Span(key, 0, conversation.last_seq)
            found = await self._read_windows(span, 1, backwards=True, transaction=transaction)
            if not found:
                raise MessageNotFound("There are none.")
            popped.append(_public(found[0]))
            await self._delete_one(transaction, key, popped[-1]["id"])
            return popped[-1]

        try:
            return await self._write(key, pop)
        except MessageNotFound:
            return None

    async def delete_messages(
        self, conversation_id: str, user_id: str | None = None, *, after: int = 0
    ) -> int:
        """Delete all messages with a seq above `after`; return how many. Raises ConversationNotFound.

        Up to DELETE_BATCH_ITEMS go at once; more go batch by batch, newest first, so that the history is
        at every moment whole up to some message, also if we die in between. A message that is appended
        meanwhile stays.
        """
        key, owner = self._named(conversation_id, user_id)
        async with self._database.call():
            conversation = await self._conversation(key, owner)
        span = Span(key, min(after, conversation.last_seq), conversation.last_seq)
        return await self._delete_span(span, _owned(key, owner))

    async def _delete_span(self, span: Span, owned: Json) -> int:
        deleted = 0
        for top in range(span.high, span.low, -DELETE_BATCH_ITEMS):
            batch = span.between(top - DELETE_BATCH_ITEMS, top)
            async with self._database.call():
                deleted += await self._write(span.key, functools.partial(self._delete_batch, owned, batch))
        return deleted

    async def _delete_batch(self, owned: Json, batch: Span, transaction: Transaction) -> int:
        """Delete the messages and uncount them: both commit together, so the count is always true."""
        await self._lock(transaction, owned, {})
        result = await Message.find(batch.query()).delete(session=transaction.session)
        count = result.deleted_count if result else 0
        if count:
            await self._lock(transaction, owned, {"$inc": {"message_count": -count}})
        return count

    # -- what the verbs share ----------------------------------------------------------------------

    def _named(self, conversation_id: str, user_id: str | None) -> tuple[Key, Owner | None]:
        """Return what the caller names, as it is in the database: of his own tenant, whatever he says."""
        return self._scope.key(conversation_id), self._scope.owner(user_id)

    async def _conversation(self, key: Key, owner: Owner | None) -> Conversation:
        """Find the conversation; whether it is missing or not yours, the query and the answer are one."""
        found = await self._database.read(Conversation, _owned(key, owner), limit=1)
        if not found:
            raise _no_conversation(key)
        return _loaded(found[0])

    async def _lock(self, transaction: Transaction, owned: Json, changes: Json) -> Conversation:
        """Update the conversation, which locks it until the commit, and return it as it then stands.

        Its `updated_at` moves to now, and never backwards, whatever this process's clock says.
        """
        update = {**changes, "$max": {"updated_at": times.now()}}
        found = await self._database.update(Conversation, owned, update, transaction.session)
        if found is None:
            raise _no_conversation(Key(owned["_id"]))
        return _loaded(found)

    async def _write(
        self,
        key: Key,
        work: Callable[[Transaction], Awaitable[T]],
        transaction: Transaction | None = None,
    ) -> T:
        """Run a transaction when it is this conversation's turn in this process."""
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = asyncio.Lock()
        try:
            async with asyncio.timeout(self._settings.database_timeout_ms / 1000):
                await turn.acquire()
        except TimeoutError as error:
            raise DatabaseUnavailable("Too many writers wait for this conversation.") from error
        try:
            return await self._database.transaction(work, transaction)
        finally:
            turn.release()

    def _page_items(self, items: int | None, name: str = "limit") -> int:
        most = self._settings.page_items_max
        if items is None:
            return min(self._settings.page_items_default, most)
        if not 1 <= items <= most:
            raise _invalid((name,), f"must be 1 to {most}")
        return items


_ASC = [("seq", ASCENDING)]
_DESC = [("seq", DESCENDING)]
_ONE_LESS = {"$inc": {"message_count": -1}}
_LATEST_FIRST = [("updated_at", DESCENDING), ("_id", ASCENDING)]
_BY_TIME = [("created_at", ASCENDING), ("seq", ASCENDING)]


def _part_items(part: Sequence[bytes]) -> int:
    """Return how many messages like these make a part of a stream."""
    typical = max(1, sum(map(len, part)) // len(part))
    return max(1, min(_PART_BYTES // typical, len(part) * _PART_GROWTH, _PART_ITEMS_MAX))


def list_query(owner: Owner, begin: datetime, end: datetime) -> Json:
    """Filter one user's conversations by a window of time, `begin` included, `end` not.

    `begin` is said as what it is greater than, a millisecond before: an inclusive bound at the far end of an
    index that has more fields behind it misses its equals on the embedded engine.
    """
    return {"user_id": owner, "updated_at": {"$gt": begin - timedelta(milliseconds=1), "$lt": end}}


def time_query(key: Key, begin: datetime, end: datetime) -> Json:
    """Filter one conversation's messages by a window of time, both ends included."""
    return {"conversation_id": key, "created_at": {"$gte": begin, "$lte": end}}


def message_ids(messages: Sequence[Mapping[str, Any]], naming: Naming) -> tuple[list[str], str | None]:
    """Name every message: by its own id, or by the key, or by the batch's first own id, or at random.

    So a batch in which any message has an id of its own is as repeatable as one that has a key. With a
    key, the second result is how the id would end that a longer batch had next, to tell the two apart.
    """
    first_own = next((message["id"] for message in messages if "id" in message), None)
    known = naming.key or first_own
    stem = _digest(known) if known else secrets.token_hex(16)
    if naming.prefixes is None:
        prefixes: Sequence[str] = ["idem" if naming.key else "msg"] * len(messages)
        ends = [f"{stem}.{index}" for index in range(len(messages) + 1)]
    else:
        prefixes = naming.prefixes
        ends = [f"{stem}{index:04x}" for index in range(len(messages) + 1)]
    ids = [
        message.get("id", f"{prefix}_{end}")
        for message, prefix, end in zip(messages, prefixes, ends, strict=False)
    ]
    return ids, ends[-1] if naming.key else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _refuse_repeated(ids: Sequence[str], places: Sequence[Path]) -> None:
    seen: set[str] = set()
    for message_id, at in zip(ids, places, strict=True):
        if message_id in seen:
            raise _invalid((*at, "id"), "stands twice in this batch")
        seen.add(message_id)


def _require_same(batch: Batch, documents: Sequence[bytes]) -> None:
    """Raise IdempotencyConflict unless the documents are this very batch, and at most one more behind it."""
    found, count = _all_public(documents), len(batch.messages)
    stored = found[:count]
    if [each["id"] for each in stored] != batch.ids:
        raise IdempotencyConflict(
            "This key or these ids stand for a batch of other messages, or some of it was deleted."
        )
    # A batch stands together, so one that was longer goes on with the very next message.
    if batch.follower and found[count:] and found[count]["id"].partition("_")[2] == batch.follower:
        raise IdempotencyConflict("This key stands for a longer batch.")
    for message, before in zip(batch.messages, stored, strict=True):
        if not payloads.same(_fields(before), payloads.decode(message.fields)):
            raise IdempotencyConflict(f"The message {message.id} is stored with other content.")


def _faults(message: Any, at: Path, *, key_alone: bool) -> list[Fault]:
    """Return what is wrong with a message's own fields; what BSON cannot hold is `payloads`' matter."""
    if not isinstance(message, dict):
        return [Fault(payloads.json_path(at), "must be an object")]
    if isinstance(message, payloads.UnholdableObject):
        return [Fault(payloads.json_path(at), message.why)]
    faults = [
        Fault(payloads.json_path((*at, name)), "is set by the service")
        for name in OWNED_FIELDS
        if name in message
    ]
    if key_alone and "id" in message:
        why = "ids make a request repeatable by themselves; send them or an Idempotency-Key, not both"
        faults.append(Fault(payloads.json_path((*at, "id")), why))
    if "id" in message and not is_id(message["id"]):
        faults.append(Fault(payloads.json_path((*at, "id")), _ID_RULE))
    try:
        MessageFields.model_validate(_outline(message))
    except ValidationError as error:
        faults += faults_of(error, at)
    return faults


def _outline(message: Json) -> Json:
    """Return what a message's model judges: the fields that it knows, without what is inside of them."""
    outline: Json = {}
    for name in _FIELDS:
        if name in message:
            value = message[name]
            kind = type(value)
            if kind is str:
                outline[name] = value if len(value) <= _OUTLINE_CHARS else ""
            else:
                outline[name] = kind() if kind is list or kind is dict else value
    return outline


_FIELDS = tuple(MessageFields.model_fields)
# Longer than any role, and short enough to be looked at as it is.
_OUTLINE_CHARS = 100


def incoming_fault(message: Json) -> Fault | None:
    """Return what is wrong first with a message that has an id, if anything is."""
    faults = _faults(message, (), key_alone=False)
    return faults[0] if faults else None


def faults_of(error: ValidationError, at: Path) -> list[Fault]:
    """Turn Pydantic's errors into ours, one for each place (a union reports each of its members)."""
    faults: dict[str, Fault] = {}
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        steps = [step for step in each["loc"] if not _names_a_union_member(step)]
        path = payloads.json_path((*at, *steps))
        if path in faults:
            message = f"{faults[path].message}, or {each['msg'].lower()}"
            faults[path] = Fault(path, message)
        else:
            faults[path] = Fault(path, each["msg"])
    return list(faults.values())


def _names_a_union_member(step: str | int) -> bool:
    return step in {"str", "list[any]"}


_ID: TypeAdapter[str] = TypeAdapter(Id)
_TITLE: TypeAdapter[str | None] = TypeAdapter(Title | None)
_ID_RULE = "must be 1 to 128 of letters, digits and . _ : @ ~ - (and not . or ..)"


def is_id(value: Any) -> bool:
    """Tell whether this is an id as a conversation, a message or a user may have one."""
    try:
        _ID.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _validate(adapter: TypeAdapter[T], value: Any, name: str) -> T:
    try:
        payloads.check(value, (name,))
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise _invalid((name,), _ID_RULE if adapter is _ID else error.errors()[0]["msg"]) from error


def _invalid(path: Path, why: str) -> InvalidRequest:
    fault = Fault(payloads.json_path(path), why)
    return InvalidRequest(f"{fault.path} {why}.", [fault])


def _no_conversation(key: Key) -> ConversationNotFound:
    return ConversationNotFound(f"No conversation {own_id(key)}.")


def _no_message(message_id: str) -> MessageNotFound:
    return MessageNotFound(f"No message {message_id} in this conversation.")


def _owned(key: Key, owner: Owner | None) -> Json:
    """Filter one conversation, of this owner if one is named, and never one that is being deleted."""
    if owner == NOBODY:
        raise _no_conversation(key)
    return {"_id": key, "user_id": {"$ne": NOBODY} if owner is None else owner}


def _header(conversation: Conversation, message_id: str, seq: int) -> bytes:
    """Encode what the service says of a message; `updated_at` was just moved, and never goes back."""
    return bson.encode(
        {
            "_id": message_key(Key(conversation.id), message_id),
            "conversation_id": conversation.id,
            "user_id": conversation.user_id,
            "seq": seq,
            "created_at": conversation.updated_at,
        }
    )


def _public(raw: bytes) -> Json:
    """Decode a stored message into what callers see: its own id first, the rest in its order."""
    return _all_public([raw])[0]


def _all_public(documents: Sequence[bytes]) -> list[Json]:
    return list(map(public, payloads.decode_all(documents)))


def public(stored: Json) -> Json:
    """Return a stored message as callers see it; it is used up."""
    if "/" in stored["user_id"]:  # a tenant's
        stored["conversation_id"] = own_id(stored["conversation_id"])
        stored["user_id"] = own_id(stored["user_id"])
    return {"id": own_id(stored.pop("_id")), **stored}


def _fields(message: Json) -> Json:
    """Return what the caller said in a message."""
    return {name: value for name, value in message.items() if name not in {"id", *OWNED_FIELDS}}


def _loaded(raw: bytes) -> Conversation:
    conversation: Conversation = Conversation.model_validate(payloads.decode(raw))
    return conversation


def _shown(conversation: Conversation) -> Conversation:
    """Return a conversation as callers see it: plain ids, and metadata in the order in which they came."""
    conversation.id, conversation.user_id = own_id(conversation.id), own_id(conversation.user_id)
    if conversation.exact_metadata is not None:
        conversation.metadata = payloads.decode(conversation.exact_metadata)["metadata"]
    elif conversation.metadata:
        conversation.metadata = payloads.plain(conversation.metadata)
    return conversation
