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

A transaction sees the primary's latest data, which no majority may have yet; a majority read outside of it
may see less, and what a transaction saw that then aborts is guaranteed by nobody. So whatever a transaction
found (a duplicate, an absence) is answered only from a transaction that commits with `majority`, which waits
until what it read is durable, or fails, and then the answer is 503 (`_write`, `_decided`; test_decisions).
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import hmac
import secrets
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, TypeVar, Unpack
from weakref import WeakValueDictionary

import bson
import structlog
from bson.errors import InvalidBSON
from pydantic import TypeAdapter, ValidationError
from pymongo import ASCENDING, DESCENDING
from pymongo.errors import DuplicateKeyError, OperationFailure

from service import metrics, payloads, times
from service.database import DOCUMENT_TOO_LARGE, Budget, Database, Transaction
from service.documents import (
    IDLE,
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
    BatchTooLarge,
    BrokenCounter,
    ChatHistoryError,
    ConversationIdTaken,
    ConversationNotFound,
    DatabaseUnavailable,
    Fault,
    IdempotencyConflict,
    InvalidRequest,
    MalformedDocument,
    MessageNotFound,
)
from service.payloads import Path
from service.roles import Role
from service.scopes import Key, Owner, Scope, message_key, own_id
from service.settings import DELETE_BATCH_ITEMS, MESSAGE_BYTES_MAX, WINDOW_SEQS_MAX, Settings

Json = dict[str, Any]
Order = Literal["asc", "desc"]
P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger(__name__)

# How many messages one read of a page asks an engine for that puts its whole answer together at once.
_CHUNK_ITEMS = 64
# A stream begins with few messages, since nobody knows how large they are, and then aims at the first size;
# a part that turns out larger than the second is cut.
_FIRST_PART_ITEMS = 4
_PART_BYTES = 512 * 1024
_PART_BYTES_MAX = 8 * _PART_BYTES
_PART_GROWTH = 16
_PART_ITEMS_MAX = 1_000
# A time range begins where a search by halves has come this near, and the index of times does the rest.
_HALVING_SEQS = 64
# The list's first window of time on an engine that reads its whole match, and how it grows.
_LIST_WINDOW = timedelta(seconds=1)
_LIST_WINDOW_GROWTH = 8
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)

# The pause between looks at what others are about to change.
_PAUSE_S = 0.005
_PAUSE_S_MAX = 0.25

