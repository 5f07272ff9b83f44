"""Watches the conversations of all processes with one change stream, in one thread of this process.

A watcher costs the embedded engine something at each write, so there is one for a process, and only while
somebody needs it (`history/doorbell.py`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pymongo

from service.database.driver import Connection, pymongo_collection
from service.documents import Conversation
from service.tenancy import OWNER_WHILE_DELETED

# The server answers after so long if nothing has changed. So long, too, the thread may outlive its watcher.
_SILENCE_MS = 1_000
# A server that does not answer at all is given up after so long.
_ANSWER_S = 10.0
_SHOWN = {
    "operationType": 1,
    "documentKey": 1,
    "fullDocument.user_id": 1,
    "updateDescription.updatedFields.user_id": 1,
    "updateDescription.updatedFields.deleted_owner": 1,
}
_PIPELINE: list[dict[str, Any]] = [
    {"$match": {"operationType": {"$in": ["insert", "update", "replace", "delete"]}}},
    {"$project": _SHOWN},
]


@dataclass(frozen=True)
class Change:
    """A conversation was created, changed or deleted, which its document may outlive until it is removed.

    `owner` is the owner of one that was deleted.
    """

    key: str
    kind: Literal["created", "changed", "deleted", "removed"]
    owner: str | None = None


async def watch(
    connection: Connection, opened: Callable[[], None], changed: Callable[[Change], None]
) -> None:
    """Call `opened`, and `changed` for each change from then on, until cancelled. Raises PyMongoError."""
    loop, ended = asyncio.get_running_loop(), threading.Event()

    def run() -> None:
        collection = pymongo_collection(Conversation)
        with collection.watch(_PIPELINE, max_await_time_ms=_SILENCE_MS) as stream:
            loop.call_soon_threadsafe(opened)
            while not ended.is_set():
                with pymongo.timeout(_ANSWER_S):
                    document = stream.try_next()
                change = _change_of(document) if document is not None else None
                if change is not None and not ended.is_set():
                    loop.call_soon_threadsafe(changed, change)

    try:
        await connection.run_without_limit(run)
    finally:
        ended.set()


def _change_of(document: Mapping[str, Any]) -> Change | None:
    """Return a change as the service means it, or None for one that tells nothing new.

    A conversation that is being deleted or imported has no owner; to take its owner away deletes it.
    """
    key, operation = document.get("documentKey", {}).get("_id"), document.get("operationType")
    if not isinstance(key, str):
        return None
    if operation == "delete":
        return Change(key, "removed")
    updated = document.get("updateDescription", {}).get("updatedFields", {})
    if operation == "insert":
        owner = document.get("fullDocument", {}).get("user_id")
        return None if owner == OWNER_WHILE_DELETED else Change(key, "created")
    if "user_id" not in updated:
        return Change(key, "changed")
    if updated["user_id"] == OWNER_WHILE_DELETED:
        return Change(key, "deleted", updated.get("deleted_owner"))
    return Change(key, "created")
