"""The audit trail, where `CHAT_AUDIT_DAYS` asks for it: who read, changed or deleted which conversation.

Without content: a principal's name, a method and a route's template, the ids of the conversation and the
user, the answer's status. Entries are written a moment later, many at once, and removed by the database after
so many days (a TTL index). While the database is away they wait, up to `_WAITING_MOST`; what is beyond that
is lost, and the log says how many.
"""

from __future__ import annotations

import asyncio
import contextlib
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
log = structlog.get_logger(__name__)


class Audit:
    """Takes notes, and writes them in the background between `start` and `stop`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[bytes] = []
        self._lost = 0
        self._writer: asyncio.Task[None] | None = None

    def note(self, **facts: Any) -> None:
        """Take a note of a call; `facts` are fields of AuditEntry."""
        if len(self._waiting) >= _WAITING_MOST:
            self._lost += 1
            return
        entry = {"_id": bson.ObjectId(), "at": datetime.now(UTC), **facts}
        self._waiting.append(bson.encode(entry))

    def start(self) -> None:
        """Begin to write."""
        self._writer = asyncio.create_task(self._write_always())

    async def stop(self) -> None:
        """Write what waits, if the database lets us, and end."""
        if self._writer is not None:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writer
        await self._write(seconds=_LAST_S)

    async def _write_always(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
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