# What the service's own fields of a message take at most (see MESSAGE_BYTES_MAX).
_HEADER_BYTES_MAX = 1_024
# The type of an element that is a string, as BSON writes it.
_BSON_STRING = 2

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
    """What part of a history is meant: `low` < seq <= `high`, of one role or of all.

    `owner`, where it is known, is whose the messages must be to be shown.
    """

    key: Key
    low: int
    high: int
    role: Role | None = None
    owner: str | None = None

    def query(self) -> Json:
        """Say it as a filter that one index serves, bounded on both sides."""
        query: Json = {"conversation_id": self.key}
        if self.role is not None:
            query["role"] = self.role
        query["seq"] = {"$gt": self.low, "$lte": self.high}
        return query

    def between(self, low: int, high: int) -> Span:
        """Return the part of it that lies in `low` < seq <= `high`."""
        return replace(self, low=max(low, self.low), high=min(high, self.high))

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
    """A page of conversations, latest activity first, and whether any follow.

    `left_out` are the ids of those within the page that cannot be read; `edge` is where the page ends.
    """

    conversations: list[Conversation]
    has_more: bool
    edge: ListPosition | None
    left_out: Sequence[str] = ()

    @property
    def next(self) -> ListPosition | None:
        """The position to continue from, or None where nothing follows."""
        return self.edge if self.has_more else None


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
        self._turns: WeakValueDictionary[tuple[Key, Owner | None], asyncio.Lock] = WeakValueDictionary()
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
        conversation = Conversation(
            id=self._scope.key(conversation_id or f"conv_{secrets.token_hex(12)}"),
            user_id=self._scope.owner_of(user_id),
            title=title,
            **self._metadata_fields(metadata),
            created_at=now,
            updated_at=now,
        )
        refuse_oversize(conversation, "metadata")
        return conversation

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
        """Find the user's own conversation under this id.

        This is a majority read, so what it finds is durable. That the id is free or somebody else's may have
        changed since; the insert finds that out.
        """
        found = await Conversation.find_one({"_id": wanted.id})
        return found if found is not None and found.user_id == wanted.user_id else None

    async def _create(self, wanted: Conversation, batch: Batch | None = None) -> tuple[Conversation, bool]:
        """Insert a conversation with its first messages; or return what stands there, if it is the same."""
        key, owner = Key(wanted.id), Owner(wanted.user_id)

        async def insert(transaction: Transaction) -> None:
            await wanted.insert(session=transaction.session)
            if batch is not None:
                await self._store(_owned(key, owner), batch, transaction)

        transaction, pause_s = Transaction(), _PAUSE_S
        while True:  # until the deadline of the call
            try:
                await self._write(key, owner, insert, transaction)
            except DuplicateKeyError as error:
                # Another request was faster, or our own first attempt was, whose answer was lost.
                if "writeErrors" in (error.details or {}):
                    # The conversation was inserted, and its messages were not: they are older than it.
                    raise _broken_counter(key) from error
                existing = await self._decided(functools.partial(self._taken_id, wanted, batch))
            else:
                return wanted, True
            if existing is not None and existing.user_id != NOBODY:
                return existing, transaction.may_have_committed
            if existing is not None and not await self.finish_deletion(key):
                raise _id_taken(key)
            # It was deleted between the two transactions, or is now.
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    async def _taken_id(
        self, wanted: Conversation, batch: Batch | None, transaction: Transaction
    ) -> Conversation | None:
        """Look what stands under an id that was just taken, in a transaction, where the conflict was seen.

        Returns the user's own conversation, or one of NOBODY, or None; somebody else's is a conflict, not a
        secret, for ids are chosen.
        """
        key, owner = Key(wanted.id), Owner(wanted.user_id)
        found = await self._database.read(Conversation, {"_id": key}, limit=1, session=transaction.session)
        if not found:
            return None
        existing = _loaded(found[0])
        ours = existing.user_id == owner
        if ours and batch and await self._stored_before(key, owner, batch, transaction) is None:
            # They were stored together with the conversation, and are gone.
            raise IdempotencyConflict("This key stands for messages that were deleted.")
        if existing.user_id not in {owner, NOBODY}:
            raise _id_taken(key)
        return existing

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
        by_key = None
        if idempotency_key is not None:
            by_key = await self._id_by_key(self._scope.owner_of(user_id), idempotency_key)
        wanted = self._new_conversation(by_key, user_id, None, metadata)
        if messages:
            batch = self.batch_of(messages, idempotency_key=idempotency_key)
        conversation, _ = await self._create(wanted, batch)
        return _shown(conversation)

    async def _id_by_key(self, owner: Owner, idempotency_key: str) -> str:
        """Return the id that the owner's key stands for.

        It is made with a secret. Otherwise another user could compute it, take it first, and find out by a
        409 which keys the owner has used. Version 0.1.0 made it without one, so what the owner's key stands
        for since then is looked for first, or a retry across the upgrade would make a second conversation.
        """
        before = f"conv_{_digest(f'{own_id(owner)}/{idempotency_key}')}"
        named = {"_id": self._scope.key(before), "user_id": owner}
        if await self._database.read(Conversation, named, limit=1, fields=["_id"]):
            return before
        said = f"{owner}/{idempotency_key}".encode()
        return f"conv_{hmac.new(await self._database.secret(), said, 'sha256').hexdigest()[:32]}"

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

        given = "title" if metadata is UNSET else "metadata"

        async def update(transaction: Transaction) -> Conversation:
            changed = await self._lock(transaction, _owned(key, owner), {"$set": changes})
            refuse_oversize(changed, given)
            return changed

        try:
            return _shown(await self._write(key, owner, update))
        except OperationFailure as error:
            if error.code in DOCUMENT_TOO_LARGE:
                raise _oversize(given) from error
            raise

    @_in_one_call
    async def list_conversations(
        self, user_id: str, *, limit: int | None = None, after: ListPosition | None = None
    ) -> ConversationList:
        """Return a page of the user's conversations, latest activity first, after a position.

        It has at most `limit`, and fewer, with `has_more`, where they are large (`CHAT_PAGE_BYTES_MAX`). A
        conversation that is not well formed is left out and logged, so that the others can be read.
        """
        limit = self._page_items(limit)
        owner = self._scope.owner_of(user_id)
        budget = Budget(self._settings.page_bytes_max)
        found: list[Conversation | ListPosition] = []
        if after is not None:
            # Those of the very millisecond at which the page before ended come first, by their ids.
            same_time = {
                "user_id": owner,
                "updated_at": after.updated_at,
                "_id": {"$gt": self._scope.key(after.conversation_id)},
            }
            found = await self._listed(same_time, limit + 1, budget)
        for begin, end in self._list_windows(after):
            if len(found) > limit or budget.spent:
                break
            query = list_query(owner, begin, end)
            found += await self._listed(query, limit + 1 - len(found), budget)
        page = found[:limit]
        return ConversationList(
            [_shown(each) for each in page if isinstance(each, Conversation)],
            len(found) > limit or budget.spent,
            _place(page[-1]) if page else None,
            [each.conversation_id for each in page if isinstance(each, ListPosition)],
        )

    async def _listed(self, query: Json, limit: int, budget: Budget) -> list[Conversation | ListPosition]:
        """Read conversations, and only the position of each that is not well formed."""
        found = await self._database.read(Conversation, query, sort=_LATEST_FIRST, limit=limit, budget=budget)
        return [_loaded_or_place(each) for each in found]

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
        also: Callable[[Transaction, int], Awaitable[None]] | None = None,
    ) -> None:
        """Delete a conversation of any tenant, if `owned` matches it; `also` is part of the deletion.

        What `also` writes, which is told how many messages there are, commits with the moment at which the
        conversation is gone. One that is not well formed is deleted like any other. Raises
        ConversationNotFound.
        """

        async def begin(most: int, transaction: Transaction) -> bool:
            changes = {"$set": {"user_id": NOBODY, "importing": None}}
            try:
                found = payloads.decode_anything(await self._locked(transaction, owned, changes))
            except ConversationNotFound:
                if transaction.may_have_committed:
                    return False  # by ourselves, the answer to which was lost; what is left is finished below
                raise
            count = found.get("message_count")
            if also is not None:
                await also(transaction, count if isinstance(count, int) else 0)
            at_once = isinstance(count, int) and count <= most
            if at_once:
                await self._remove(transaction, key)
            return at_once

        try:
            async with self._database.call():
                gone = await self._write(key, _owner_of(owned), functools.partial(begin, DELETE_BATCH_ITEMS))
        except BatchTooLarge:  # few messages, but large: it is gone first, and they go in smaller parts
            async with self._database.call():
                gone = await self._write(key, _owner_of(owned), functools.partial(begin, -1))
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

    async def finish_deletion(self, key: Key) -> bool:
        """Remove the messages of a conversation that is nobody's, newest first, and then itself.

        Returns False for one that is being imported, and whose import had activity lately: that one stays. An
        import without activity was interrupted, and goes the way of a deletion.
        """
        async with self._database.call():
            try:
                found = await self._write(key, Owner(NOBODY), functools.partial(self._take_up, key))
            except ConversationNotFound:
                return True  # somebody else has finished it
        if found is None:
            return False
        deleting = {"_id": key, "user_id": NOBODY, "importing": None}
        # Each step asks anew whether it is still this deletion. Another process may finish it meanwhile, and
        # somebody may take the id that is then free.
        try:
            # One that is not well formed has no counter to go by (`found` is 0), so all of it goes at once.
            await self._delete_span(Span(key, 0, found), deleting)

            async def remove(transaction: Transaction) -> None:
                await self._locked(transaction, deleting, {})
                await self._remove(transaction, key)

            async with self._database.call():
                await self._write(key, Owner(NOBODY), remove)
        except ConversationNotFound:
            pass
        return True

    async def _take_up(self, key: Key, transaction: Transaction) -> int | None:
        """Return the `last_seq` of a conversation whose deletion is to be finished, 0 where it has none.

        It is None for an import that is going on.
        """
        named = {"_id": key, "user_id": NOBODY}
        found = await self._database.read(Conversation, named, limit=1, session=transaction.session)
        if not found:
            raise _no_conversation(key)
        fields = payloads.decode_anything(found[0])
        last_seq, time = fields.get("last_seq"), fields.get("updated_at")
        if fields.get("importing") is not None:
            if isinstance(time, datetime) and times.now() - time < IDLE:
                return None
            # From now on the next batch of that import, should there be one, finds that it has lost the id.
            await self._locked(transaction, named, {"$set": {"importing": None}})
        return last_seq if isinstance(last_seq, int) else 0

    async def finish_deletions(self) -> int:
        """Take up the deletions and imports that a crash or an outage interrupted, of all tenants.

        Returns how many there were; an import that is going on is none of them.
        """
        async with self._database.call():
            # By their ids alone, for what they hold may be large.
            found = await self._database.read(Conversation, {"user_id": NOBODY}, fields=["_id"])
        ids = [payloads.decode_anything(each)["_id"] for each in found]
        return await one_by_one(self._database, "deletion_not_finished", ids, self.finish_deletion)

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
            stored, replayed = await self._store_once(key, owner, batch)
        metrics.count("replays" if replayed else "appends")
        if not replayed:
            metrics.count("messages_appended", len(stored))
        return Appended(stored, replayed)

    async def _store_once(self, key: Key, owner: Owner | None, batch: Batch) -> tuple[list[bytes], bool]:
        """Store a batch, or return what an earlier request stored and True."""
        transaction, pause_s = Transaction(), _PAUSE_S
        store = functools.partial(self._store, _owned(key, owner), batch)
        while True:  # until the deadline of the call
            try:
                return await self._write(key, owner, store, transaction), False
            except DuplicateKeyError as error:
                if _is_broken_counter(error):
                    raise _broken_counter(key) from error
                # One round trip more than reads outside of a transaction, at a replay only.
                before = await self._decided(functools.partial(self._stored_before, key, owner, batch))
            if before is not None:
                return before, not transaction.may_have_committed
            # It was deleted between the two transactions, or a lost primary took it: the ids are free.
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

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

    async def _stored_before(
        self, key: Key, owner: Owner | None, batch: Batch, transaction: Transaction
    ) -> list[bytes] | None:
        """Return what an earlier request stored under these ids, if it was this very request, or None.

        It looks in a transaction, since the duplicate was seen in one: the message may be committed on the
        primary, and a majority read not show it yet.
        """
        conversation = await self._conversation(key, owner, transaction)
        first = await self._message(conversation, batch.messages[0].id, transaction)
        if first is None:
            ids = [message_key(key, each) for each in batch.ids]
            named = {"_id": {"$in": ids}, "conversation_id": key}
            others = await self._database.read(
                Message, named, session=transaction.session, fields=["user_id"]
            )
            if not others:
                return None
            if any(not _is_of(conversation.user_id, each) for each in others):
                raise _broken_counter(key)
            raise IdempotencyConflict("Some of these messages are stored already, and some are not.")
        low, count = first["seq"] - 1, len(batch.messages)
        span = Span(key, low, low + count + 1)
        # What stands there may be of any size: no more is read than this batch could take, twice where the
        # engine keeps an exact copy, and the next message, whatever its size.
        size = sum(len(message.fields) for message in batch.messages)
        budget = Budget(2 * size + (count + 1) * _HEADER_BYTES_MAX + MESSAGE_BYTES_MAX)
        documents = await self._database.read(
            Message, span.query(), sort=_ASC, session=transaction.session, budget=budget
        )
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
            budget = Budget(_PART_BYTES_MAX)
            async with self._database.call():
                part = await self._read_windows(span, wanted, order == "desc", budget=budget)
            yield _all_public(part)
            left -= len(part)
            if left <= 0 or (len(part) < wanted and not budget.spent):
                return
            span = span.beyond(_public(part[-1])["seq"], order == "desc")
            wanted = min(left, _part_items(part))

    @_in_one_call
    async def get_message(self, conversation_id: str, message_id: str, user_id: str | None = None) -> Json:
        """Return one message. Raises ConversationNotFound, MessageNotFound."""
        key, owner = self._named(conversation_id, user_id)
        # A majority read: what is not durable yet is not shown, and that it is missing is true until then.
        found = await self._message(await self._conversation(key, owner), message_id)
        if found is None:
            raise _no_message(message_id)
        return found

    async def _message(
        self, conversation: Conversation, message_id: str, transaction: Transaction | None = None
    ) -> Json | None:
        """Find a message of this conversation and of its owner.

        What an interrupted import left under the same conversation id is nobody's to read. The embedded
        engine is asked by `_id` alone, which begins with the conversation's own: each further field of the
        filter costs it more than the find (1.2 ms become 4 and 4.6), and the owner is looked at here.
        """
        key = Key(conversation.id)
        named = {"_id": message_key(key, message_id)}
        if not self._database.embedded_engine:
            named |= {"conversation_id": key, "user_id": conversation.user_id}
        session = transaction.session if transaction else None
        found = await self._database.read(Message, named, limit=1, session=session)
        return _public(found[0]) if found and _is_of(conversation.user_id, found[0]) else None

    async def _span(self, conversation: Conversation, filters: HistoryFilters) -> Span:
        """Turn what was asked for into a range of seqs, bounded on both sides by the conversation's own."""
        low = filters.get("after") or 0
        high = conversation.last_seq
        if (before := filters.get("before")) is not None:
            high = min(high, before - 1)
        role, owner = filters.get("role"), conversation.user_id
        span = Span(Key(conversation.id), low, max(low, high), role, owner)
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
        budget = Budget(self._settings.page_bytes_max)
        found: list[Json] = []
        while len(found) < count and span.low < span.high:
            wanted = count - len(found)
            if self._database.reads_whole_match:
                wanted = min(wanted, _CHUNK_ITEMS)
            chunk = await self._read_windows(span, wanted, backwards, budget=budget)
            found += _all_public(chunk)
            if len(chunk) < wanted or budget.spent:
                break
            span = span.beyond(found[-1]["seq"], backwards)
        return found, budget.spent

    async def _read_windows(
        self,
        span: Span,
        count: int,
        backwards: bool,
        transaction: Transaction | None = None,
        budget: Budget | None = None,
    ) -> list[bytes]:
        """Read up to `count` messages in order, in one query, or in windows where a limit saves nothing.

        On the embedded engine a query costs what it matches, so it may match little more than `count`.
        Where deletions, or another role, left nothing in a window, the next is twice as wide, up to
        WINDOW_SEQS_MAX, beyond which a dense stretch behind the hole would cost too much.
        """
        sort = _DESC if backwards else _ASC
        session = transaction.session if transaction else None
        if not self._database.reads_whole_match:
            query = span.query() if span.owner is None else {**span.query(), "user_id": span.owner}
            return await self._database.read(
                Message, query, sort=sort, limit=count, session=session, budget=budget
            )
        found: list[bytes] = []
        low, high, width = span.low, span.high, count
        while low < high and len(found) < count and not (budget and budget.spent):
            if backwards:
                window = span.between(max(low, high - width), high)
            else:
                window = span.between(low, min(high, low + width))
            left = count - len(found)
            read = await self._database.read(
                Message, window.query(), sort=sort, limit=left, session=session, budget=budget
            )
            # Not in the filter: with one more field this engine reads the whole conversation (10 ms become
            # 460 of 5,000 messages). A seq is unique, so up to `last_seq` there is nobody else's anyway.
            found += read if span.owner is None else _of_owner(span.key, span.owner, read)
            low, high = (low, window.low) if backwards else (window.high, high)
            width = min(width * 2, max(count, WINDOW_SEQS_MAX))
        return found

    # -- deleting messages -------------------------------------------------------------------------

    @_in_one_call
    async def delete_message(self, conversation_id: str, message_id: str, user_id: str | None = None) -> None:
        """Delete one message; its seq stays empty. Raises ConversationNotFound, MessageNotFound."""
        key, owner = self._named(conversation_id, user_id)

        async def delete(transaction: Transaction) -> None:
            conversation = await self._lock(transaction, _owned(key, owner), _ONE_LESS)
            await self._delete_one(transaction, conversation, message_id)

        transaction = Transaction()
        while True:  # until the deadline of the call
            try:
                return await self._write(key, owner, delete, transaction)
            except MessageNotFound:
                # That transaction had counted the message out, so it could not commit; this one can.
                if not await self._decided(functools.partial(self._has, key, owner, message_id)):
                    if transaction.may_have_committed:
                        return None  # deleted by ourselves, the answer to which was lost
                    raise
            await asyncio.sleep(_PAUSE_S_MAX)  # it is back: stored meanwhile, or a lost primary took the rest

    async def _has(
        self, key: Key, owner: Owner | None, message_id: str | None, transaction: Transaction
    ) -> bool:
        """Tell whether there is this message, or any."""
        conversation = await self._conversation(key, owner, transaction)
        if message_id is not None:
            return await self._message(conversation, message_id, transaction) is not None
        span = Span(key, 0, conversation.last_seq, owner=conversation.user_id)
        return bool(await self._read_windows(span, 1, backwards=True, transaction=transaction))

    @staticmethod
    async def _delete_one(transaction: Transaction, conversation: Conversation, message_id: str) -> None:
        """Delete a message that was uncounted already: both commit together."""
        key = Key(conversation.id)
        named = {
            "_id": message_key(key, message_id),
            "conversation_id": key,
            "user_id": conversation.user_id,
        }
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
        in_doubt: list[Json] = []

        async def pop(transaction: Transaction) -> Json:
            if transaction.may_have_committed and popped:
                # It is reset, so that it says whether the run just before this one may have committed.
                in_doubt.append(popped[-1])
                transaction.may_have_committed = False
            for before in in_doubt:
                # Asked in this transaction: a majority read may still show the message that was popped, and
                # the next would then go in its place.
                if not await self._has(key, owner, before["id"], transaction):
                    transaction.wrote = False
                    return before  # popped by ourselves, the answer to which was lost
            conversation = await self._lock(transaction, _owned(key, owner), _ONE_LESS)
            span = Span(key, 0, conversation.last_seq, owner=conversation.user_id)
            found = await self._read_windows(span, 1, backwards=True, transaction=transaction)
            if not found:
                raise MessageNotFound("There are none.")
            popped.append(_public(found[0]))
            await self._delete_one(transaction, conversation, popped[-1]["id"])
            return popped[-1]

        transaction = Transaction()
        while True:  # until the deadline of the call
            try:
                return await self._write(key, owner, pop, transaction)
            except MessageNotFound:
                # That transaction had counted a message out, so it could not commit; this one can.
                if not await self._decided(functools.partial(self._has, key, owner, None)):
                    return None
            await asyncio.sleep(_PAUSE_S_MAX)  # one was appended meanwhile

    async def delete_messages(
        self, conversation_id: str, user_id: str | None = None, *, after: int = 0
    ) -> int:
        """Delete all messages with a seq above `after`; return how many. Raises ConversationNotFound.

        Up to DELETE_BATCH_ITEMS go at once; more go batch by batch, newest first, so that the history is
        at every moment whole up to some message, also if we die in between. A message that is appended
        meanwhile stays.
        """
        key, owner = self._named(conversation_id, user_id)
        # In a transaction: an older view would have a lower `last_seq`, and messages beyond it would stay.
        async with self._database.call():
            conversation = await self._decided(functools.partial(self._conversation, key, owner))
        span = Span(key, min(after, conversation.last_seq), conversation.last_seq)
        return await self._delete_span(span, _owned(key, owner))

    async def _delete_span(self, span: Span, owned: Json) -> int:
        deleted, top, width = 0, span.high, DELETE_BATCH_ITEMS
        while top > span.low:
            batch = span.between(top - width, top)
            counts: list[int] = []
            try:
                async with self._database.call():
                    work = functools.partial(self._delete_batch, owned, batch, counts)
                    deleted += await self._write(span.key, _owner_of(owned), work)
            except BatchTooLarge:
                if width == 1:
                    raise
                width //= 2  # large messages: the transaction must be smaller
                continue
            top -= width
        return deleted

    async def _delete_batch(
        self, owned: Json, batch: Span, counts: list[int], transaction: Transaction
    ) -> int:
        """Delete the messages and uncount them: both commit together, so the count is always true.

        `counts` remembers what each run deleted: where nothing is left for this one, an earlier one whose
        answer was lost has committed, for these messages are below `last_seq` and do not come back.
        """
        await self._locked(transaction, owned, {})
        result = await Message.find(batch.query()).delete(session=transaction.session)
        count = result.deleted_count if result else 0
        if count:
            await self._lock(transaction, owned, {"$inc": {"message_count": -count}})
        elif counts and transaction.may_have_committed:
            return max(counts)
        counts.append(count)
        return count

    # -- what the verbs share ----------------------------------------------------------------------

    def _named(self, conversation_id: str, user_id: str | None) -> tuple[Key, Owner | None]:
        """Return what the caller names, as it is in the database: of his own tenant, whatever he says."""
        return self._scope.key(conversation_id), self._scope.owner(user_id)

    async def _conversation(
        self, key: Key, owner: Owner | None, transaction: Transaction | None = None
    ) -> Conversation:
        """Find the conversation; whether it is missing or not yours, the query and the answer are one.

        Without a transaction it is a majority read, for verbs that read: what they show is durable, and what
        they miss was not acknowledged. Verbs that write ask in a transaction.
        """
        session = transaction.session if transaction else None
        found = await self._database.read(Conversation, _owned(key, owner), limit=1, session=session)
        if not found:
            raise _no_conversation(key)
        return _loaded(found[0])

    async def _lock(self, transaction: Transaction, owned: Json, changes: Json) -> Conversation:
        """Update the conversation, which locks it until the commit, and return it as it then stands.

        Its `updated_at` moves to now, and never backwards, whatever this process's clock says.
        """
        return _loaded(await self._locked(transaction, owned, changes))

    async def _locked(self, transaction: Transaction, owned: Json, changes: Json) -> bytes:
        """Do the same, and return the conversation undecoded, well formed or not."""
        update = {**changes, "$max": {"updated_at": times.now()}}
        found = await self._database.update(Conversation, owned, update, transaction.session)
        if found is None:
            raise _no_conversation(Key(owned["_id"]))
        return found

    async def _write(
        self,
        key: Key,
        owner: Owner | None,
        work: Callable[[Transaction], Awaitable[T]],
        transaction: Transaction | None = None,
    ) -> T:
        """Run a transaction when it is this caller's turn at the conversation in this process.

        Callers who name different owners do not wait for each other, because only one of them can be right:
        the others are refused without waiting, and keep nobody waiting. A caller who names no owner may
        collide with one who does; the database then runs one of the two again.

        Where the conversation is not found, the first statement has changed nothing, and the transaction is
        committed all the same: the commit waits until what it read is durable. A conversation whose deletion
        a lost primary would undo is thus a 503, and no 404 after which nobody would delete it again.
        """

        async def conclude(transaction: Transaction) -> T | ConversationNotFound:
            try:
                return await work(transaction)
            except ConversationNotFound as error:
                transaction.wrote = False
                return error

        turn = self._turns.get((key, owner))
        if turn is None:
            turn = self._turns[key, owner] = asyncio.Lock()
        try:
            async with asyncio.timeout(self._settings.database_timeout_ms / 1000):
                await turn.acquire()
        except TimeoutError as error:
            raise DatabaseUnavailable("Too many writers wait for this conversation.") from error
        try:
            result = await self._database.transaction(conclude, transaction)
        finally:
            turn.release()
        if isinstance(result, ConversationNotFound):
            raise result
        return result

    async def _decided(self, look: Callable[[Transaction], Awaitable[T]]) -> T:
        """Look in a transaction that commits with `majority`, and return or raise what was found.

        For what another transaction found, and could not commit. If what this one read does not become
        durable in time, nobody can tell, and that is the answer (DatabaseUnavailable).
        """

        async def conclude(transaction: Transaction) -> T | ChatHistoryError:
            transaction.wrote = False
            try:
                return await look(transaction)
            except _FINDINGS as error:
                return error

        result = await self._database.transaction(conclude)
        if isinstance(result, ChatHistoryError):
            raise result
        return result

    def _page_items(self, items: int | None, name: str = "limit") -> int:
        most = self._settings.page_items_max
        if items is None:
            return min(self._settings.page_items_default, most)
        if not 1 <= items <= most:
            raise _invalid((name,), f"must be 1 to {most}")
        return items


