"""Following a history, or a list, while it changes.

The invariants, each proved in tests/integration/test_live.py. Whatever the doorbell loses:

- A message is delivered once, in the order of `seq`, and none is left out.
- A reader that keeps the messages by their `seq`, puts in those of `message` and of `updated`, and takes out
  those that `deleted` names, has the history.
- A reader that was away goes on after the latest `seq` that it has, and learns also what was deleted or
  replaced meanwhile (`history/rewrites.py`).
- Memory is that of one part, however slow the reader is: nothing is read before it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from service.database import Change
from service.errors import ConversationNotFound, DatabaseUnavailable, MalformedDocument
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import reading, records, rewrites
from service.history.reading import HistoryFilter, MessagePage
from service.history.records import STATE_FIELDS, ConversationRecord, ConversationState
from service.history.rewrites import Rewrite
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.tenancy import ConversationKey, ConversationRef, OwnerKey, TenantScope, local_id, tenant_of

_FIELDS = tuple({*STATE_FIELDS, *rewrites.FIELDS, "created_at"})
# The pause after a look that the database did not answer.
_AGAIN_S = 1.0

EventKind = Literal["message", "updated", "deleted", "head", "gone", "created", "changed"]


@dataclass(frozen=True)
class LiveEvent:
    """What happened. `position`, if it is given, is the `seq` after which a reader that has this goes on."""

    kind: EventKind
    data: Json | ConversationRecord = field(default_factory=dict)
    position: int | None = None


# -- one conversation ------------------------------------------------------------------------------


async def follow(
    store: ConversationStore, ref: ConversationRef, after: int | None
) -> AsyncIterator[list[LiveEvent]]:
    """Yield what happens to a history, in parts; see `ChatService.follow_chat_history`."""
    tail = _Tail(store, ref, after)
    # The bell is there before the first look, so nothing that happens after that look is missed.
    with store.doorbell.hearing(ref.key) as bell:
        while not bell.closed:
            try:
                async for part in tail.look():
                    yield part
                    if bell.closed:
                        return
                if tail.gone:
                    return
            except DatabaseUnavailable:
                if not tail.began:
                    raise
                # The reader keeps what it has, and its connection; the next look goes on at the same place.
                await bell.wait(_AGAIN_S)
                continue
            await bell.wait()


class _Tail:
    """One reader's place in a history: what it has, and what it knows of."""

    def __init__(self, store: ConversationStore, ref: ConversationRef, after: int | None) -> None:
        self._store = store
        self._ref = ref
        self._position = after
        # The `rewrites` that the reader was told of, and the creation of the conversation that it reads.
        self._told: int | None = None
        self._created_at: Any = None
        self._at_head = False
        self.began = False
        self.gone = False

    async def look(self) -> AsyncIterator[list[LiveEvent]]:
        """Yield what is new since the last look: first what was deleted or replaced, then what follows."""
        try:
            async with self._store.reading():
                raw = await self._store.find(self._ref, fields=_FIELDS)
        except ConversationNotFound:
            if not self.began:
                raise
            self.gone = True
            yield [LiveEvent("gone")]
            return
        of, fields = records.state(raw), bson_codec.decode_anything(raw)
        if not self.began:
            self._begin(of, fields)
        elif fields.get("created_at") != self._created_at:
            self.gone = True  # it was deleted, and another one has its id
            yield [LiveEvent("gone")]
            return
        for rewrite in self._untold(of, fields):
            async for part in self._rewritten(of, rewrite):
                yield part
        self._told = fields.get("rewrites", 0)
        async for part in self._new(of):
            yield part
        if not self._at_head:
            self._at_head = True
            yield [LiveEvent("head", {"last_seq": of.last_seq}, self._position)]

    def _begin(self, of: ConversationState, fields: Json) -> None:
        self.began, self._created_at = True, fields.get("created_at")
        if self._position is None:
            self._position, self._told = of.last_seq, fields.get("rewrites", 0)

    def _untold(self, of: ConversationState, fields: Json) -> list[Rewrite]:
        """Return the parts of which the reader does not know that they were changed."""
        assert self._position is not None
        if self._told is not None:
            if not rewrites.read(fields) and self._told != fields.get("rewrites", 0):
                return [Rewrite(0, 0, 0, of.last_seq)]  # changed in a way that notes no part
            return [each for each in rewrites.read(fields) if each.number > self._told]
        if self._position > of.last_seq:
            # No message of this conversation has that seq, so the reader has those of one that was deleted.
            return [Rewrite(0, 0, 0, self._position)]
        return [each for each in rewrites.read(fields) if each.last_seq >= self._position]

    async def _rewritten(self, of: ConversationState, rewrite: Rewrite) -> AsyncIterator[list[LiveEvent]]:
        """Tell what stands in a part that the reader has, and what does not."""
        assert self._position is not None
        part = SeqRange(of.key, rewrite.low, min(rewrite.high, self._position), owner=of.owner)
        checked = part.low
        if part.low < part.high:
            async for messages in reading.parts(self._store, part.clip(0, of.last_seq)):
                events: list[LiveEvent] = []
                for message in messages:
                    events += _deleted(checked, message["seq"] - 1)
                    events.append(LiveEvent("updated", message))
                    checked = message["seq"]
                if events:
                    yield events
            if rest := _deleted(checked, part.high):
                yield rest
        if self._told is None:
            self._position = min(self._position, of.last_seq)

    async def _new(self, of: ConversationState) -> AsyncIterator[list[LiveEvent]]:
        """Deliver what follows, up to the `last_seq` that was read with what was told of deletions.

        A message that was appended later may stand behind a deletion that the reader does not know of, and
        would then be taken for a sign that it does.
        """
        assert self._position is not None
        part = SeqRange(of.key, self._position, of.last_seq, owner=of.owner)
        if part.low >= part.high:
            return
        async for messages in reading.parts(self._store, part):
            if messages:
                self._position = messages[-1]["seq"]
                yield [LiveEvent("message", each, each["seq"]) for each in messages]
        self._position = of.last_seq


