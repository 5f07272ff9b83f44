"""A range of a conversation's messages by `seq`, and reading it: the lowest layer of every read.

A range with an owner leaves out the messages of other users, because an interrupted import of an older
version may have left some under the same conversation id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pymongo import ASCENDING, DESCENDING

from service.database import Budget, Transaction
from service.documents import Message
from service.formats import bson_codec
from service.formats.openai_items import Role
from service.formats.strict_json import Json
from service.history import ownership, records
from service.history.records import ConversationState
from service.history.store import ConversationStore
from service.settings import WINDOW_SEQS_MAX
from service.tenancy import ConversationKey, OwnerKey, message_document_id

ASC = [("seq", ASCENDING)]
DESC = [("seq", DESCENDING)]
# By so many seqs a window may be wider for each empty window before it. An empty window costs the embedded
# engine as much as about 20 messages do, so a window that turns out to be full costs about as much as the
# empty ones before it together.
_WIDER_BY_SEQS = 32


@dataclass(frozen=True)
class SeqRange:
    """Part of a history: `low` < seq <= `high`, of one role or of all.

    `owner`, where it is known, is the user whom the messages must belong to. `messages`, where it is known,
    is how many messages there are at most.
    """

    key: ConversationKey
    low: int
    high: int
    role: Role | None = None
    owner: OwnerKey | None = None
    messages: int | None = None

    @classmethod
    def whole(cls, of: ConversationState) -> SeqRange:
        """Return the whole history of a conversation."""
        return cls(of.key, 0, of.last_seq, owner=of.owner, messages=of.message_count)

    def filter(self) -> Json:
        """Return a filter that one index serves, bounded on both sides.

        With a role it is the index of roles, in which `role` stands before `seq`.
        """
        query: Json = {"conversation_id": self.key}
        if self.role is not None:
            query["role"] = self.role
        query["seq"] = {"$gt": self.low, "$lte": self.high}
        return query

    def clip(self, low: int, high: int) -> SeqRange:
        """Return the part of it that lies in `low` < seq <= `high`."""
        return replace(self, low=max(low, self.low), high=min(high, self.high))

    def rest_after(self, seq: int, backwards: bool) -> SeqRange:
        """Return the part of it that is left to read after this seq."""
        return self.clip(self.low, seq - 1) if backwards else self.clip(seq, self.high)


async def read(
    store: ConversationStore,
    part: SeqRange,
    count: int,
    *,
    backwards: bool,
    transaction: Transaction | None = None,
    budget: Budget | None = None,
    fields: Sequence[str] | None = None,
) -> list[bytes]:
    """Read up to `count` messages in order, in one query, or in windows where a limit saves nothing.

    On the embedded engine a query costs what it matches, so it may match little more than `count`. Where
    deletions, or another role, left nothing in a window, the next one is wider (`_next_width`). With `fields`
    the messages have only these, which must have the `user_id` if the range has an owner.
    """
    database, sort = store.database, DESC if backwards else ASC
    session = transaction.session if transaction else None
    if not database.limit_reads_whole_match:
        query = part.filter() if part.owner is None else {**part.filter(), "user_id": part.owner}
        return await database.read(
            Message, query, sort=sort, limit=count, session=session, budget=budget, fields=fields
        )
    found: list[bytes] = []
    # `low` to `high` is the part that is not read yet. The first window is as wide as the count, which is all
    # where no message was deleted.
    low, high, width, empty = part.low, part.high, count, 0
    while low < high and len(found) < count and not (budget and budget.spent):
        if backwards:
            window = part.clip(max(low, high - width), high)
        else:
            window = part.clip(low, min(high, low + width))
        left = count - len(found)
        read_now = await database.read(
            Message,
            window.filter(),
            sort=sort,
            limit=left,
            session=session,
            budget=budget,
            fields=fields,
        )
        # The owner is not in the filter, because with one more field this engine reads the whole conversation
        # (10 ms become 460 of 5,000 messages). A seq is unique, so up to `last_seq` all are the owner's,
        # unless somebody changed one by hand.
        own = read_now if part.owner is None else ownership.all_owned_by(part.owner, part.key, read_now)
        found += own
        end = window.low if backwards else window.high
        if len(own) < left == len(read_now):
            # The limit has counted another user's messages, so the window has a rest behind the last of them.
            last = bson_codec.decode_anything(read_now[-1])["seq"]
            end = last - 1 if backwards else last
        low, high = (low, end) if backwards else (end, high)
        empty = 0 if read_now else empty + 1
        width = _next_width(part, count, width, empty)
    return found


def _next_width(part: SeqRange, count: int, width: int, empty: int) -> int:
    """Return how many seqs the next window has, after so many empty windows in a row.

    Each window is twice as wide as the one before, up to WINDOW_SEQS_MAX, beyond which a dense stretch behind
    a gap would cost too much. In a longer gap the bound grows with the cost of the empty windows. Once it
    exceeds the number of messages, the rest is asked for at once, however many seqs that are. So a gap costs
    its square root, and never more than the messages do. A window that was not empty ends the growth.
    """
    bound = max(count, WINDOW_SEQS_MAX, empty * _WIDER_BY_SEQS)
    if empty and width >= WINDOW_SEQS_MAX and part.messages is not None and part.messages <= bound:
        return part.high - part.low
    return min(2 * width, bound)


async def find_message(
    store: ConversationStore, of: ConversationState, message_id: str, transaction: Transaction | None = None
) -> Json | None:
    """Find a message of this conversation and of its owner, as callers see it."""
    found = await find_stored(store, of, message_id, transaction)
    return None if found is None else records.message(found)


async def find_stored(
    store: ConversationStore, of: ConversationState, message_id: str, transaction: Transaction | None = None
) -> bytes | None:
    """Find a message of this conversation and of its owner, undecoded.

    A message that an interrupted import left under the same conversation id is not found. The embedded engine
    is asked by `_id` alone, which begins with the conversation's own, because each further field of the
    filter costs it more than the find (1.2 ms become 4 and 4.6); the owner is looked at here.
    """
    named: Json = {"_id": message_document_id(of.key, message_id)}
    if not store.database.embedded_engine:
        named |= {"conversation_id": of.key, "user_id": of.owner}
    session = transaction.session if transaction else None
    found = await store.database.read(Message, named, limit=1, session=session)
    return found[0] if found and ownership.owned_by(of.owner, found[0]) else None


async def has_message(
    store: ConversationStore, of: ConversationState, message_id: str | None, transaction: Transaction
) -> bool:
    """Tell whether the conversation has this message, or any message at all."""
    if message_id is not None:
        return await find_message(store, of, message_id, transaction) is not None
    return bool(await read(store, SeqRange.whole(of), 1, backwards=True, transaction=transaction))
