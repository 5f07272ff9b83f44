"""What people use instead, as it is: in the client's process, without HTTP; in an environment of its own.

LangChain's `MongoDBChatMessageHistory`, and the OpenAI Agents SDK's `MongoDBSession` and `SQLAlchemySession`
(SQLite, WAL, synchronous FULL). Reads lines of JSON and answers with lines of JSON, as `worker` does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import operations
from benchmarks.operations import Operation


class LangChain:
    """It has no asynchronous client: each call runs in a thread, as its own `aadd_messages` does."""

    def __init__(self, url: str) -> None:
        from langchain_mongodb import MongoDBChatMessageHistory

        def make(name: str) -> Any:
            return MongoDBChatMessageHistory(
                url, session_id=name, database_name="langchain", collection_name="history"
            )

        self._make = make
        self._open: dict[str, Any] = {}

    def _history(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._make(name)
        return self._open[name]

    async def append(self, name: str, count: int) -> None:
        """Add messages."""
        from langchain_core.messages import AIMessage, HumanMessage

        messages = [
            (AIMessage if n % 2 else HumanMessage)(operations.message(n)["content"]) for n in range(count)
        ]
        await asyncio.to_thread(self._history(name).add_messages, messages)

    async def last(self, name: str) -> None:
        """Read the newest 50, which is to read all of them and keep 50."""
        assert await asyncio.to_thread(lambda: self._history(name).messages[-50:])


class Agents:
    """A session of the Agents SDK, made by name."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self._make = make
        self._open: dict[str, Any] = {}

    def _session(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._make(name)
        return self._open[name]

    async def append(self, name: str, count: int) -> None:
        """Add items."""
        await self._session(name).add_items([operations.message(n) for n in range(count)])

    async def last(self, name: str) -> None:
        """Read the newest 50."""
        assert await self._session(name).get_items(limit=50)


def contestant(which: str, url: str, directory: str) -> Any:
    """Make one of the three."""
    if which == "langchain":
        return LangChain(url)
    if which == "agents-mongodb":
        from agents.extensions.memory import MongoDBSession
        from pymongo.asynchronous.mongo_client import AsyncMongoClient

        client: Any = AsyncMongoClient(url)
        return Agents(lambda name: MongoDBSession(name, client=client, database="agents"))
    from agents.extensions.memory import SQLAlchemySession
    from sqlalchemy import event
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(f"sqlite+aiosqlite:///{Path(directory) / 'sessions.db'}")

    def durable(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    event.listen(engine.sync_engine, "connect", durable)

    return Agents(lambda name: SQLAlchemySession(name, engine=engine, create_tables=True))


async def main(which: str, url: str, directory: str) -> None:
    """Fill what is read, and answer measurements until there are no more."""
    them = contestant(which, url, directory)
    for length in (100, 10_000):
        for _ in range(length // 100):
            await them.append(f"long-{length}", 100)

    def once_of(operation: Operation) -> operations.Once:
        async def once(writer: int) -> None:
            if operation.kind in {"last", "turn"}:
                await them.last(operation.where)
            if operation.kind in {"append", "turn"}:
                await them.append(f"writer-{writer}", operation.size)

        return once

    await operations.answer(once_of)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
