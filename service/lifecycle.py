"""What becomes of a user's data as a whole: erased, exported, imported; and of conversations that expire.

All of it can be interrupted anywhere and taken up again:

- an erasure counts each conversation in the transaction in which it is gone, in a document that ends with it;
- an export says how many it had in its last line, so that one that was cut short is not taken for a whole;
- an imported conversation appears whole, with its last batch: until then its messages belong to none, which
  no reader sees, and the same import again finds them and goes on;
- a conversation expires as it is deleted: gone at once, and what is left of it is removed later.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import bson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pymongo import ASCENDING
from pymongo.errors import DuplicateKeyError

from service import payloads
from service.chat_service import ChatService, ListPosition, Span, faults_of, incoming_fault, public
from service.database import Database, Transaction
from service.documents import NOBODY, Conversation, Erasure, Id, Message, Seq, Time, Title, in_utc
from service.errors import ConversationIdTaken, ConversationNotFound, Fault, InvalidRequest
from service.scopes import Key, Owner, Scope, message_key, own_id
from service.settings import Settings

Json = dict[str, Any]

FORMAT_VERSION = 1
_PAGE_ITEMS = 100
_IMPORT_ITEMS = 500
_IMPORT_BYTES = 8 * 1024 * 1024
# An erasure that has removed nothing for so long was interrupted.
_IDLE = timedelta(minutes=10)
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Receipt:
    """What an erasure removed, or would remove."""

    conversations: int
    messages: int


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
    last_seq: Seq
    message_count: Seq
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
        idle = {"active_at": {"$lt": datetime.now(UTC) - _IDLE}}
        async with self._database.call():
            begun = await Erasure.find(idle).to_list()
        for each in begun:
            await self._erase(Owner(each.id))
        return len(begun)

    async def _erase(self, owner: Owner) -> Receipt:
        named = {"_id": owner}

        async def begin(transaction: Transaction) -> None:
            if await Erasure.find_one(named, session=transaction.session) is None:
                now = datetime.now(UTC)
                await Erasure(id=owner, active_at=now).insert(session=transaction.session)

        async def count(transaction: Transaction, conversation: Conversation) -> None:
            gone = {
                "$inc": {"conversations": 1, "messages": conversation.message_count},
                "$set": {"active_at": datetime.now(UTC)},
            }
            await self._database.update(Erasure, named, gone, transaction.session)

        try:
            async with self._database.call():
                await self._database.transaction(begin)
        except DuplicateKeyError:
            pass  # another request has just begun the same
        while page := await self._of_owner(owner):
            for conversation in page:
                owned = {"_id": conversation.id, "user_id": owner}
                try:
                    await self._chat.remove(Key(conversation.id), owned, also=count)
                except ConversationNotFound:
                    continue  # somebody else was faster
        return await self._finish(owner)

    async def _of_owner(self, owner: Owner) -> list[Conversation]:
        async with self._database.call():
            return await Conversation.find({"user_id": owner}).limit(_PAGE_ITEMS).to_list()

    async def _finish(self, owner: Owner) -> Receipt:
        """Return what was counted, and remove the count, which names the user."""

        async def take(transaction: Transaction) -> Receipt:
            found = await Erasure.find_one({"_id": owner}, session=transaction.session)
            if found is None:
                return Receipt(0, 0)  # another request for the same has returned it
            await found.delete(session=transaction.session)
            return Receipt(found.conversations, found.messages)

        async with self._database.call():
            return await self._database.transaction(take)

    async def _conversations(self, user_id: str) -> AsyncIterator[Conversation]:
        """Yield a user's conversations, latest activity first."""
        after: ListPosition | None = None
        while True:
            page = await self._chat.list_conversations(user_id, limit=_PAGE_ITEMS, after=after)
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
                parts = self._chat.stream_chat_history(conversation_id, user_id)
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
        async with self._database.call():
            found = await self._database.read(Conversation, {"_id": key}, limit=1)
        if found:
            stored = Conversation.model_validate(payloads.decode(found[0]))
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
                await self._insert(key, pending, None)
            pending = batch
            count += len(batch)
        if count != about.message_count:
            raise _fault("message_count", f"is {about.message_count}, and there are {count} messages")
        if not dry_run:
            await self._insert(key, pending, self._document(about, key, owner))
        return count

    def _document(self, about: ImportedConversation, key: Key, owner: Owner) -> Conversation:
        raw = payloads.encode({"metadata": about.metadata}, keep_exact_copy=False)
        bent = self._database.embedded_engine and payloads.bends(raw)
        fields = about.model_dump(exclude={"id", "user_id"})
        return Conversation(id=key, user_id=owner, exact_metadata=raw if bent else None, **fields)

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
        self, key: Key, batch: list[tuple[int, bytes]], conversation: Conversation | None
    ) -> None:
        """Store a batch, with the conversation if it is the last: what is there already is let be."""
        span = Span(key, batch[0][0] - 1, batch[-1][0]) if batch else None

        async def insert(transaction: Transaction) -> None:
            there: dict[str, Json] = {}
            if span is not None:
                found = await self._database.read(Message, span.query(), session=transaction.session)
                there = {each["_id"]: each for each in payloads.decode_all(found)}
            missing = []
            for _, raw in batch:
                given = payloads.decode(raw)
                if given["_id"] not in there:
                    missing.append(raw)
                elif not _equal(there.pop(given["_id"]), given):
                    raise _remains(key)
            if missing:
                await self._database.insert(Message, missing, transaction.session)
            if conversation is not None:
                await conversation.insert(session=transaction.session)
                stored = Message.find({"conversation_id": key}, session=transaction.session)
                if await stored.count() != conversation.message_count:
                    raise _remains(key)

        async with self._database.call():
            try:
                await self._database.transaction(insert)
            except DuplicateKeyError as error:
                raise ConversationIdTaken("Something else has just taken its id.") from error

    # -- expiring ----------------------------------------------------------------------------------

    async def expire(self, now: datetime | None = None, *, dry_run: bool = False) -> Receipt:
        """Remove, of all tenants, what has expired and what had no activity for too long."""
        now = now or datetime.now(UTC)
        conversations = messages = 0
        for field, until in self._expired(now):
            last: Conversation | None = None
            while found := await self._page_of(field, until, last):
                for each in found:
                    if self._is_due(each, now):
                        conversations += 1
                        messages += each.message_count
                        if not dry_run:
                            await self._remove_due(each, {field: {"$lt": until}})
                last = found[-1]
        return Receipt(conversations, messages)

    def _expired(self, now: datetime) -> Iterator[tuple[str, datetime]]:
        """Return, for each index, the time up to which it may have what is due."""
        yield "expires_at", now
        days = self._settings.shortest_retention_days
        if days is not None:
            yield "updated_at", now - timedelta(days=days)

    async def _page_of(self, field: str, until: datetime, last: Conversation | None) -> list[Conversation]:
        """Read a page along an index, after the last of the page before: first those of its very time."""
        windows: list[Json] = [{field: {"$gte": _EARLIEST, "$lt": until}}]
        if last is not None:
            time = getattr(last, field)
            windows = [{field: time, "_id": {"$gt": last.id}}, {field: {"$gt": time, "$lt": until}}]
        found: list[bytes] = []
        sort = [(field, ASCENDING), ("_id", ASCENDING)]
        async with self._database.call():
            for window in windows:
                left = _PAGE_ITEMS - len(found)
                if left:
                    found += await self._database.read(Conversation, window, sort=sort, limit=left)
        return [Conversation.model_validate(payloads.decode(raw)) for raw in found]

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
    return about


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
            return in_utc(time)
    except (KeyError, TypeError, ValueError) as error:
        raise _fault("created_at", "must be a time") from error
    raise _fault("created_at", "must say its zone")


def _equal(stored: Json | None, given: Json) -> bool:
    return stored is not None and public(stored) == public(given)


def _remains(key: Key) -> ConversationIdTaken:
    """Say that an import of something else under this id was begun, and not finished."""
    return ConversationIdTaken(f"Messages of another import stand under the id {own_id(key)}.")


def _fault(name: str, why: str) -> InvalidRequest:
    fault = Fault(f"$.{name}", why)
    return InvalidRequest(f"{fault.path} {why}.", [fault])