# What a look may find, and raise.
_FINDINGS = (BrokenCounter, ConversationIdTaken, ConversationNotFound, IdempotencyConflict)
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


def refuse_oversize(conversation: Conversation, given: str) -> None:
    """Refuse a conversation whose title and metadata together leave no room for what the service says of it.

    Each may be within its own limit. `given` is the field that a caller can make smaller.
    """
    held = {name: getattr(conversation, name) for name in ("title", "metadata", "exact_metadata")}
    if len(bson.encode(held)) > MESSAGE_BYTES_MAX:
        raise _oversize(given)


def _oversize(given: str) -> InvalidRequest:
    return _invalid(
        (given,), f"makes title and metadata together larger than {MESSAGE_BYTES_MAX} bytes as BSON"
    )


def _invalid(path: Path, why: str) -> InvalidRequest:
    fault = Fault(payloads.json_path(path), why)
    return InvalidRequest(f"{fault.path} {why}.", [fault])


def _no_conversation(key: Key) -> ConversationNotFound:
    return ConversationNotFound(f"No conversation {own_id(key)}.")


def _id_taken(key: Key) -> ConversationIdTaken:
    return ConversationIdTaken(f"The id {own_id(key)} is not free; choose another.")


def _is_broken_counter(error: DuplicateKeyError) -> bool:
    """Tell a `seq` that is taken from an id that is taken, by the index that the server names.

    Only the second is a replay: a transaction that holds the conversation takes seqs that nobody has.
    """
    details = error.details or {}
    for each in details.get("writeErrors") or [details]:
        if each.get("code") == 11000:
            pattern = each.get("keyPattern")
            return "seq" in pattern if pattern else "conversation_id_1_seq_1" in str(each.get("errmsg"))
    return "conversation_id_1_seq_1" in str(error)


