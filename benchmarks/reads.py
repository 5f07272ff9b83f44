"""Measures the CPU that reads cost this process: from the question to the JSON, without HTTP.

`python -m benchmarks.reads mongodb://…` (as `chat-history mongo-url` prints it) stores a user's conversations
in a database of its own, `bench_reads`, and drops it in the end. Each figure is the median of interleaved
rounds in milliseconds of CPU, so that a busy machine moves all of them alike.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from pymongo import MongoClient

from service.api import bodies
from service.chat_service import ChatService
from service.database import Database
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope

_ROUNDS = 11
_USER, _TALK = "bench", "bench-talk"
Read = Callable[[ChatService], Awaitable[object]]


async def _list(chat: ChatService) -> object:
    page = await chat.list_conversations(_USER, limit=200)
    assert len(page.conversations) == 200
    return bodies.json_response(bodies.conversation_page(page))


def _page(**asked: Any) -> Read:
    async def read(chat: ChatService) -> object:
        page = await chat.get_chat_history(_TALK, **asked)
        return bodies.json_response(bodies.message_page(page, page.messages))

    return read


READS: dict[str, Read] = {
    "list of 200": _list,
    "page of 1,000": _page(limit=1_000),
    "last 50": _page(last=50),
}


async def _fill(chat: ChatService) -> None:
    for n in range(200):
        await chat.get_or_create_conversation(_USER, f"bench-{n}", title=f"Talk {n}", metadata={"n": n})
    await chat.get_or_create_conversation(_USER, _TALK)
    text = "The ferry leaves at a quarter past nine, and the tide is high at noon. " * 4
    for _ in range(2):
        await chat.add_messages(_TALK, [{"role": "user", "content": text} for _ in range(500)])


async def measure(url: str) -> dict[str, float]:
    """Return the median CPU of each read in milliseconds."""
    address = urlsplit(url)._replace(path="/bench_reads").geturl()
    settings = Settings(_env_file=None, mongodb_url=address)
    database = Database(settings)
    await database.open(indexes="build")
    spent: dict[str, list[float]] = {}
    try:
        store = ConversationStore(database, settings)
        await _fill(ChatService(store, TenantScope()))
        await store.close()
        for _ in range(_ROUNDS):
            for name, read in READS.items():
                store = ConversationStore(database, settings)
                chat = ChatService(store, TenantScope())
                begin = time.process_time()
                await read(chat)
                spent.setdefault(name, []).append((time.process_time() - begin) * 1_000)
                await store.close()
    finally:
        await database.close()
        with MongoClient[dict[str, Any]](address) as operator:
            operator.drop_database("bench_reads")
    return {name: statistics.median(each) for name, each in spent.items()}


def main() -> None:
    """Print the figures."""
    for name, milliseconds in asyncio.run(measure(sys.argv[1])).items():
        print(f"{name:24}{milliseconds:8.2f} ms")


if __name__ == "__main__":
    main()
