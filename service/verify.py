"""Walks the database and proves the invariants of `chat_service`; mends what needs no guess.

Every conversation is read whole, in windows of `seq`, so memory stays that of a window. It may run beside
a service that writes: a conversation that changed while it was read is read again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from beanie import Document
from pymongo import ASCENDING, DESCENDING

from service import payloads, times
from service.chat_service import ChatService, Span, is_id, shown_id
from service.database import Database, Transaction
from service.documents import IDLE, NOBODY, Conversation, Message
from service.errors import ChatHistoryError, DatabaseUnavailable, MalformedDocument
from service.scopes import Key

_WINDOW_SEQS = 1_000
# What the invariants are about; not what a message says, which may be large.
_FIELDS = ("conversation_id", "user_id", "seq", "created_at")
_ATTEMPTS = 5
_REMOVED_AT_ONCE = 100
# What reads a whole collection in one command takes as long as that is large.
_WHOLE_COLLECTION_S = 3_600.0
_NOT_WELL_FORMED = "it is not well formed"
_FOR_AN_OPERATOR = "left: mend it, or remove it"
_CONVERSATION_KINDS = {
    "user_id": str,
    "created_at": datetime,
    "updated_at": datetime,
    "last_seq": int,
    "message_count": int,
}
# What a message's fields must be, for the database and for us, and what names one that is otherwise.
_KINDS = {"_id": str, "conversation_id": str, "seq": int, "created_at": datetime}
_TYPES = {"_id": "string", "conversation_id": "string", "created_at": "date"}
_MALFORMED = {
    "$or": [
        *({name: {"$not": {"$type": kind}}} for name, kind in _TYPES.items()),
        {"$nor": [{"seq": {"$type": "int"}}, {"seq": {"$type": "long"}}]},
    ]
}
_NAMING = dict.fromkeys(_KINDS, 1)
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
    remains: list[tuple[str, str]] = field(default_factory=list)


class Verifier:
    """One walk over a database; with `repair`, what can be mended without guessing is mended."""

    def __init__(self, database: Database, chat: ChatService, *, repair: bool) -> None:
        self._database = database
        self._chat = chat
        self._repair = repair
        self.report = Report()
        # The conversations with messages that are not well formed, whose counters are left alone.
        self._uncounted: set[str] = set()

    async def run(self, progress: Progress = lambda _done, _all: None) -> Report:
        """Read everything, and return what was found. Raises DatabaseUnavailable."""
        ids = await self._values(Conversation, "_id")
        await self._malformed_messages()
        for done, conversation_id in enumerate(ids):
            progress(done, len(ids))
            try:
                await self._conversation(conversation_id)
            except DatabaseUnavailable:
                raise
            except ChatHistoryError:
                self._note(shown_id(conversation_id), _NOT_WELL_FORMED, _FOR_AN_OPERATOR)
        await self._orphans({each for each in ids if isinstance(each, str)})
        progress(len(ids), len(ids))
        return self.report

    async def _values(self, document: type[Document], name: str) -> list[Any]:
        """Return the different values of a field in a whole collection."""
        async with self._database.call(seconds=_WHOLE_COLLECTION_S):
            found = await document.aggregate([{"$group": {"_id": f"${name}"}}]).to_list()
        return [each["_id"] for each in found]

    async def _malformed_messages(self) -> None:
        """Find the messages that no conversation's walk would meet, or could read, whatever conversation."""
        async with self._database.call(seconds=_WHOLE_COLLECTION_S):
            found = await Message.aggregate([{"$match": _MALFORMED}, {"$project": _NAMING}]).to_list()
        for each in found:
            wrong = [name for name, kinds in _KINDS.items() if not isinstance(each.get(name), kinds)]
            what = f"the message {shown_id(each['_id'])} is not well formed: its {', its '.join(wrong)}"
            conversation_id = each.get("conversation_id")
            named = (conversation_id, str(each["_id"]).rpartition("/")[0])
            self._uncounted |= {name for name in named if isinstance(name, str)}
            self._note(shown_id(conversation_id), what, _FOR_AN_OPERATOR)

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
            found = await self._database.read(Conversation, {"_id": conversation_id}, limit=1)
            return _loaded(found[0]) if found else None

    async def _read(self, conversation: Conversation) -> _Seen:
        seen = _Seen()
        top = max(conversation.last_seq, await self._highest_seq(conversation))
        for low in range(-1, top, _WINDOW_SEQS):
            span = Span(Key(conversation.id), low, low + _WINDOW_SEQS)
            async with self._database.call():
                found = await self._database.read(
                    Message, span.query(), sort=[("seq", ASCENDING)], fields=_FIELDS
                )
            messages = list(map(payloads.decode_anything, found))
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
        for message in map(payloads.decode_anything, found):
            if isinstance(message.get("seq"), int):  # else it is named as one that is not well formed
                seqs.setdefault(str(message["_id"]), []).append(message["seq"])
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
        return int(payloads.decode_anything(found[0])["seq"]) if found else 0

    async def _judge(self, conversation: Conversation, seen: _Seen) -> None:
        for fault in seen.faults:
            self._note(conversation.id, fault, "left: there is no telling what it should be")
        if not _is_key(conversation.id) or not _is_key(conversation.user_id):
            self._note(conversation.id, "its id or its user_id is not well formed", "left")
        if conversation.id not in self._uncounted:
            await self._judge_counters(conversation, seen)
        for message_id in seen.others:
            what = f"the message {message_id} says that it is another user's"
            owner = {"$set": {"user_id": conversation.user_id}}
            await self._mend(Message, message_id, owner, what)
        if seen.remains:
            await self._remove_remains(conversation.id, seen.remains)

    async def _judge_counters(self, conversation: Conversation, seen: _Seen) -> None:
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

        async def remove(some: list[tuple[str, str]], transaction: Transaction) -> None:
            for message_id, owner in some:
                named = {"_id": message_id, "conversation_id": conversation_id, "user_id": owner}
                await Message.find(named).delete(session=transaction.session)

        if self._repair:
            # In parts: an import may have left any number, and one call has one call's time for it.
            for begin in range(0, len(remains), _REMOVED_AT_ONCE):
                some = remains[begin : begin + _REMOVED_AT_ONCE]
                async with self._database.call():
                    await self._database.transaction(functools.partial(remove, some))
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
            if not isinstance(conversation_id, str):
                continue  # a message that was named already
            if conversation_id not in known and await self._find(conversation_id) is None:
                what = "there are messages without this conversation"
                self._note(conversation_id, what, "left: nobody knows whose they are")

    def _note(self, conversation_id: str, what: str, outcome: str) -> None:
        self.report.violations.append(Violation(conversation_id, what, outcome))
        self.report.left += not outcome.startswith("mended")


