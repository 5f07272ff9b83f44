"""Walks the database and proves the invariants of `chat_service`; mends what needs no guess.

Every conversation is read whole, in windows of `seq`, so memory stays that of a window. It may run beside
a service that writes: a conversation that changed while it was read is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import bson
from beanie import Document
from pymongo import ASCENDING, DESCENDING

from service.chat_service import ChatService, Span, is_id
from service.database import Database, Transaction
from service.documents import NOBODY, Conversation, Message
from service.scopes import Key

_WINDOW_SEQS = 1_000
# What the invariants are about; not what a message says, which may be large.
_FIELDS = ("conversation_id", "user_id", "seq", "created_at")
_ATTEMPTS = 5
# What reads a whole collection in one command takes as long as that is large.
_WHOLE_COLLECTION_S = 3_600.0
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Violation:
    """An invariant that does not hold: where, which, and whether it was mended (or why it was not)."""

    conversation_id: str
    what: str
    outcome: str = ""

    def __str__(self) -> str:
        return f"{self.conversation_id}: {self.what}" + (f" ({self.outcome})" if self.outcome else "")


@dataclass
class Report:
    """What a walk found: counts of what was read, and every violation."""

    conversations: int = 0
    messages: int = 0
    violations: list[Violation] = field(default_factory=list)
    left: int = 0


@dataclass
class _Seen:
    """What was read of one conversation's messages."""

    count: int = 0
    last_seq: int = 0
    last_time: datetime | None = None
    newest: datetime | None = None
    faults: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class Verifier:
    """One walk over a database; with `repair`, what can be mended without guessing is mended."""

    def __init__(self, database: Database, chat: ChatService, *, repair: bool) -> None:
        self._database = database
        self._chat = chat
        self._repair = repair
        self.report = Report()

    async def run(self, progress: Progress = lambda _done, _all: None) -> Report:
        """Read everything, and return what was found. Raises DatabaseUnavailable."""
        ids = await self._values(Conversation, "_id")
        for done, conversation_id in enumerate(ids):
            progress(done, len(ids))
            await self._conversation(conversation_id)
        await self._orphans(set(ids))
        progress(len(ids), len(ids))
        return self.report

    async def _values(self, document: type[Document], name: str) -> list[Any]:
        """Return the different values of a field in a whole collection."""
        async with self._database.call(seconds=_WHOLE_COLLECTION_S):
            found = await document.aggregate([{"$group": {"_id": f"${name}"}}]).to_list()
        return [each["_id"] for each in found]

    async def _conversation(self, conversation_id: str) -> None:
        conversation, seen = await self._steady(conversation_id)
        if conversation is None:
            return  # deleted since the walk began
        if conversation.user_id == NOBODY:
            await self._interrupted_deletion(conversation_id)
            return
        self.report.conversations += 1
        self.report.messages += seen.count
        await self._judge(conversation, seen)

    async def _steady(self, conversation_id: str) -> tuple[Conversation | None, _Seen]:
        """Read a conversation, again where somebody wrote to it meanwhile."""
        before, seen = await self._find(conversation_id), _Seen()
        for _ in range(_ATTEMPTS):
            if before is None or before.user_id == NOBODY:
                break
            seen = await self._read(before)
            after = await self._find(conversation_id)
            if after == before:
                break
            before = after
        return before, seen

    async def _find(self, conversation_id: str) -> Conversation | None:
        async with self._database.call():
            return await Conversation.find_one({"_id": conversation_id})

    async def _read(self, conversation: Conversation) -> _Seen:
        seen = _Seen()
        top = max(conversation.last_seq, await self._highest_seq(conversation))
        for low in range(-1, top, _WINDOW_SEQS):
            span = Span(Key(conversation.id), low, low + _WINDOW_SEQS)
            async with self._database.call():
                found = await self._database.read(
                    Message, span.query(), sort=[("seq", ASCENDING)], fields=_FIELDS
                )
            messages: list[dict[str, Any]] = [
                bson.decode(raw, bson.CodecOptions(tz_aware=True)) for raw in found
            ]
            for message in messages:
                _look_at(message, conversation, seen)
            if self._database.sharded and messages:
                seen.faults += await self._doubles(span, [message["_id"] for message in messages])
        return seen

    async def _doubles(self, window: Span, ids: list[str]) -> list[str]:
        """Find ids of a window that stand more than once in the conversation; name each in its first window.

        A single server cannot have them. A cluster can, if it was sharded so that a conversation's messages
        are on several shards, for an `_id` is unique on each shard only.
        """
        named = {"conversation_id": window.key, "_id": {"$in": ids}}
        async with self._database.call():
            found = await self._database.read(Message, named, fields=["seq"])
        seqs: dict[str, list[int]] = {}
        for message in map(bson.decode, found):
            seqs.setdefault(message["_id"], []).append(message["seq"])
        return [
            f"the message id {each.rpartition('/')[2]} stands {len(places)} times, at seq "
            + ", ".join(map(str, sorted(places)))
            for each, places in seqs.items()
            if len(places) > 1 and min(places) > window.low
        ]

    async def _highest_seq(self, conversation: Conversation) -> int:
        """Return the highest seq beyond `last_seq`, where none should be."""
        beyond = {"conversation_id": conversation.id, "seq": {"$gt": conversation.last_seq}}
        async with self._database.call():
            found = await self._database.read(
                Message, beyond, sort=[("seq", DESCENDING)], limit=1, fields=["seq"]
            )
        return bson.decode(found[0])["seq"] if found else 0

    async def _judge(self, conversation: Conversation, seen: _Seen) -> None:
        for fault in seen.faults:
            self._note(conversation.id, fault, "left: there is no telling what it should be")
        if not _is_key(conversation.id) or not _is_key(conversation.user_id):
            self._note(conversation.id, "its id or its user_id is not well formed", "left")
        if seen.last_seq > conversation.last_seq:
            what = f"last_seq is {conversation.last_seq}, and there is a message with seq {seen.last_seq}"
            await self._mend(Conversation, conversation.id, {"$max": {"last_seq": seen.last_seq}}, what)
        if seen.count != conversation.message_count:
            what = f"message_count is {conversation.message_count}, and there are {seen.count} messages"
            change = {"$inc": {"message_count": seen.count - conversation.message_count}}
            await self._mend(Conversation, conversation.id, change, what)
        newest = max(conversation.created_at, seen.newest or conversation.created_at)
        if newest > conversation.updated_at:
            what = f"updated_at is {conversation.updated_at.isoformat()}, and there is {newest.isoformat()}"
            await self._mend(Conversation, conversation.id, {"$max": {"updated_at": newest}}, what)
        for message_id in seen.others:
            what = f"the message {message_id} says that it is another user's"
            owner = {"$set": {"user_id": conversation.user_id}}
            await self._mend(Message, message_id, owner, what)

    async def _mend(self, document: type[Document], key: str, change: dict[str, Any], violation: str) -> None:
        """Correct one document, if we are to, and note it.

        Counters are corrected by a difference, so that a writer meanwhile is not undone; a message has its
        conversation's owner by definition.
        """

        async def correct(transaction: Transaction) -> None:
            await document.find_one({"_id": key}).update_one(change, session=transaction.session)

        if self._repair:
            async with self._database.call():
                await self._database.transaction(correct)
        self._note(
            key if document is Conversation else key.rpartition("/")[0],
            violation,
            "mended" if self._repair else "",
        )

    async def _interrupted_deletion(self, conversation_id: str) -> None:
        if self._repair:
            await self._chat.finish_deletion(Key(conversation_id))
        outcome = "mended: finished" if self._repair else "the service finishes it when it runs"
        self._note(conversation_id, "its deletion was interrupted", outcome)

    async def _orphans(self, known: set[str]) -> None:
        """Find messages without a conversation; one that was created since is none."""
        for conversation_id in await self._values(Message, "conversation_id"):
            if conversation_id not in known and await self._find(conversation_id) is None:
                what = "there are messages without this conversation"
                self._note(str(conversation_id), what, "left: nobody knows whose they are")

    def _note(self, conversation_id: str, what: str, outcome: str) -> None:
        self.report.violations.append(Violation(conversation_id, what, outcome))
        self.report.left += not outcome.startswith("mended")


