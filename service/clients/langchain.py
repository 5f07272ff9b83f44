"""LangChain's chat message history, kept by the service (the extra `langchain`).

A message is stored as a native document: its role, its content, its tool calls as LangChain has them
(`{name, args, id}`, so that `tool_calls.args` can be queried), its `tool_call_id`. What else LangChain's
`messages_to_dict` says of it stands in `langchain`, defaults included, for they may be others in another
version. It is restored as `messages_from_dict` restores it: a model or Document that it holds as a dict. What
is no JSON (a date in a tool's artifact, for one) is refused with a TypeError that names its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage, messages_from_dict

from service import openai_items
from service.clients.http import ChatHistoryClient, NotFound, SyncChatHistoryClient

Json = dict[str, Any]

FIELD = "langchain"
# The roles of LangChain's types, and of their chunks; a ChatMessage has its own.
_ROLES = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "remove": "system",
    "chat": "user",
}
# The fields that both have. They stand natively, and not a second time in `langchain`.
_NATIVE = ("content", "tool_calls", "tool_call_id", "name")


class ChatHistoryMessages(BaseChatMessageHistory):
    """A history that is a conversation; its id is the session's, and its owner `user_id`.

    `client` serves the synchronous methods and `async_client` the others; one of them is enough for who uses
    one kind only. A list of messages is stored together or not at all, and once, whatever happens to the
    connection. The conversation is made by the first message.
    """

    def __init__(
        self,
        session_id: str,
        client: SyncChatHistoryClient | None = None,
        *,
        async_client: ChatHistoryClient | None = None,
        user_id: str = "default",
    ) -> None:
        self.session_id = session_id
        self.user_id = user_id
        self._client = client
        self._async_client = async_client

    def _sync(self) -> SyncChatHistoryClient:
        if self._client is None:
            raise ValueError("The synchronous methods need a SyncChatHistoryClient: `client`.")
        return self._client

    def _async(self) -> ChatHistoryClient:
        if self._async_client is None:
            raise ValueError("The asynchronous methods need a ChatHistoryClient: `async_client`.")
        return self._async_client

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # LangChain declares an attribute
        """The whole history, oldest first."""
        try:
            return restored(list(self._sync().stream(self.session_id, user_id=self.user_id)))
        except NotFound:
            return []  # nothing was added yet

    async def aget_messages(self) -> list[BaseMessage]:
        """Return the whole history, oldest first."""
        try:
            stream = self._async().stream(self.session_id, user_id=self.user_id)
            return restored([message async for message in stream])
        except NotFound:
            return []

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see ChatHistoryClient.append_all.
        """
        self._sync().append_all(self.user_id, self.session_id, [stored_as(each) for each in messages])

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see ChatHistoryClient.append_all. A caller who
        is cancelled meanwhile is cancelled when they are stored.
        """
        stored = [stored_as(each) for each in messages]
        await self._async().append_all(self.user_id, self.session_id, stored)

    def clear(self) -> None:
        """Delete all messages; the conversation stays."""
        try:
            self._sync().delete_messages(self.session_id, user_id=self.user_id)
        except NotFound:
            return

    async def aclear(self) -> None:
        """Delete all messages; the conversation stays."""
        try:
            await self._async().delete_messages(self.session_id, user_id=self.user_id)
        except NotFound:
            return


def stored_as(message: BaseMessage) -> Json:
    """Return the native message that a message is stored as."""
    kind = message.type.removesuffix("MessageChunk").lower()
    if kind not in _ROLES:
        raise ValueError(f"A message of the type {message.type!r} could not be restored by LangChain.")
    data = message.model_dump()
    native = {name: data[name] for name in _NATIVE if _is_native(name, data.get(name))}
    role = _ROLES[kind]
    if kind == "chat" and data["role"] in {"assistant", "system", "developer"}:
        role = data["role"]
    return {
        "role": role,
        **native,
        FIELD: {name: value for name, value in data.items() if name not in native},
    }


def _is_native(name: str, value: Any) -> bool:
    """Tell whether a value stands natively; no tool calls are no field, so that a query finds real ones."""
    if name in {"name", "tool_call_id"}:
        return isinstance(value, str)
    return value is not None and not (name == "tool_calls" and value == [])


def restored(messages: Sequence[Json]) -> list[BaseMessage]:
    """Return stored messages as LangChain's, also those that were appended natively."""
    return messages_from_dict([_as_dict(message) for message in messages])


def _as_dict(message: Json) -> Json:
    kept = message.get(FIELD)
    if isinstance(kept, dict) and isinstance(kept.get("type"), str):
        native = {name: message[name] for name in _NATIVE if name in message}
        return {"type": kept["type"], "data": {**kept, **native}}
    return _native_as_dict(message)


def _native_as_dict(message: Json) -> Json:
    """Read a message that was appended natively, or as an item through `/v1`."""
    content = message.get("content")
    data: Json = {"content": "" if content is None else content, "id": message["id"]}
    match message["role"]:
        case "assistant":
            calls = [each for each in openai_items.items_of(message) if each["type"] == "function_call"]
            parsed = [(call, _arguments(call)) for call in calls]
            data["tool_calls"] = [
                {"name": call["name"], "args": args, "id": call["call_id"]}
                for call, args in parsed
                if args is not None
            ]
            data["invalid_tool_calls"] = [
                {"name": call["name"], "args": call["arguments"], "id": call["call_id"], "error": None}
                for call, args in parsed
                if args is None
            ]
            return {"type": "ai", "data": data}
        case "tool":
            return {"type": "tool", "data": {**data, "tool_call_id": message.get("tool_call_id") or ""}}
        case "user":
            return {"type": "human", "data": data}
    return {"type": "system", "data": data}


def _arguments(call: Json) -> Json | None:
    """Return the arguments of a function call, or None where they are not a JSON object."""
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except (ValueError, TypeError):
        return None
    return arguments if isinstance(arguments, dict) else None
