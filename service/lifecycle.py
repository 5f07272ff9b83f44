"""What becomes of a user's data as a whole: erased, exported, imported; and of conversations that expire.

All of it can be interrupted anywhere and taken up again:

- an erasure counts each conversation in the transaction in which it is gone, in a document that ends with it;
- an export says how many it had in its last line, so that one that was cut short is not taken for a whole;
- an import takes the conversation's id first, under which nobody sees anything, and each batch asserts that
  it still has it. The conversation appears whole, with the last batch. The same import again finds what is
  there and goes on; after 10 minutes without activity its id is free again, and what it stored is removed;
- a conversation expires as it is deleted: gone at once, and what is left of it is removed later.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import bson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pymongo import ASCENDING
from pymongo.errors import DuplicateKeyError

from service import payloads, times
from service.chat_service import (
    ChatService,
    ListPosition,
    Span,
    faults_of,
    incoming_fault,
    one_by_one,
    public,
    refuse_oversize,
)
from service.database import Database, Transaction
from service.documents import IDLE, NOBODY, Conversation, Erasure, Id, Message, Time, Title, in_utc
from service.errors import (
    ConversationIdTaken,
    ConversationNotFound,
    DatabaseUnavailable,
    Fault,
    InvalidRequest,
    MalformedDocument,
)
from service.scopes import Key, Owner, Scope, message_key, own_id
from service.settings import Settings

Json = dict[str, Any]

FORMAT_VERSION = 1
_PAGE_ITEMS = 100
_IMPORT_ITEMS = 500
_IMPORT_BYTES = 8 * 1024 * 1024
# How often an import tries to take an id that others take and delete meanwhile, and the pause between.
_ATTEMPTS = 20
_PAUSE_S = 0.1
# The times between which a list finds a conversation.
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_END = datetime(9999, 1, 1, tzinfo=UTC)
# What decides whether a conversation is due, and what it counts; not its metadata, which may be large.
_FIELDS_OF_EXPIRY = ("user_id", "created_at", "updated_at", "expires_at", "message_count")
_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Receipt:
    """What an erasure removed, or would remove."""

    conversations: int
    messages: int


# Every JSON parser holds this exactly, and behind it there is room for what is appended later.
ImportedSeq = Annotated[int, Field(ge=0, le=2**53)]
_Time = Annotated[Time, Field(strict=False)]


class ImportedConversation(BaseModel):
    """A conversation as an export has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Id
    user_id: Id
    title: Title | None
    metadata: dict[str, Any]
    created_at: _Time
    updated_at: _Time
    last_seq: ImportedSeq
    message_count: ImportedSeq
    expires_at: _Time | None = None


