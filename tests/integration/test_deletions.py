"""A deletion walks over messages, and not over the seqs that earlier deletions left empty."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from service.chat_service import ChatService
from service.database import Database
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, new_id
from tests.mongo_proxy import MongoProxy, mongo_proxied

NOW = datetime.now(UTC)


@pytest.fixture(params=[False, True], ids=["embedded", "mongodb"])
async def proxy(service: Service, request: pytest.FixtureRequest) -> AsyncIterator[MongoProxy]:
    with mongo_proxied(service.database_url, new_id("holes"), hide_engine=request.param) as started:
        yield started
        started.forget()


@pytest.fixture
async def chat(proxy: MongoProxy) -> AsyncIterator[ChatService]:
    settings = Settings(_env_file=None, mongodb_url=proxy.url)
    database = Database(settings)
    await database.open()
    yield ChatService(ConversationStore(database, settings), TenantScope())
    await database.close()


def fill(proxy: MongoProxy, last_seq: int, *, count: int = 1_100) -> None:
    """Store a conversation with 1,000 messages at its beginning, and 100 at its end."""
    about: dict[str, Any] = {"user_id": "ada", "created_at": NOW}
    seqs = [*range(1, 1_001), *range(last_seq - 99, last_seq + 1)]
    proxy.latest.messages.insert_many(
        {"_id": f"c/{seq}", "conversation_id": "c", "seq": seq, "role": "user", **about} for seq in seqs
    )
    numbers = {"last_seq": last_seq, "message_count": count}
    proxy.latest.conversations.insert_one({"_id": "c", "updated_at": NOW, "metadata": {}, **about, **numbers})
    proxy.forget()


async def test_a_long_gap_costs_no_transactions(proxy: MongoProxy, chat: ChatService) -> None:
    fill(proxy, 10**8)
    # Without the rule it would be 100,000 transactions, which the test must not wait for.
    async with asyncio.timeout(60):
        assert await chat.delete_messages("c", after=995) == 105
    assert (await chat.get_conversation("c")).message_count == 995
    # One looks at the conversation, and one has the messages.
    assert len(proxy.commands("commitTransaction")) == 2
    assert [each["seq"] for each in proxy.latest.messages.find().sort("seq")] == [*range(1, 996)]
    proxy.latest.conversations.delete_many({})
    proxy.latest.messages.delete_many({})
    fill(proxy, 10**8)
    async with asyncio.timeout(60):
        await chat.delete_conversation("c")
    assert not proxy.latest.messages.count_documents({})
    assert not proxy.latest.conversations.count_documents({})
    # It is gone, is taken up, loses its messages in two parts, and is removed.
    assert len(proxy.commands("commitTransaction")) == 5


async def test_of_a_long_history_a_gap_is_crossed_in_growing_steps(
    proxy: MongoProxy, chat: ChatService
) -> None:
    fill(proxy, 40_000, count=1_000_000)
    assert await chat.delete_messages("c", after=0) == 1_100
    assert (await chat.get_conversation("c")).message_count == 1_000_000 - 1_100
    assert not proxy.latest.messages.count_documents({})
    # One looks, two have the messages, and the last one finds nothing more.
    assert len(proxy.commands("commitTransaction")) <= 4


@pytest.mark.parametrize("count", [1_100, 1_000_000])
async def test_a_page_across_a_long_gap_is_read_well_within_its_deadline(
    proxy: MongoProxy, chat: ChatService, count: int
) -> None:
    gap = 10**8 if count == 1_100 else 10**6
    fill(proxy, gap, count=count)
    page = await chat.get_chat_history("c", after=995, limit=50)
    assert [each["seq"] for each in page.messages] == [*range(996, 1_001), *range(gap - 99, gap - 54)]
    page = await chat.get_chat_history("c", before=gap - 97, order="desc", limit=50)
    assert [each["seq"] for each in page.messages] == [gap - 98, gap - 99, *range(1_000, 952, -1)]
    # A time is found across it, too.
    assert len((await chat.get_chat_history("c", until=NOW, after=995, limit=50)).messages) == 50
    parts = [each async for part in chat.stream_chat_history("c", after=995) for each in part]
    assert len(parts) == 105
    # At 4,096 seqs each, one page across the longer gap would be 24,000 reads.
    assert len(proxy.commands("find")) < 1_500
