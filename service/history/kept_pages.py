"""What this process has read, encoded as JSON, so that it is not read, or not encoded, again.

A read finds the conversation in the database first, to know whose it is. Its `rewrites` grows with each
change that is no append. So while it is the same, what is kept of the history is as it is stored, and only
what was appended since must be read. That holds across processes. A conversation of a list is read again each
time, and what was made of the same bytes before is answered. Three things bound what is kept:

- It has at most `CHAT_CACHE_BYTES`; what was not read for the longest time goes first.
- Nothing is kept for longer than KEPT_S, because an operator may change a message by hand in the shell, which
  moves no counter.
- While anything is kept, the process looks every third of a second whether erasures go on or have ended, its
  own or another process's, and then drops all of it. It also does if it cannot look. So an erased user's
  messages are in the memory of no process a second after the erasure has ended.

`tests/integration/test_kept_pages.py` proves each of these.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from service import clock
from service.documents import Erasure, ErasureReceipt
from service.errors import ChatHistoryError
from service.formats import bson_codec
from service.history.records import ConversationState, EncodedMessage

if TYPE_CHECKING:
    from service.database import Database

KEPT_S = 60.0
# Twice this, and what a call may take longer than its deadline, is less than a second.
_LOOK_S = 0.3
# Receipts of so long ago are looked at each time, because the clock of who wrote one may be late.
_RECEIPTS_OF = timedelta(minutes=5)
# One conversation may have this part of all.
_SHARE = 8
# About what a message takes in memory beside its JSON, and a conversation beside its document.
_OVERHEAD_BYTES = 150
_LISTED_OVERHEAD_BYTES = 2_000
K = TypeVar("K", bound=str)
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """All messages of a history in `low` < seq <= `high`, oldest first, as they stand at these `rewrites`."""

    rewrites: int
    low: int
    high: int
    messages: Sequence[EncodedMessage]
    size: int
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, rewrites: int, low: int, high: int, messages: Sequence[EncodedMessage]) -> Kept:
        """Keep messages, oldest first."""
        return cls(rewrites, low, high, messages, _size(messages))

    def extended(self, low: int, high: int, messages: Sequence[EncodedMessage]) -> Kept:
        """Return it with what stands beside it; what does not stand beside it is kept in its place."""
        if low == self.high:
            joined = [*self.messages, *messages]
            return replace(self, high=high, messages=joined, size=self.size + _size(messages))
        if high == self.low:
            joined = [*messages, *self.messages]
            return replace(self, low=low, messages=joined, size=self.size + _size(messages))
        return Kept.of(self.rewrites, low, high, messages)

    def within(self, low: int, high: int) -> Sequence[EncodedMessage]:
        """Return the messages in `low` < seq <= `high`."""
        return self.messages[self._place(low) : self._place(high)]

    def _place(self, seq: int) -> int:
        return bisect_right(self.messages, seq, key=lambda each: each.seq)

    def cut_to(self, size: int) -> Kept:
        """Return its newest messages, which are no larger together."""
        left, place = self.size, 0
        while left > size:
            left -= _size_of(self.messages[place])
            place += 1
        if not place:
            return self
        return replace(self, low=self.messages[place - 1].seq, messages=self.messages[place:], size=left)


def _size_of(message: EncodedMessage) -> int:
    return len(message.json) + _OVERHEAD_BYTES


def _size(messages: Sequence[EncodedMessage]) -> int:
    return sum(map(_size_of, messages))


@dataclass(frozen=True)
class KeptListed:
    """What was made of the document of a conversation, which stands for nothing but these bytes."""

    made: Any
    size: int
    since: float = field(default_factory=time.monotonic)


class KeptPages:
    """What one process keeps of what it has read, up to a size in bytes; 0 keeps nothing."""

    def __init__(self, database: Database, bytes_max: int) -> None:
        self._database = database
        self._bytes_max = bytes_max
        self._size = 0
        self._kept: OrderedDict[tuple[str, str | bytes], Kept | KeptListed] = OrderedDict()
        self._looking: asyncio.Task[None] | None = None
        self._receipts: set[str] = set()
        # How often everything was dropped. What was read before is not kept after.
        self.generation = 0

    def find(self, of: ConversationState) -> Kept | None:
        """Return what is kept of a history, as it is stored now, or None."""
        found = self._kept.get((of.key, of.owner))
        if not isinstance(found, Kept):
            return None
        if found.rewrites != of.rewrites or _is_old(found):
            self._drop((of.key, of.owner))
            return None
        self._kept.move_to_end((of.key, of.owner))
        return found

    def listed(self, order: K, raw: bytes, make: Callable[[bytes, K], T], generation: int) -> T:
        """Return what `make` makes of a document in a list of this order: made before, if it is kept."""
        found = self._kept.get((order, raw))
        if isinstance(found, KeptListed):
            self._kept.move_to_end((order, raw))
            made: T = found.made
            return made
        made = make(raw, order)
        # Its document, the same fields decoded, and their JSON.
        self._add((order, raw), KeptListed(made, 3 * len(raw) + _LISTED_OVERHEAD_BYTES), generation)
        return made

    def keep(self, of: ConversationState, kept: Kept | None, generation: int) -> None:
        """Keep what was read of a history, unless everything was dropped since the read began."""
        if kept is None or generation != self.generation or not self._bytes_max:
            return
        self._drop((of.key, of.owner))
        kept = kept.cut_to(self._bytes_max // _SHARE)
        if kept.messages:
            self._add((of.key, of.owner), kept, generation)

    def _add(self, name: tuple[str, str | bytes], kept: Kept | KeptListed, generation: int) -> None:
        if generation != self.generation or kept.size > self._bytes_max // _SHARE:
            return
        self._kept[name] = kept
        self._size += kept.size
        while self._size > self._bytes_max:
            self._drop(next(iter(self._kept)))
        if self._looking is None:
            # In a context of its own, because the deadline of the caller must not be that of the task.
            self._looking = asyncio.create_task(self._look(), context=contextvars.Context())

    def drop_all(self) -> None:
        """Keep nothing of what was read so far."""
        self._kept.clear()
        self._size = 0
        self.generation += 1

    def close(self) -> None:
        """Drop everything, and stop looking."""
        self.drop_all()
        if self._looking is not None:
            self._looking.cancel()

    def _drop(self, name: tuple[str, str | bytes]) -> None:
        if (dropped := self._kept.pop(name, None)) is not None:
            self._size -= dropped.size

    async def _look(self) -> None:
        """Drop what is old, and everything when somebody was erased, until nothing is kept."""
        try:
            while self._kept:
                await asyncio.sleep(_LOOK_S)
                for name in [each for each, kept in self._kept.items() if _is_old(kept)]:
                    self._drop(name)
                if await self._was_erased():
                    self.drop_all()
        finally:
            self._looking = None
            self.drop_all()

    async def _was_erased(self) -> bool:
        """Tell whether an erasure goes on, or has ended since this was asked last, or nobody knows."""
        try:
            async with self._database.deadline(seconds=_LOOK_S):
                going_on = await self._database.read(Erasure, {}, limit=1, fields=["_id"])
                lately = {"ended_at": {"$gt": clock.now() - _RECEIPTS_OF}}
                ended = await self._database.read(ErasureReceipt, lately, fields=["_id"])
        except ChatHistoryError:
            return True
        before, self._receipts = (
            self._receipts,
            {str(bson_codec.decode_anything(each)["_id"]) for each in ended},
        )
        return bool(going_on) or not self._receipts <= before


def _is_old(kept: Kept | KeptListed) -> bool:
    return time.monotonic() - kept.since > KEPT_S
