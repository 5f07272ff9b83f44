"""An export: all of a user, each conversation once, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from service.chat_service import ChatService, ListPosition
from service.errors import MalformedDocument
from service.tenancy import TenantScope
from service.user_data import exporting
from service.user_data.erasure import RemovedCounts
from tests.unit.fake_store import FakeDatabase, Json, conversation, fake_store, message

pytestmark = pytest.mark.usefixtures("documents")
NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)


def chat_of(*documents: Json) -> tuple[ChatService, FakeDatabase]:
    store, database = fake_store(documents)
    return ChatService(store, TenantScope()), database


def some(key: str, hours: int, count: int = 0) -> list[Json]:
    """Return a conversation that had activity so many hours ago, and its messages."""
    about = conversation(key, updated_at=NOW - hours * HOUR, last_seq=count, message_count=count)
    return [about, *(message(seq, key=key) for seq in range(1, count + 1))]


async def lines(
    chat: ChatService, meanwhile: Callable[[int], None] = lambda _part: None
) -> list[dict[str, Any]]:
    found: list[Json] = []
    number = 0
    async for part in exporting.export(chat, "ada"):
        found += part
        meanwhile(number)
        number += 1
    return found


def ids(found: list[Json]) -> list[str]:
    return [each["id"] for each in found if each["type"] == "conversation"]


async def test_an_export_has_a_head_the_conversations_with_their_messages_and_an_end() -> None:
    chat, _ = chat_of(*some("b", 2, 6), *some("a", 1), conversation("x", "bob"))
    found = await lines(chat)
    assert [each["type"] for each in found] == ["export", *["conversation"] * 2, *["message"] * 6, "end"]
    assert (found[0]["version"], found[0]["user_id"]) == (1, "ada")
    assert ids(found) == ["a", "b"]
    # Checkpoints are there where the conversation has any.
    assert set(found[2]) == {"type", *exporting.ExportedConversation.model_fields} - {"checkpoints"}
    assert [each["message"]["seq"] for each in found if each["type"] == "message"] == [1, 2, 3, 4, 5, 6]
    assert found[-1] == {"type": "end", "conversations": 2, "messages": 6}
    assert await exporting.count(chat, "ada") == RemovedCounts(2, 6)


async def test_what_is_appended_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, database = chat_of(*some("a", 1, 5))
    real = chat.stream_chat_history

    def stream(*arguments: Any, **options: Any) -> Any:
        # The conversation was read just before, and its messages are read now.
        database.documents[0] |= {"last_seq": 6, "message_count": 6}
        database.documents.append(message(6, key="a"))
        return real(*arguments, **options)

    monkeypatch.setattr(chat, "stream_chat_history", stream)
    found = await lines(chat)
    assert found[-1]["messages"] == found[1]["message_count"] == 5


async def test_a_conversation_that_is_deleted_meanwhile_is_left_out_whole() -> None:
    chat, database = chat_of(*some("a", 1, 1), *some("b", 2, 1))

    def delete(part: int) -> None:
        if part == 1:
            del database.documents[2:]

    found = await lines(chat, delete)
    assert (ids(found), found[-1]["conversations"]) == (["a"], 1)


async def test_a_conversation_that_moves_to_the_front_meanwhile_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "_PAGE_ITEMS", 2)
    chat, database = chat_of(*(some(f"c{n}", n)[0] for n in range(5)))
    listed: list[ListPosition | None] = []
    real = chat.list_conversations

    async def list_conversations(user_id: str, *, limit: int, after: ListPosition | None) -> Any:
        if listed == [None]:
            # Between the first page and the second, a conversation of the last page has activity.
            now = datetime.now(UTC)
            database.documents[4] |= {"active_at": now, "updated_at": now}
        listed.append(after)
        return await real(user_id, limit=limit, after=after)

    monkeypatch.setattr(chat, "list_conversations", cast(Any, list_conversations))
    found = ids(await lines(chat))
    assert sorted(found) == ["c0", "c1", "c2", "c3", "c4"]


async def test_nothing_is_exported_where_a_conversation_cannot_be_read() -> None:
    chat, _ = chat_of(*some("a", 1), conversation("b", last_seq="x"))
    with pytest.raises(MalformedDocument, match="conversation b is not well formed"):
        await lines(chat)
    with pytest.raises(MalformedDocument):
        await exporting.count(chat, "ada")