def _is_key(key: str) -> bool:
    """Tell whether this is an id, or a tenant and an id."""
    parts = key.split("/")
    return len(parts) <= 2 and all(map(is_id, parts))


def _look_at(message: dict[str, Any], conversation: Conversation, seen: _Seen) -> None:
    """Note one message, which comes in the order of `seq`, and what is wrong with it."""
    prefix, _, own_id = str(message["_id"]).rpartition("/")
    seq, time = message.get("seq"), message.get("created_at")
    seen.count += 1
    if prefix != conversation.id or not is_id(own_id):
        seen.faults.append(f"the message {message['_id']!r} has an id that is not well formed")
    if not isinstance(seq, int) or seq < 1:
        seen.faults.append(f"the message {own_id} has seq {seq!r}")
    elif seq == seen.last_seq:
        seen.faults.append(f"seq {seq} stands twice")
    if not isinstance(time, datetime):
        seen.faults.append(f"the message {own_id} has no created_at")
    elif seen.last_time is not None and time < seen.last_time:
        seen.faults.append(f"created_at runs backwards at seq {seq}")
    if message.get("user_id") != conversation.user_id:
        seen.others.append(message["_id"])
    seen.last_seq = seq if isinstance(seq, int) else seen.last_seq
    if isinstance(time, datetime):
        seen.last_time = time
        seen.newest = max(time, seen.newest or time)
