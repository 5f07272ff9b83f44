"""The audit trail, where `CHAT_AUDIT_DAYS` asks for it: who read, changed or deleted which conversation.

Without content: a principal's name, a method and a route's template, the ids of the conversation and the
user, the answer's status, the caller's address. Entries are written within a second, many at once, so a
`kill -9` may lose the last second's. The database removes them after so many days (a TTL index). While it is
away they wait, up to `_WAITING_MOST`; what is beyond that is lost, and the log says how many.

Calls that are refused before anything is done cost a stranger nothing, so they must not fill the trail.
Of each kind (status, principal, address) the first in a minute is an entry; all further ones are one more
entry, with `calls`, when the minute is over. `_KINDS_MOST` kinds a minute are told apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Hashable
from datetime import UTC, datetime
from typing import Any

import bson
import structlog
from pymongo.errors import DuplicateKeyError

from service.database import Database, Transaction
from service.documents import AuditEntry
from service.errors import ChatHistoryError

_EVERY_S = 1.0
_AT_ONCE = 500
# How long the last entries may take when the service is told to stop.
_LAST_S = 1.0
_WAITING_MOST = 50_000
_MINUTE_S = 60.0
_KINDS_MOST = 100
log = structlog.get_logger(__name__)


class Audit:
    """Takes notes, and writes them in the background between `start` and `stop`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[bytes] = []
        self._lost = 0
        self._refused: dict[Hashable, dict[str, Any]] = {}
        self._minute_began = time.monotonic()
        self._writer: asyncio.Task[None] | None = None

    def note(self, **facts: Any) -> None:
        """Take a note of a call; `facts` are fields of AuditEntry."""
        if len(self._waiting) >= _WAITING_MOST:
            self._lost += 1
            return
        entry = {"_id": bson.ObjectId(), "at": datetime.now(UTC), **facts}
        self._waiting.append(bson.encode(entry))

    def note_refused(self, kind: Hashable, **facts: Any) -> None:
        """Take a note of a refused call, or count it, if one of its kind was noted this minute."""
        self._end_minute_if_over()
        if kind not in self._refused and len(self._refused) >= _KINDS_MOST:
            kind, facts = None, {**facts, "principal": "(several)", "tenant": "", "address": None}
        counted = self._refused.get(kind)
        if counted is None:
            self._refused[kind] = {**facts, "calls": 0}
            self.note(**facts)
        else:
            counted["calls"] += 1

    def _end_minute_if_over(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._minute_began < _MINUTE_S:
            return
        for counted in self._refused.values():
            if counted["calls"]:
                self.note(**counted)
        self._refused.clear()
        self._minute_began = time.monotonic()

    def start(self) -> None:
        """Begin to write."""
        self._writer = asyncio.create_task(self._write_always())

    async def stop(self) -> None:
        """Write what waits, if the database lets us, and end."""
        if self._writer is not None:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writer
        self._end_minute_if_over(now=True)
        await self._write(seconds=_LAST_S)
        if self._waiting:
            log.error("audit_lost", entries=len(self._waiting))

    async def _write_always(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                self._end_minute_if_over()
                await self._write()
            except Exception as error:  # or nobody would write any more, without a word
                log.error("audit_failed", exc_info=error)

    async def _write(self, seconds: float | None = None) -> None:
        while self._waiting:
            entries = self._waiting[:_AT_ONCE]

            async def insert(transaction: Transaction, entries: list[bytes] = entries) -> None:
                await self._database.insert(AuditEntry, entries, transaction.session)

            try:
                async with self._database.call(seconds=seconds):
                    # Where they are there already, it was an attempt whose answer was lost.
                    with contextlib.suppress(DuplicateKeyError):
                        await self._database.transaction(insert)
            except ChatHistoryError as error:
                log.warning("audit_waits", entries=len(self._waiting), problem=error.slug())
                return
            del self._waiting[: len(entries)]
        if self._lost:
            log.error("audit_lost", entries=self._lost)
            self._lost = 0