class Lifecycle:
    """The verbs, of one tenant (see `of`) but for `expire` and `resume`, which are for all."""

    def __init__(self, database: Database, chat: ChatService, settings: Settings) -> None:
        self._database = database
        self._chat = chat
        self._settings = settings
        self._scope = Scope()

    def of(self, scope: Scope) -> Lifecycle:
        """Return this as one tenant's."""
        narrowed = copy.copy(self)
        narrowed._scope = scope  # noqa: SLF001  (its own)
        narrowed._chat = self._chat.of(scope)  # noqa: SLF001
        return narrowed

    # -- erasing -----------------------------------------------------------------------------------

    async def count(self, user_id: str) -> Receipt:
        """Return what `erase` would remove."""
        conversations = messages = 0
        async for each in self._conversations(user_id):
            conversations += 1
            messages += each.message_count
        return Receipt(conversations, messages)

    async def erase(self, user_id: str) -> Receipt:
        """Remove everything of a user, and return what that was, also where it was begun earlier.

        Each conversation is gone at once and whole. What is made while this goes on is removed, too.
        """
        return await self._erase(self._scope.owner_of(user_id))

    async def resume(self) -> int:
        """Go on with the erasures that nobody goes on with; return how many there were."""
        idle = {"active_at": {"$lt": datetime.now(UTC) - IDLE}}
        async with self._database.call():
            begun = await self._database.read(Erasure, idle)
        owners = [Owner(payloads.decode_anything(each)["_id"]) for each in begun]
        return await one_by_one(self._database, "erasure_not_finished", owners, self._erase)

    async def _erase(self, owner: Owner) -> Receipt:
        named = {"_id": owner}

        async def begin(transaction: Transaction) -> None:
            if await Erasure.find_one(named, session=transaction.session) is None:
                now = datetime.now(UTC)
                await Erasure(id=owner, active_at=now).insert(session=transaction.session)

        async def count(transaction: Transaction, messages: int) -> None:
            now, session = datetime.now(UTC), transaction.session
            gone = {"$inc": {"conversations": 1, "messages": messages}, "$set": {"active_at": now}}
            if await self._database.update(Erasure, named, gone, session) is None:
                # Another request has ended its own erasure meanwhile, and taken the count that was there.
                await Erasure(id=owner, active_at=now, conversations=1, messages=messages).insert(
                    session=session
                )

        async with self._database.call():
            with contextlib.suppress(DuplicateKeyError):  # another request has just begun the same
                await self._database.transaction(begin)
        while page := await self._of_owner(owner):
            for owned in page:
                try:
                    await self._chat.remove(Key(owned["_id"]), owned, also=count)
                except ConversationNotFound:
                    continue  # somebody else was faster
        return await self._finish(owner)

    async def _of_owner(self, owner: Owner) -> list[Json]:
        """Return filters of some of a user's conversations, well formed or not, or of unfinished imports.

        They are read without what the conversations hold, which may be large.
        """
        async with self._database.call():
            query: Json = {"user_id": owner}
            found = await self._database.read(Conversation, query, limit=_PAGE_ITEMS, fields=["_id"])
            if found:
                return [{"_id": payloads.decode_anything(each)["_id"], "user_id": owner} for each in found]
            # By the index of owners, since there are few of these, and one field more would cost more.
            query = {"user_id": NOBODY}
            unfinished = await self._database.read(Conversation, query, fields=["_id", "importing"])
        return [
            {"_id": each["_id"], "user_id": NOBODY, "importing": owner}
            for each in map(payloads.decode_anything, unfinished)
            if each.get("importing") == owner
        ]

    async def _finish(self, owner: Owner) -> Receipt:
        """Return what was counted, and remove the count, which names the user."""
        receipt = Receipt(0, 0)

        async def take(transaction: Transaction) -> Receipt:
            nonlocal receipt
            found = await Erasure.find_one({"_id": owner}, session=transaction.session)
            if found is None:
                # Taken by an earlier run of this, whose answer was lost, or returned by another request.
                return receipt if transaction.may_have_committed else Receipt(0, 0)
            await found.delete(session=transaction.session)
            receipt = Receipt(found.conversations, found.messages)
            return receipt

        async with self._database.call():
            return await self._database.transaction(take)

    async def _conversations(self, user_id: str) -> AsyncIterator[Conversation]:
        """Yield a user's conversations, latest activity first: all of them, or MalformedDocument."""
        after: ListPosition | None = None
        while True:
            page = await self._chat.list_conversations(user_id, limit=_PAGE_ITEMS, after=after)
            if page.left_out:
                raise MalformedDocument(
                    f"The conversation {page.left_out[0]} is not well formed, and nothing of a user is left "
                    "out here without a word. `chat-history verify` names all such; mend or remove them."
                )
            for each in page.conversations:
                yield each
            after = page.next
            if after is None:
                return

    # -- exporting ---------------------------------------------------------------------------------

    async def export(self, user_id: str) -> AsyncIterator[list[Json]]:
        """Yield everything of a user, in parts: a head, each conversation and its messages, an end.

        It has every conversation that the user had when it began, each as it is when its turn comes.
        """
        began = datetime.now(UTC)
        ids: dict[str, None] = {}
        async for each in self._conversations(user_id):
            ids[each.id] = None
        # One that had activity meanwhile may have moved from before us to behind us.
        async for each in self._conversations(user_id):
            if each.updated_at < began - timedelta(minutes=1):
                break
            ids[each.id] = None
        yield [{"type": "export", "version": FORMAT_VERSION, "user_id": user_id, "created_at": began}]
        conversations = messages = 0
        for conversation_id in ids:
            try:
                conversation = await self._chat.get_conversation(conversation_id, user_id)
                # What is appended meanwhile is not counted in `conversation`, so it stays out.
                beyond = conversation.last_seq + 1
                parts = self._chat.stream_chat_history(conversation_id, user_id, before=beyond)
                first = await anext(parts)
            except ConversationNotFound:
                continue  # deleted meanwhile
            conversations += 1
            messages += len(first)
            shaped = {"type": "conversation", **exported(conversation)}
            yield [shaped, *({"type": "message", "message": each} for each in first)]
            async for part in parts:
                messages += len(part)
                yield [{"type": "message", "message": each} for each in part]
        yield [{"type": "end", "conversations": conversations, "messages": messages}]

    # -- importing ---------------------------------------------------------------------------------

    async def restore(self, conversation: Json, messages: Iterable[Json], *, dry_run: bool) -> int | None:
        """Store a conversation as an export has it, ids and times included; return how many messages.

        None says that all of it was there already. Raises InvalidRequest for what is no export, and
        ConversationIdTaken where something else stands under its id.
        """
        about = _checked(conversation)
        key, owner = self._scope.key(about.id), self._scope.owner_of(about.user_id)
        batches = _batches(about, key, owner, messages, exact=self._database.embedded_engine)
        stored = await (self._look(key, owner) if dry_run else self._take_id(about, key, owner))
        if stored is not None:
            same = stored.user_id == owner and stored.last_seq == about.last_seq
            for batch in batches:
                same = same and await self._there(key, batch) == len(batch)
            if same and stored.message_count == about.message_count:
                return None
            raise ConversationIdTaken(f"Something else stands under the id {about.id}.")
        count = 0
        pending: list[tuple[int, bytes]] = []
        for batch in batches:
            if pending and not dry_run:
                await self._insert(key, owner, pending)
            pending = batch
            count += len(batch)
        if count != about.message_count:
            raise _fault("message_count", f"is {about.message_count}, and there are {count} messages")
        if not dry_run:
            document = self._document(about, key, owner)
            # A reader that asks for times trusts this (see `verify`), and an older version may have let
            # something else in, so it is corrected and not refused.
            newest = [payloads.decode(raw)["created_at"] for _, raw in pending[-1:]]
            document.updated_at = max(document.updated_at, document.created_at, *newest)
            await self._insert(key, owner, pending, document)
        return count

    async def _look(self, key: Key, owner: Owner) -> Conversation | None:
        """Return the conversation that an import would find under this id, as `_take_id` does."""
        async with self._database.call():
            found = await self._database.read(Conversation, {"_id": key}, limit=1)
            stored = _standing(found, owner)
        deleting = stored is not None and stored.user_id == NOBODY and stored.importing is None
        return None if deleting else stored

    async def _take_id(self, about: ImportedConversation, key: Key, owner: Owner) -> Conversation | None:
        """Take the id for this import, or go on with one of the same user; or return what else stands there.

        What an older version left of an import, messages without a conversation, is taken with it: the same
        import finds them, and another finds that they are too many.
        """

        async def take(transaction: Transaction) -> list[bytes]:
            session = transaction.session
            found = await self._database.read(Conversation, {"_id": key}, limit=1, session=session)
            if not found:
                await Conversation(
                    id=key,
                    user_id=NOBODY,
                    importing=owner,
                    created_at=about.created_at,
                    updated_at=times.now(),
                    last_seq=about.last_seq,
                    message_count=await Message.find({"conversation_id": key}, session=session).count(),
                ).insert(session=session)
            return found

        for _ in range(_ATTEMPTS):
            async with self._database.call():
                try:
                    found = await self._database.transaction(take)
                except DuplicateKeyError:
                    continue  # taken just now, by another request or by our own first run
                stored = _standing(found, owner)
            if stored is None or stored.user_id != NOBODY:
                return stored
            if not await self._chat.finish_deletion(key):
                raise ConversationIdTaken(f"Another user's import is going on under the id {about.id}.")
            await asyncio.sleep(_PAUSE_S)
        raise DatabaseUnavailable(f"Others take and delete the id {about.id} all the time. Import it again.")

    def _document(self, about: ImportedConversation, key: Key, owner: Owner) -> Conversation:
        raw = payloads.encode({"metadata": about.metadata}, keep_exact_copy=False)
        bent = self._database.embedded_engine and payloads.bends(raw)
        fields = about.model_dump(exclude={"id", "user_id"})
        document = Conversation(id=key, user_id=owner, exact_metadata=raw if bent else None, **fields)
        refuse_oversize(document, "metadata")
        return document

    async def _there(self, key: Key, batch: list[tuple[int, bytes]]) -> int:
        """Return how many of these messages are stored, each just as it is here."""
        if not batch:
            return 0
        span = Span(key, batch[0][0] - 1, batch[-1][0])
        async with self._database.call():
            found = await self._database.read(Message, span.query(), sort=[("seq", ASCENDING)])
        given = [payloads.decode(raw) for _, raw in batch]
        known = {each["_id"]: each for each in map(payloads.decode, found)}
        return sum(_equal(known.get(each["_id"]), each) for each in given)

    async def _insert(
        self, key: Key, owner: Owner, batch: list[tuple[int, bytes]], whole: Conversation | None = None
    ) -> None:
        """Store a batch, and with the last one show the conversation: what is there already is let be.

        The first statement asserts that the import still has the id, and locks it, so that two imports of the
        same conversation take turns.
        """
        span = Span(key, batch[0][0] - 1, batch[-1][0]) if batch else None
        importing = {"_id": key, "user_id": NOBODY, "importing": owner}

        async def insert(transaction: Transaction) -> None:
            session = transaction.session
            active = {"$set": {"updated_at": times.now()}}
            locked = await self._database.update(Conversation, importing, active, session)
            missing = await self._missing(key, span, batch, transaction)
            if locked is None:
                transaction.wrote = False
                found = await self._database.read(
                    Conversation, {"_id": key, "user_id": owner}, limit=1, session=session
                )
                if missing or not found:
                    raise ConversationIdTaken(
                        f"The import lost the id {own_id(key)}: it stood still for 10 minutes, or its user "
                        "was erased, and what it had stored was removed. Import it again."
                    )
                return  # shown already: by our own first run, whose answer was lost, or by a second import
            if missing:
                await self._database.insert(Message, missing, session)
            count = Conversation.model_validate(payloads.decode(locked)).message_count + len(missing)
            changes: Json = {"message_count": count}
            if whole is not None:
                if count != whole.message_count:
                    raise _remains(key)
                changes = whole.model_dump(exclude={"id", "revision_id"})
            await self._database.update(Conversation, importing, {"$set": changes}, session)

        async with self._database.call():
            try:
                await self._database.transaction(insert)
            except DuplicateKeyError as error:
                raise _remains(key) from error

    async def _missing(
        self, key: Key, span: Span | None, batch: list[tuple[int, bytes]], transaction: Transaction
    ) -> list[bytes]:
        """Return which of these messages are not stored. Raises ConversationIdTaken where another is."""
        if span is None:
            return []
        found = await self._database.read(Message, span.query(), session=transaction.session)
        there = {each["_id"]: each for each in payloads.decode_all(found)}
        missing = []
        for _, raw in batch:
            given = payloads.decode(raw)
            if given["_id"] not in there:
                missing.append(raw)
            elif not _equal(there.pop(given["_id"]), given):
                raise _remains(key)
        return missing

    # -- expiring ----------------------------------------------------------------------------------

    async def expire(self, now: datetime | None = None, *, dry_run: bool = False) -> Receipt:
        """Remove, of all tenants, what has expired and what had no activity for too long."""
        now = now or datetime.now(UTC)
        due: list[Conversation] = []
        for field, until in self._expired(now):
            still = None if dry_run else {field: {"$lt": until}}
            look_at = functools.partial(self._expire_one, now, still, due)
            last: Json | None = None
            while found := await self._page_of(field, until, last):
                await one_by_one(self._database, "not_expired", found, look_at)
                last = payloads.decode_anything(found[-1])
        return Receipt(len(due), sum(each.message_count for each in due))

    async def _expire_one(
        self, now: datetime, still: Json | None, due: list[Conversation], raw: bytes
    ) -> None:
        """Note a conversation if it is due, and remove it if the filter `still` matches it."""
        conversation = Conversation.model_validate(payloads.decode(raw))
        if self._is_due(conversation, now):
            if still is not None:
                await self._remove_due(conversation, still)
            due.append(conversation)

    def _expired(self, now: datetime) -> Iterator[tuple[str, datetime]]:
        """Return, for each index, the time up to which it may have what is due."""
        yield "expires_at", now
        days = self._settings.shortest_retention_days
        if days is not None:
            yield "updated_at", now - timedelta(days=days)

    async def _page_of(self, field: str, until: datetime, last: Json | None) -> list[bytes]:
        """Read a page along an index, after the last of the page before: first those of its very time."""
        windows: list[Json] = [{field: {"$gte": _EARLIEST, "$lt": until}}]
        if last is not None:
            time = last[field]
            windows = [{field: time, "_id": {"$gt": last["_id"]}}, {field: {"$gt": time, "$lt": until}}]
        found: list[bytes] = []
        sort = [(field, ASCENDING), ("_id", ASCENDING)]
        async with self._database.call():
            for window in windows:
                left = _PAGE_ITEMS - len(found)
                if left:
                    found += await self._database.read(
                        Conversation, window, sort=sort, limit=left, fields=_FIELDS_OF_EXPIRY
                    )
        return found

    def _is_due(self, conversation: Conversation, now: datetime) -> bool:
        if conversation.user_id == NOBODY:
            return False  # it is being deleted already
        if conversation.expires_at is not None and conversation.expires_at < now:
            return True
        tenant = conversation.id.partition("/")[0] if "/" in conversation.id else ""
        days = self._settings.retention_days_by_tenant.get(tenant, self._settings.retention_days)
        return days is not None and conversation.updated_at < now - timedelta(days=days)

    async def _remove_due(self, conversation: Conversation, due: Json) -> None:
        """Remove it, if nobody has touched it since we read it."""
        owned = {"_id": conversation.id, "user_id": conversation.user_id, **due}
        try:
            await self._chat.remove(Key(conversation.id), owned)
        except ConversationNotFound:
            return


