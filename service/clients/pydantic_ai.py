"""Pydantic AI's message history, kept by the service (the extra `pydantic-ai`).

Each ModelMessage is one message, through Pydantic AI's own adapter: `pydantic_ai` holds it as native JSON,
but for its texts, which are the message's content parts, and its tool calls, which are the message's, each in
its order. It is restored equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter

from service import openai_items
from service.clients.http import ChatHistoryClient, NotFound

Json = dict[str, Any]

FIELD = "pydantic_ai"
# The kinds of parts whose `content`, where it is text, is a part of the native content.
_TEXTS = frozenset({"system-prompt", "user-prompt", "tool-return", "retry-prompt", "text"})
_CALL = ("tool_name", "args", "tool_call_id")


class ChatHistoryStore:
    """Saves and loads what `agent.run(message_history=…)` takes and `result.new_messages()` returns.

    A list is stored together or not at all, and once, whatever happens to the connection. The conversation is
    made by the first message, and belongs to `user_id`.
    """

    def __init__(self, client: ChatHistoryClient, *, user_id: str = "default") -> None:
        self._client = client
        self._user_id = user_id

    async def load(self, conversation_id: str) -> list[ModelMessage]:
        """Return the whole history, oldest first; empty where nothing was saved yet."""
        try:
            stream = self._client.stream(conversation_id, user_id=self._user_id)
            return restored([message async for message in stream])
        except NotFound:
            return []

    async def save(self, conversation_id: str, messages: Sequence[ModelMessage]) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see ChatHistoryClient.append_all. A caller who
        is cancelled meanwhile is cancelled when they are stored.
        """
        await self._client.append_all(self._user_id, conversation_id, stored_as(messages))


def stored_as(messages: Sequence[ModelMessage]) -> list[Json]:
    """Return the native messages that messages are stored as."""
    dumped = ModelMessagesTypeAdapter.dump_python(list(messages), mode="json")
    return [_stored_as(each) for each in dumped]


def _stored_as(message: Json) -> Json:
    texts: list[Json] = []
    calls: list[Json] = []
    rest = []
    for part in message["parts"]:
        if _is_text(part):
            texts.append({"type": "text", "text": part["content"]})
            rest.append(_without(part, "content"))
        elif part.get("part_kind") == "tool-call":
            calls.append({"name": part["tool_name"], "args": part["args"], "id": part["tool_call_id"]})
            rest.append(_without(part, *_CALL))
        else:
            rest.append(part)
    native: Json = {"role": _role(message), "content": texts or None}
    if calls:
        native["tool_calls"] = calls
    returned = [part["tool_call_id"] for part in rest if part.get("part_kind") == "tool-return"]
    if native["role"] == "tool" and len(returned) == 1:
        native["tool_call_id"] = returned[0]
    return {**native, FIELD: {**message, "parts": rest}}


def _without(part: Json, *names: str) -> Json:
    return {name: value for name, value in part.items() if name not in names}


def _is_text(part: Json) -> bool:
    return part.get("part_kind") in _TEXTS and isinstance(part.get("content"), str)


def _role(message: Json) -> str:
    if message["kind"] == "response":
        return "assistant"
    kinds = {part.get("part_kind") for part in message["parts"]}
    if "user-prompt" in kinds:
        return "user"
    return "system" if kinds == {"system-prompt"} else "tool" if "tool-return" in kinds else "user"


def restored(messages: Sequence[Json]) -> list[ModelMessage]:
    """Return stored messages as Pydantic AI's, also those that were appended natively."""
    return ModelMessagesTypeAdapter.validate_python([_restored(message) for message in messages])


def _restored(message: Json) -> Json:
    kept = message.get(FIELD)
    if not isinstance(kept, dict) or not isinstance(kept.get("parts"), list):
        return _native(message)
    texts, calls = iter(message.get("content") or ()), iter(message.get("tool_calls") or ())
    return {**kept, "parts": [_restored_part(part, texts, calls) for part in kept["parts"]]}


def _restored_part(part: Json, texts: Iterator[Json], calls: Iterator[Json]) -> Json:
    if part.get("part_kind") in _TEXTS and "content" not in part:
        return {**part, "content": next(texts)["text"]}
    if part.get("part_kind") == "tool-call":
        call = next(calls)
        return {**part, "tool_name": call["name"], "args": call["args"], "tool_call_id": call["id"]}
    return part


def _native(message: Json) -> Json:
    """Read a message that was appended natively, or as an item through `/v1`: its texts and tool calls."""
    parts: list[Json] = []
    for item in openai_items.items_of(message):
        if item["type"] == "function_call":
            said = {"tool_name": item["name"], "args": item["arguments"], "tool_call_id": item["call_id"]}
            parts.append({"part_kind": "tool-call", **said})
        elif item["type"] == "function_call_output":
            said = {"tool_name": message.get("name") or "unknown", "tool_call_id": item["call_id"]}
            parts.append({"part_kind": "tool-return", "content": item["output"], **said})
        elif item["type"] == "message":
            kind = _PART_KINDS.get(item["role"], "user-prompt")
            texts = [part.get("text") for part in item["content"] if isinstance(part, dict)]
            parts += [{"part_kind": kind, "content": text} for text in texts if isinstance(text, str)]
    return {"kind": "response" if message["role"] == "assistant" else "request", "parts": parts}


_PART_KINDS = {"assistant": "text", "system": "system-prompt", "developer": "system-prompt"}