def _loaded(raw: bytes) -> Conversation:
    """Return a conversation. A counter that is text would pass for a number there, and not be counted up."""
    fields = payloads.decode(raw)
    if any(not isinstance(fields.get(name), kind) for name, kind in _CONVERSATION_KINDS.items()):
        raise MalformedDocument("A field of the conversation is of another type.")
    conversation: Conversation = Conversation.model_validate(fields)
    return conversation


def _is_key(key: str) -> bool:
    """Tell whether this is an id, or a tenant and an id."""
    parts = key.split("/")
    return len(parts) <= 2 and all(map(is_id, parts))


def _look_at(message: dict[str, Any], conversation: Conversation, seen: _Seen) -> None:
    """Note one message, which comes in the order of `seq`, and what is wrong with it."""
    named = shown_id(message["_id"])
    prefix, _, own_id = named.rpartition("/")
    seq, time = message.get("seq"), message.get("created_at")
    another = message.get("user_id") != conversation.user_id
    if another and isinstance(seq, int) and seq > conversation.last_seq:
        seen.remains.append((message["_id"], str(message.get("user_id"))))
        return
    seen.count += 1
    if not isinstance(message["_id"], str):
        return  # named already, as one that is not well formed
    if prefix != conversation.id or not is_id(own_id):
        seen.faults.append(f"the message {named!r} has an id that is not well formed")
    if not isinstance(seq, int) or not isinstance(time, datetime):
        return
    if seq < 1:
        seen.faults.append(f"the message {own_id} has seq {seq}")
    elif seq == seen.last_seq:
        seen.faults.append(f"seq {seq} stands twice")
    seen.last_seq = seq
    if another:
        seen.others.append(message["_id"])
    if seen.last_time is not None and time < seen.last_time:
        seen.faults.append(f"created_at runs backwards at seq {seq}")
    seen.last_time = time
    seen.newest = max(time, seen.newest or time)
