"""The clients' context of a model call, and checkpoints."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import pytest

from chat_history_client import (
    ApiError,
    AsyncChatHistoryClient,
    ChatHistoryClient,
    Checkpoint,
    Conflict,
    Context,
    NotFound,
)
from chat_history_client.types import ContextCall, LeftOut
from tests.harness import Service, new_id
from tests.proxy import proxied

OPENAPI = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text())
CALL = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": "{}"}}


def turns(count: int) -> list[Any]:
    """So many turns, each of a question, a call, a large result and an answer."""
    found: list[Any] = [{"role": "system", "content": "Answer in one line."}]
    for number in range(count):
        found += [
            {"role": "user", "content": f"Question {number}"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "x" * 4_000},
            {"role": "assistant", "content": f"Answer {number}"},
        ]
    return found


FORMS: list[dict[str, Any]] = [
    {"max_tokens": 3_000},
    {"max_tokens": 3_000, "format": "native"},
    {"max_messages": 9, "format": "openai", "keep_ratio": 1.0},
    {"max_turns": 3, "format": "responses", "tool_results": "keep:1,over:500"},
    {"max_turns": 2, "format": "anthropic", "repair": "none", "user_id": "ada"},
    {"max_tokens": 10**6, "format": "openai", "repair": "placeholder", "keep_ratio": 0.0},
]


@pytest.mark.parametrize("options", FORMS, ids=json.dumps)
def test_both_clients_return_what_the_service_says(
    service: Service, sync_history: ChatHistoryClient, client: httpx.Client, options: dict[str, Any]
) -> None:
    conversation = new_id()
    sync_history.add_messages(conversation, turns(20), create_for="ada")

    async def asynchronously() -> Context:
        async with AsyncChatHistoryClient(service.url) as history:
            return await history.get_context(conversation, **options)

    found = sync_history.get_context(conversation, **options)
    assert found == asyncio.run(asynchronously())
    assert found == client.get(f"/conversations/{conversation}/context", params=options).json()
    assert found["messages"]
    assert ("system" in found) == (options.get("format") == "anthropic")


@pytest.mark.parametrize("kind", [Context, Checkpoint, LeftOut, ContextCall])
def test_the_types_have_the_fields_that_the_api_describes(kind: Any) -> None:
    name = {"Context": "ContextOut", "Checkpoint": "CheckpointOut"}.get(kind.__name__, kind.__name__)
    assert set(get_type_hints(kind)) == set(OPENAPI["components"]["schemas"][name]["properties"])


async def test_what_the_service_refuses_is_an_error(history: AsyncChatHistoryClient) -> None:
    with pytest.raises(NotFound):
        await history.get_context(new_id(), max_turns=1)
    with pytest.raises(ApiError) as refused:
        await history.get_context(new_id(), max_turns=1, max_tokens=1)
    assert refused.value.errors[0]["path"] == "query.max_tokens"


async def test_checkpoints_are_stored_once_listed_and_deleted(service: Service) -> None:
    conversation = new_id()
    with proxied(service.port) as proxy:
        async with AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}") as history:
            await history.add_messages(conversation, turns(4), create_for="ada")
            lost = [proxy.cut(b"POST ", before=False)]
            first = await history.create_checkpoint(conversation, 5, "Earlier.", metadata={"by": "me"})
            assert (first["upto_seq"], first["metadata"]) == (5, {"by": "me"})
            second = await history.create_checkpoint(conversation, 9, "Later.", user_id="ada")
            assert await history.list_checkpoints(conversation) == [second, first]
            context = await history.get_context(conversation, max_turns=10)
            assert (context["checkpoint"], context["from_seq"]) == (second, 10)
            with pytest.raises(Conflict):
                await history.create_checkpoint(conversation, 5, "Backwards.")
            with pytest.raises(ApiError) as refused:
                await history.create_checkpoint(conversation, 11, "In a turn.")
            assert refused.value.status == 422
            lost.append(proxy.cut(b"DELETE ", before=False))
            await history.delete_checkpoint(conversation, second["id"])
            assert [each.done for each in lost] == [1, 1]
            with pytest.raises(NotFound):
                await history.delete_checkpoint(conversation, second["id"])
            with pytest.raises(NotFound):
                await history.list_checkpoints(conversation, user_id="grace")


def test_the_synchronous_client_has_checkpoints_too(sync_history: ChatHistoryClient) -> None:
    conversation = new_id()
    sync_history.add_messages(conversation, turns(2), create_for="ada")
    stored = sync_history.create_checkpoint(conversation, 5, "Earlier.")
    assert sync_history.list_checkpoints(conversation) == [stored]
    sync_history.delete_checkpoint(conversation, stored["id"])
    assert sync_history.list_checkpoints(conversation) == []
