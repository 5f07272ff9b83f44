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
from pymongo import ASCENDING

from service import times
from service.chat_service import ChatService, Span, is_id
from service.database import Database, Transaction
from service.documents import IDLE, NOBODY, Conversation, Message
from service.scopes import Key

_WINDOW_SEQS = 1_000
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
    faults: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    remains: list[tuple[str, str]] = field(default_factory=list)


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
            await self._unfinished(conversation)
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
                found = await self._database.read(Message, span.query(), sort=[("seq", ASCENDING)])
            for raw in found:
                _look_at(bson.decode(raw, bson.CodecOptions(tz_aware=True)), conversation, seen)
        return seen

    async def _highest_seq(self, conversation: Conversation) -> int:
        """Return the highest seq beyond `last_seq`, where none should be."""
        beyond = {"conversation_id": conversation.id, "seq": {"$gt": conversation.last_seq}}
        async with self._database.call():
            found = await self._database.read(Message, beyond)
        return max((bson.decode(raw)["seq"] for raw in found), default=0)

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
        for message_id in seen.others:
            what = f"the message {message_id} says that it is another user's"
            owner = {"$set": {"user_id": conversation.user_id}}
            await self._mend(Message, message_id, owner, what)
        if seen.remains:
            await self._remove_remains(conversation.id, seen.remains)

    async def _mend(self, document: type[Document], key: str, change: dict[str, Any], violation: str) -> None:
        """Correct one document, if we are to, and note it.

        Counters are corrected by a difference, so that a writer meanwhile is not undone; a message has its
        conversation's owner by definition.
        """

        async def correct(transaction: Transaction) -> None:
            named = {"_id": key}
            if document is Message:
                named["conversation_id"] = key.rpartition("/")[0]
            await document.find_one(named).update_one(change, session=transaction.session)

        if self._repair:
            async with self._database.call():
                await self._database.transaction(correct)
        self._note(
            key if document is Conversation else key.rpartition("/")[0],
            violation,
            "mended" if self._repair else "",
        )

    async def _remove_remains(self, conversation_id: str, remains: list[tuple[str, str]]) -> None:
        """Remove another user's messages that stand behind a conversation's last one, if we are to.

        An import that was interrupted left them before somebody took the id. They were never shown or counted
        here, and the conversation's owner must not get them.
        """

        async def remove(transaction: Transaction) -> None:
            for message_id, owner in remains:
                named = {"_id": message_id, "conversation_id": conversation_id, "user_id": owner}
                await Message.find(named).delete(session=transaction.session)

        if self._repair:
            async with self._database.call():
                await self._database.transaction(remove)
        what = f"{len(remains)} messages of another user stand behind its last one"
        self._note(conversation_id, what, "mended: removed" if self._repair else "")

    async def _unfinished(self, conversation: Conversation) -> None:
        """Note a deletion or an import that was interrupted; an import that is going on is no violation."""
        verb = "deletion" if conversation.importing is None else "import"
        if conversation.importing is not None and times.now() - conversation.updated_at < IDLE:
            return
        mended = self._repair and await self._chat.finish_deletion(Key(conversation.id))
        outcome = "mended: removed" if mended else "the service removes the rest when it runs"
        self._note(conversation.id, f"its {verb} was interrupted", outcome)

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
    another = message.get("user_id") != conversation.user_id
    if another and isinstance(seq, int) and seq > conversation.last_seq:
        seen.remains.append((message["_id"], str(message.get("user_id"))))
        return
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
    if another:
        seen.others.append(message["_id"])
    seen.last_seq = seq if isinstance(seq, int) else seen.last_seq
    seen.last_time = time if isinstance(time, datetime) else seen.last_time