def _broken_counter(key: Key) -> BrokenCounter:
    return BrokenCounter(
        f"Messages that the conversation {own_id(key)} does not count stand where its next one belongs, left "
        "by an import that was interrupted or by a change made by hand. Nothing was stored. "
        "`chat-history verify` shows them, and `chat-history verify --repair` mends it; or use another "
        "conversation."
    )


_ID_ELEMENT = b"\x02_id\0"


def _of_owner(key: Key, owner: str, documents: Sequence[bytes]) -> list[bytes]:
    """Return those of a conversation's stored messages that say that they are this user's.

    The service writes `_id`, `conversation_id` and `user_id` first. So all messages of one conversation have
    the same bytes behind the `_id`, and to compare these costs less than to decode them.
    """
    expected = bson.encode({"conversation_id": key, "user_id": owner})[4:-1]
    size = 4 + len(_ID_ELEMENT)  # where the length of the `_id` stands, in four bytes
    text = size + 4
    return [
        raw
        for raw in documents
        if (
            raw.startswith(_ID_ELEMENT, 4)
            and raw.startswith(expected, text + int.from_bytes(raw[size:text], "little"))
        )
        or _is_of(owner, raw)
    ]


def _is_of(owner: str, raw: bytes) -> bool:
    """Tell whether a stored message says that it is this user's, without decoding what it says beside that.

    Only its own field counts: what a caller wrote into a message may have the same name, and the same bytes.
    """
    at = 4
    while raw[at] == _BSON_STRING:  # as are all fields that the service writes before this one
        end = raw.index(0, at)
        size = int.from_bytes(raw[end + 1 : end + 5], "little")
        if raw[at + 1 : end] == b"user_id":
            return raw[end + 5 : end + 4 + size] == owner.encode()
        at = end + 5 + size
    return payloads.decode_anything(raw).get("user_id") == owner  # made by hand, in another order


