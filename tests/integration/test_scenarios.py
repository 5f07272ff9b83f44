"""The acceptance scenarios, as a person would tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from pymongo import MongoClient

from tests.harness import append, contents, create, history, new_id, running, sent, whole_history


def test_a_new_users_conversation_is_stored_and_found_again_after_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            conversation = create(client, user="new-user")
            append(client, conversation, {"role": "user", "content": "Hello"})
            append(client, conversation, {"role": "assistant", "content": "Hello, how can I help?"})
        assert service.stop() == 0
        service.start()
        with service.client() as client:
            assert contents(whole_history(client, conversation)) == ["Hello", "Hello, how can I help?"]
            assert client.get(f"/conversations/{conversation}").json()["message_count"] == 2


def test_everything_acknowledged_survives_kill_9_of_the_whole_process_group(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            conversation = create(client)
            said = [
                append(client, conversation, {"role": "user", "content": n})[0] for n in map(str, range(60))
            ]
        service.kill()
        service.start()
        with service.client() as client:
            assert whole_history(client, conversation) == said


def test_a_returning_user_finds_earlier_conversations_latest_activity_first(client: httpx.Client) -> None:
    user = new_id("user")
    first, second, third = (create(client, user=user) for _ in range(3))
    append(client, first, {"role": "user", "content": "I am back"})
    listed = client.get("/conversations", params={"user_id": user}).json()
    assert [each["id"] for each in listed["data"]] == [first, third, second]
    assert listed["has_more"] is False
    assert listed["next"] is None


def test_several_conversations_keep_their_own_histories(client: httpx.Client) -> None:
    conversations = [create(client) for _ in range(3)]
    for turn in range(4):
        for conversation in conversations:
            append(client, conversation, {"role": "user", "content": f"{conversation} {turn}"})
    for conversation in conversations:
        page = history(client, conversation)
        assert contents(page["data"]) == [f"{conversation} {turn}" for turn in range(4)]
        assert [each["seq"] for each in page["data"]] == [1, 2, 3, 4]


SEARCH = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "search_web", "arguments": '{"q": "tides"}'},
}
EVERY_KIND: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "developer", "content": "Use tools."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "When is high tide? 🌊"},
            {"type": "image_url", "image_url": {"url": "data:,"}},
        ],
    },
    {"role": "assistant", "content": None, "tool_calls": [SEARCH]},
    {"role": "tool", "tool_call_id": "call_1", "name": "search_web", "content": "At 14:05"},
    {
        "role": "assistant",
        "content": "At five past two.",
        "reasoning": {"tokens": 12},
        "metadata": {"model": "m"},
    },
    {"role": "user", "content": "مرحبا بالعالم، שלום"},
    {"role": "user", "content": "before\u0000after"},
    {"role": "user", "content": "x" * 1_000_000},
]


def test_mixed_message_types_keep_roles_and_content(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, *EVERY_KIND)
    back = [sent(each) for each in whole_history(client, conversation)]
    assert back == EVERY_KIND
    assert [list(each) for each in back] == [list(each) for each in EVERY_KIND]


def test_an_operator_finds_tool_calls_in_the_shell(
    service: Any, client: httpx.Client, conversation: str
) -> None:
    append(client, conversation, *EVERY_KIND[:6])
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        database = operator.get_default_database()
        found = list(
            database.messages.find(
                {"tool_calls.function.name": "search_web", "conversation_id": conversation}
            )
        )
        assert [(each["seq"], each["role"], each["content"]) for each in found] == [(4, "assistant", None)]
        assert found[0]["tool_calls"] == [SEARCH]
        assert list(found[0])[:5] == ["_id", "conversation_id", "user_id", "seq", "created_at"]
        assert found[0]["_id"].startswith(f"{conversation}/msg_")
        stored = database.conversations.find_one({"_id": conversation})
        assert stored is not None
        assert (stored["user_id"], stored["last_seq"], stored["message_count"]) == ("ada", 6, 6)
