"""The state of the service as an operator wants to see it, for the console."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from service.documents import Conversation, Message
from service.history.store import ConversationStore


@dataclass(frozen=True)
class ServiceState:
    """The state of this process and its database.

    The counts and the size are of all tenants, and None where they were not asked for. `swept_at` is None
    until a sweep of this process has ended well.
    """

    engine: str
    ready: bool
    why_not_ready: str
    missing_indexes: list[str]
    swept_at: datetime | None
    conversations: int | None = None
    messages: int | None = None
    data_bytes: int | None = None


async def service_state(store: ConversationStore, *, whole: bool) -> ServiceState:
    """Return the state, with counts and sizes if `whole`. Raises DatabaseUnavailable only if `whole`."""
    database = store.database
    ready = await database.is_ready()
    conversations = messages = size = None
    if whole and ready:
        async with store.deadline():
            conversations = await database.estimated_count(Conversation)
            messages = await database.estimated_count(Message)
            size = await _data_bytes(store)
    return ServiceState(
        engine=database.engine,
        ready=ready,
        why_not_ready="" if ready else database.why_not_ready,
        missing_indexes=database.indexes.missing if ready else [],
        swept_at=store.swept_at,
        conversations=conversations,
        messages=messages,
        data_bytes=size,
    )


async def _data_bytes(store: ConversationStore) -> int | None:
    """Return the bytes on disk. They are of files where the engine's `dbStats` would read every document."""
    if store.settings.mongodb_url is None:
        return await asyncio.to_thread(_bytes_below, store.settings.data_dir)
    if store.database.embedded_engine:
        return None  # an engine that another process started, whose directory is not known here
    statistics = await store.database.statistics()
    return int(statistics["storageSize"]) + int(statistics["indexSize"])


def _bytes_below(directory: Path) -> int:
    return sum(each.stat().st_size for each in directory.rglob("*") if each.is_file())