def _no_message(message_id: str) -> MessageNotFound:
    return MessageNotFound(f"No message {message_id} in this conversation.")


def _owned(key: Key, owner: Owner | None) -> Json:
    """Filter one conversation, of this owner if one is named, and never one that is being deleted."""
    if owner == NOBODY:
        raise _no_conversation(key)
    return {"_id": key, "user_id": {"$ne": NOBODY} if owner is None else owner}


def _owner_of(owned: Json) -> Owner | None:
    """Return the owner whom such a filter names, or None where it takes any."""
    return Owner(owned["user_id"]) if isinstance(owned["user_id"], str) else None


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
    try:
        return list(map(public, payloads.decode_all(documents)))
    except (AttributeError, InvalidBSON, KeyError, TypeError) as error:
        raise MalformedDocument(f"A message of this conversation is not well formed. {_VERIFY}") from error


def public(stored: Json) -> Json:
    """Return a stored message as callers see it; it is used up."""
    if "/" in stored["user_id"]:  # a tenant's
        stored["conversation_id"] = own_id(stored["conversation_id"])
        stored["user_id"] = own_id(stored["user_id"])
    return {"id": own_id(stored.pop("_id")), **stored}


def _fields(message: Json) -> Json:
    """Return what the caller said in a message."""
    return {name: value for name, value in message.items() if name not in {"id", *OWNED_FIELDS}}


