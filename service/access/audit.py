"""The audit trail, where `CHAT_AUDIT_DAYS` asks for it: who read, changed or deleted which conversation.

An entry has no content: it has the principal's name, the method and the template of the route, the ids of the
conversation and the user, the status of the answer, and the caller's address. Entries are written in batches,
once a second, so a `kill -9` may lose the entries of the last second. A TTL index removes entries after
`CHAT_AUDIT_DAYS`. While the database is away, up to `_WAITING_MOST` entries wait. Further entries are lost,
and the log says how many.

Refused calls cost a stranger nothing, so they must not fill the trail. Of each kind (status, principal,
address) the first call in a minute is an entry. All further calls of the kind are one more entry, with their
number in `calls`, when the minute is over. At most `_KINDS_MOST` kinds are distinguished in a minute.
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
    """Collects entries, and writes them in the background between `start` and `stop`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[bytes] = []
        self._lost = 0
        self._refused: dict[Hashable, dict[str, Any]] = {}
        self._minute_began = time.monotonic()
        self._writer: asyncio.Task[None] | None = None

    def note(self, **facts: Any) -> None:
        """Add an entry for a call; `facts` are fields of AuditEntry."""
        if len(self._waiting) >= _WAITING_MOST:
            self._lost += 1
            return
        entry = {"_id": bson.ObjectId(), "at": datetime.now(UTC), **facts}
        self._waiting.append(bson.encode(entry))

    def note_refused(self, kind: Hashable, **facts: Any) -> None:
        """Add an entry for a refused call, or count the call if its kind has an entry in this minute."""
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
        """Start to write entries."""
        self._writer = asyncio.create_task(self._write_always())

    async def stop(self) -> None:
        """Write the entries that wait, if the database answers in time, and end."""
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
            except (
                Exception
            ) as error:  # without this, one error would end the task, and no further entry would be written
                log.error("audit_failed", exc_info=error)

    async def _write(self, seconds: float | None = None) -> None:
        while self._waiting:
            entries = self._waiting[:_AT_ONCE]

            async def insert(transaction: Transaction, entries: list[bytes] = entries) -> None:
                await self._database.insert(AuditEntry, entries, transaction.session)

            try:
                async with self._database.deadline(seconds=seconds):
                    # A duplicate means that an earlier attempt stored these entries, and its answer was lost.
                    with contextlib.suppress(DuplicateKeyError):
                        await self._database.transaction(insert)
            except ChatHistoryError as error:
                log.warning("audit_waits", entries=len(self._waiting), problem=error.slug())
                return
            del self._waiting[: len(entries)]
        if self._lost:
            log.error("audit_lost", entries=self._lost)
            self._lost = 0
