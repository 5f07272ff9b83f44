"""The floor's other half: the same database operations through bare Motor, in a process of its own.

Reads a line of JSON for each measurement from standard input and answers with one. Which reads an operation
consists of is not written down here: the service module is listened to once, and its commands repeated.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from typing import Any

from service.history.store import ConversationStore
from service.tenancy import TenantScope

os.environ.setdefault("MOTOR_MAX_WORKERS", "32")

from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import monitoring
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from benchmarks import operations
from benchmarks.operations import Operation
from service.chat_service import ChatService
from service.database import Database
from service.settings import Settings

_ids = itertools.count()


class Recorder(monitoring.CommandListener):
    """Keeps the find commands that the service module sends."""

    def __init__(self) -> None:
        self.finds: list[Any] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        """Keep it, if it is a find."""
        if event.command_name == "find":
            self.finds.append(event.command)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Nothing to keep."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Nothing to keep."""


async def record(url: str) -> dict[str, list[Any]]:
    """Return the finds of every read operation, as the service module asks them."""
    recorder = Recorder()
    monitoring.register(recorder)
    settings = Settings(mongodb_url=url, database_timeout_ms=60_000)
    database = Database(settings)
    await database.open()
    monitoring._LISTENERS.command_listeners.remove(recorder)  # only that one client  # noqa: SLF001
    chat = ChatService(ConversationStore(database, settings), TenantScope())
    found: dict[str, list[Any]] = {}
    for operation in operations.OPERATIONS:
        recorder.finds.clear()
        if operation.kind in {"last", "turn"}:
            await chat.get_chat_history(operation.where, last=50)
        elif operation.kind == "list":
            await chat.list_conversations(operation.where, limit=20)
        elif operation.kind == "pages":
            after = 0
            while (page := await chat.get_chat_history(operation.where, limit=100, after=after)).has_more:
                after = page.next or 0
        elif operation.kind == "stream":
            async for _ in chat.stream_chat_history(operation.where):
                pass
        found[operation.name] = list(recorder.finds)
    await database.close()
    return found


async def append(client: Any, database: Any, conversation: str, count: int) -> None:
    """Do the append's transaction, statement for statement."""
    async with await client.start_session() as session:
        session.start_transaction(ReadConcern("snapshot"), WriteConcern("majority", j=True))
        update = {"$inc": {"last_seq": count, "message_count": count}}
        await database.conversations.update_one({"_id": conversation}, update, session=session)
        found = await database.conversations.find_one({"_id": conversation}, session=session)
        first = found["last_seq"] - count + 1
        await database.messages.insert_many(
            [
                {
                    "_id": f"{conversation}/{next(_ids)}-{os.getpid()}",
                    "conversation_id": conversation,
                    "user_id": "bench",
                    "seq": seq,
                    "created_at": found["updated_at"],
                    **operations.message(seq),
                }
                for seq in range(first, first + count)
            ],
            session=session,
        )
        await session.commit_transaction()


async def repeat(database: Any, finds: list[Any]) -> None:
    """Ask again what the service module asked."""
    for find in finds:
        cursor = database[find["find"]].find(find["filter"])
        if "sort" in find:
            cursor = cursor.sort(list(find["sort"].items()))
        await cursor.limit(find.get("limit", 0)).to_list(None)


async def main(url: str) -> None:
    """Answer measurements until there are no more."""
    finds = await record(url)
    client: Any = AsyncIOMotorClient(url, readConcernLevel="majority")
    database = client.get_default_database()
    lock = asyncio.Lock()

    def operation_of(operation: Operation) -> operations.Once:
        async def once(writer: int) -> None:
            if operation.kind != "append":
                await repeat(database, finds[operation.name])
            if operation.kind in {"append", "turn"}:
                conversation = operations.conversation(operation, writer)
                if operation.where == "one":
                    async with lock:  # bare Motor would collide, and lose its turn
                        await append(client, database, conversation, operation.size)
                else:
                    await append(client, database, conversation, operation.size)

        return once

    await operations.answer(operation_of)
    client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