_VERIFY = "`chat-history verify` names it; an operator must mend or remove it."


def _loaded(raw: bytes) -> Conversation:
    try:
        conversation: Conversation = Conversation.model_validate(payloads.decode(raw))
    except (InvalidBSON, ValidationError) as error:
        raise MalformedDocument(f"The stored conversation is not well formed. {_VERIFY}") from error
    return conversation


def _loaded_or_place(raw: bytes) -> Conversation | ListPosition:
    """Return a conversation, or only where it stands in a list if it is not well formed, and log that."""
    try:
        return _loaded(raw)
    except MalformedDocument as error:
        fields = payloads.decode_anything(raw)
        log.error("document_malformed", id=shown_id(fields["_id"]), error=type(error.__cause__).__name__)
        time = fields.get("updated_at")
        return ListPosition(time if isinstance(time, datetime) else _BEGINNING, own_id(str(fields["_id"])))


def _place(listed: Conversation | ListPosition) -> ListPosition:
    if isinstance(listed, ListPosition):
        return listed
    return ListPosition(listed.updated_at, own_id(listed.id))


def shown_id(value: Any) -> str:
    """Return an id that somebody may have made by hand as it can be logged and printed."""
    plain = isinstance(value, str | int | bson.ObjectId)
    return str(value)[:200] if plain else f"(a {type(value).__name__})"


async def one_by_one(
    database: Database, failed: str, documents: Iterable[T], work: Callable[[T], Awaitable[object]]
) -> int:
    """Do the work for each document, or id, by itself, and return for how many it was done.

    Work that returns False had nothing to do. A document whose work fails is logged as `failed`, with its id
    and the error's type, and does not stop the rest; only a database that is away does.
    """
    done = 0
    for each in documents:
        try:
            done += await work(each) is not False
        except Exception as error:  # whatever is wrong with one is no reason to leave the others
            key = payloads.decode_anything(each)["_id"] if isinstance(each, bytes) else each
            log.error(failed, id=shown_id(key), error=type(error).__name__)
            if isinstance(error, DatabaseUnavailable) and not await database.is_ready():
                raise
    return done


def _shown(conversation: Conversation) -> Conversation:
    """Return a conversation as callers see it: plain ids, and metadata in the order in which they came."""
    conversation.id, conversation.user_id = own_id(conversation.id), own_id(conversation.user_id)
    if conversation.exact_metadata is not None:
        conversation.metadata = payloads.decode(conversation.exact_metadata)["metadata"]
    elif conversation.metadata:
        conversation.metadata = payloads.plain(conversation.metadata)
    return conversation