def exported(conversation: Conversation) -> Json:
    """Return a conversation as an export has it."""
    return {name: getattr(conversation, name) for name in ImportedConversation.model_fields}


def _checked(conversation: Json) -> ImportedConversation:
    payloads.check(conversation)
    try:
        about = ImportedConversation.model_validate(conversation)
    except ValidationError as error:
        faults = faults_of(error, ())
        raise InvalidRequest(f"{faults[0].path}: {faults[0].message}.", faults) from error
    _check_time(about.created_at, "created_at")
    _check_time(about.updated_at, "updated_at")
    return about


def _check_time(time: datetime, name: str) -> None:
    if time.tzinfo is None:
        raise _fault(name, "must say its zone")
    if not _BEGINNING <= time < _END:
        raise _fault(name, f"must be from {_BEGINNING.year} to {_END.year - 1}, and is {time.isoformat()}")


def _batches(
    about: ImportedConversation, key: Key, owner: Owner, messages: Iterable[Json], *, exact: bool
) -> Iterator[list[tuple[int, bytes]]]:
    """Check messages, and yield them as stored, in batches that one transaction takes."""
    batch: list[tuple[int, bytes]] = []
    size, last_seq, last_time = 0, 0, _BEGINNING
    for message in messages:
        seq, time = message.get("seq"), _time_of(message)
        if not isinstance(seq, int) or isinstance(seq, bool) or not last_seq < seq <= about.last_seq:
            raise _fault(
                "seq", f"must grow, from 1 to the conversation's last_seq, and is {payloads.cut(repr(seq))}"
            )
        if time < last_time:
            raise _fault("created_at", f"runs backwards at seq {seq}")
        if message.get("conversation_id") != about.id or message.get("user_id") != about.user_id:
            raise _fault("conversation_id", f"is another conversation's, or another user's, at seq {seq}")
        raw = _stored(message, key, owner, time, exact=exact)
        if batch and (len(batch) == _IMPORT_ITEMS or size + len(raw) > _IMPORT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((seq, raw))
        size += len(raw)
        last_seq, last_time = seq, time
    yield batch


def _stored(message: Json, key: Key, owner: Owner, time: datetime, *, exact: bool) -> bytes:
    """Return a message of an export as it is stored."""
    ours = ("id", "conversation_id", "user_id", "seq", "created_at")
    fields = {name: value for name, value in message.items() if name not in ours}
    if (fault := incoming_fault({"id": message.get("id"), **fields})) is not None:
        raise InvalidRequest(f"{fault.path}: {fault.message}.", [fault])
    header = {
        "_id": message_key(key, message["id"]),
        "conversation_id": key,
        "user_id": owner,
        "seq": message["seq"],
        "created_at": time,
    }
    return payloads.splice(bson.encode(header), payloads.encode(fields, keep_exact_copy=exact))


def _time_of(message: Json) -> datetime:
    try:
        time = datetime.fromisoformat(message["created_at"])
        if time.tzinfo is not None:
            time = in_utc(time)
    except (KeyError, TypeError, ValueError) as error:
        raise _fault("created_at", "must be a time") from error
    _check_time(time, "created_at")
    return time


def _equal(stored: Json | None, given: Json) -> bool:
    return stored is not None and public(stored) == public(given)


def _standing(found: list[bytes], owner: Owner) -> Conversation | None:
    """Return what stands under an id, but for an import of this user, which goes on."""
    stored = Conversation.model_validate(payloads.decode(found[0])) if found else None
    going_on = stored is not None and stored.user_id == NOBODY and stored.importing == owner
    return None if going_on else stored


def _remains(key: Key) -> ConversationIdTaken:
    """Say that an import of something else under this id was begun, and not finished."""
    return ConversationIdTaken(
        f"Messages of another import stand under the id {own_id(key)}, or two of these have one id. What an "
        "interrupted import left is removed when it has stood still for 10 minutes; import again then."
    )


def _fault(name: str, why: str) -> InvalidRequest:
    fault = Fault(f"$.{name}", why)
    return InvalidRequest(f"{fault.path} {why}.", [fault])