def _deleted(low: int, high: int) -> list[LiveEvent]:
    return [LiveEvent("deleted", {"after": low, "upto": high})] if low < high else []


async def wait_for_page(
    store: ConversationStore, ref: ConversationRef, which: HistoryFilter, *, limit: int | None, seconds: int
) -> MessagePage[Json]:
    """Return a page as soon as it has a message, or an empty one after so long."""
    until = asyncio.get_running_loop().time() + seconds
    with store.doorbell.hearing(ref.key) as bell:
        while True:
            found = await reading.page(store, ref, which, limit=limit, last=None, order="asc")
            left = until - asyncio.get_running_loop().time()
            if found.messages or left <= 0 or bell.closed:
                return found
            await bell.wait(left)


# -- a list of conversations -----------------------------------------------------------------------


async def follow_list(
    store: ConversationStore, scope: TenantScope, user_id: str | None
) -> AsyncIterator[list[LiveEvent]]:
    """Yield what happens to the conversations of a user, or of the tenant; see `ChatService.follow_list`."""
    owner = None if user_id is None and scope.user_id is None else scope.owner_key(user_id or "")
    with store.doorbell.hearing_all() as bell:
        yield [LiveEvent("head")]
        while True:
            await bell.wait()
            if bell.closed:
                return
            if bell.lost:
                bell.lost = False
                yield [LiveEvent("head")]
            while bell.pending:
                _, change = bell.pending.popitem(last=False)
                if tenant_of(change.key) != scope.tenant:
                    continue
                try:
                    news = await _news(store, change, owner)
                except DatabaseUnavailable:
                    bell.lose()
                    await asyncio.sleep(_AGAIN_S)
                    break
                if news:  # a part without any would tell that a stranger's conversation has changed
                    yield news


async def _news(store: ConversationStore, change: Change, owner: OwnerKey | None) -> list[LiveEvent]:
    """Read a conversation that was changed, and say what it means for the list of this owner, or of all."""
    ref = ConversationRef(ConversationKey(change.key), owner)
    try:
        async with store.deadline():
            found = records.conversation(await store.find(ref))
    except ConversationNotFound:
        if change.kind == "deleted" and owner in {None, change.owner}:
            return [LiveEvent("deleted", {"id": local_id(change.key)})]
        return []
    except MalformedDocument:
        return []  # the list leaves it out, too, and logs it
    if change.kind in {"deleted", "removed"}:
        return []  # another one has its id already, and is told as created
    return [LiveEvent("created" if change.kind == "created" else "changed", found)]
