"""On the embedded engine an append expects the conversation as this process left it, or it looks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo import MongoClient

from service.chat_service import ChatService
from service.database import Database
from service.errors import ConversationNotFound
from service.history import store as stores
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, new_id

pytestmark = pytest.mark.embedded_engine("MongoDB updates and reads with one command")


@pytest.fixture
async def here(service: Service) -> AsyncIterator[ChatService]:
    """The verbs in this process, beside those of the service, which is another one."""
    settings = Settings(mongodb_url=service.database_url)
    database = Database(settings)
    await database.open()
    yield ChatService(ConversationStore(database, settings), TenantScope())
    await database.close()


async def append(chat: ChatService, conversation: str, *contents: str, **options: Any) -> list[int]:
    """Append, and return the seqs."""
    messages = [{"role": "user", "content": each} for each in contents]
    return [each["seq"] for each in (await chat.add_messages(conversation, messages, **options)).messages]


MESSAGE = {"role": "user", "content": "elsewhere"}
# What another process does to a conversation, as methods, paths below it, and bodies.
CHANGES: dict[str, list[tuple[str, str, Any]]] = {
    "a new title": [("PATCH", "", {"title": "another"})],
    "a pop": [("POST", "/pop", None)],
    "all messages deleted": [("DELETE", "/messages", None)],
    "one replaced": [("PUT", "/messages/m1", MESSAGE)],
    "an append": [("POST", "/messages", {"messages": [MESSAGE] * 2})],
    "an append that was popped": [("POST", "/messages", MESSAGE), ("POST", "/pop", None)],
}


@pytest.mark.parametrize("change", CHANGES)
async def test_an_append_after_a_change_elsewhere_counts_from_what_is_stored(
    here: ChatService, service: Service, change: str
) -> None:
    conversation = new_id()
    await here.get_or_create_conversation("ada", conversation)
    await here.add_messages(conversation, [{"id": "m1", "role": "user", "content": "first"}])
    assert await append(here, conversation, "second", "third") == [2, 3]
    with service.client() as elsewhere:
        for method, path, body in CHANGES[change]:
            elsewhere.request(method, f"/conversations/{conversation}{path}", json=body).raise_for_status()
    before = await here.get_conversation(conversation)
    assert await append(here, conversation, "after", "it") == [before.last_seq + 1, before.last_seq + 2]
    after = await here.get_conversation(conversation)
    assert after.last_seq == before.last_seq + 2
    assert after.message_count == before.message_count + 2
    assert after.version == before.version + 1
    assert after.title == before.title
    page = await here.get_chat_history(conversation)
    times = [each["created_at"] for each in page.messages]
    assert times == sorted(times)
    assert len(page.messages) == after.message_count


async def test_what_was_changed_in_the_shell_is_counted_from(service: Service, here: ChatService) -> None:
    conversation = new_id()
    await here.get_or_create_conversation("ada", conversation)
    await append(here, conversation, "first")
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    by_hand: list[dict[str, Any]] = [
        {"last_seq": 20},
        {"message_count": 7},
        {"tokens_total": 1_000},
        {"updated_at": later},
    ]
    with MongoClient[dict[str, Any]](service.database_url, tz_aware=True) as client:
        stored = client.get_default_database().conversations
        for fields in by_hand:
            stored.update_one({"_id": conversation}, {"$set": fields})
            before: Any = stored.find_one({"_id": conversation})
            await append(here, conversation, "next")
            after: Any = stored.find_one({"_id": conversation})
            for name in ("last_seq", "message_count", "turns_total", "version"):
                assert after[name] == before[name] + 1, name
            assert after["tokens_total"] > before["tokens_total"]
        assert after["updated_at"] == later
        assert after["active_at"] < later
        # A number that is no integer cannot be expected, and is counted all the same.
        stored.update_one({"_id": conversation}, {"$set": {"message_count": 7.0, "tokens_total": 1.5}})
        await append(here, conversation, "next")
        await append(here, conversation, "next")
        after = stored.find_one({"_id": conversation})
        assert after["message_count"] == 9


async def test_a_conversation_that_was_deleted_elsewhere_is_not_found(
    here: ChatService, service: Service
) -> None:
    conversation = new_id()
    await here.get_or_create_conversation("ada", conversation)
    await append(here, conversation, "first")
    with service.client() as elsewhere:
        elsewhere.delete(f"/conversations/{conversation}").raise_for_status()
        with pytest.raises(ConversationNotFound):
            await append(here, conversation, "second")
        elsewhere.post("/conversations", json={"user_id": "bob", "id": conversation}).raise_for_status()
        elsewhere.post(f"/conversations/{conversation}/messages", json=MESSAGE).raise_for_status()
    with pytest.raises(ConversationNotFound):
        await append(here, conversation, "second", user_id="ada")
    assert await append(here, conversation, "for whom it is now") == [2]
    with pytest.raises(ConversationNotFound):
        await append(here, conversation, "second", user_id="ada")
    assert await append(here, conversation, "for bob", user_id="bob") == [3]


async def test_a_user_whose_id_looks_like_an_expression_is_taken_as_it_is(here: ChatService) -> None:
    for user in ("$last_seq", "$$ROOT", "$"):
        conversation = new_id()
        metadata = {"$set": "$title", "ref": {"$ref": "a", "$id": 1}}
        await here.get_or_create_conversation(user, conversation, title="$user_id", metadata=metadata)
        for seq in (1, 2, 3):
            assert await append(here, conversation, "$content", user_id=user) == [seq]
        shown = await here.get_conversation(conversation, user)
        assert (shown.title, shown.metadata) == ("$user_id", metadata)


async def test_more_conversations_than_are_remembered_are_appended_to(
    here: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_LEFT_MOST", 2)
    conversations = [new_id() for _ in range(5)]
    for each in conversations:
        await here.get_or_create_conversation("ada", each)
    for seq in (1, 2, 3):
        for each in conversations:
            assert await append(here, each, "next") == [seq]
    assert len(here._store._left) <= 2
