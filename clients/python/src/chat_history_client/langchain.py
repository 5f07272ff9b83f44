"""LangChain's chat message history, kept by the service (the extra `langchain`).

A message is stored as a native document: its role, its content, its tool calls as LangChain has them
(`{name, args, id}`, so that `tool_calls.args` can be queried), its `tool_call_id`. What else LangChain's
`messages_to_dict` says of it stands in `langchain`, defaults included, for they may be others in another
version. It is restored as `messages_from_dict` restores it: a model or Document that it holds as a dict. What
is no JSON (a date in a tool's artifact, for one) is refused with a TypeError that names its place. A message
with a value that the service cannot store (NaN, half an emoji) is kept whole in `langchain_exact`, as
`_exact` says.

A message that was written in another form is read by `_message_turns`. Pictures become LangChain's standard
blocks, and reasoning stands in `additional_kwargs["reasoning_content"]`, which `content_blocks` shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
    messages_from_dict,
)

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient, NotFound
from chat_history_client._adapters import aread, read
from chat_history_client._exact import kept, opened
from chat_history_client._message_parts import (
    Call,
    Content,
    Media,
    Other,
    Reasoning,
    Result,
    Text,
    as_object,
    as_text,
)
from chat_history_client._message_turns import LANGCHAIN as FIELD
from chat_history_client._message_turns import Turn, turns_of
from chat_history_client.types import Json

EXACT_FIELD = "langchain_exact"
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
    connection. The conversation is made by the first reading or the first message; if it is another user's,
    either raises Conflict.

    LangChain calls its base class deprecated. For an agent of `create_agent` take `ChatHistoryMiddleware` of
    `chat_history_client.langchain_agents`; for a chain of your own this class is the right one.
    """

    def __init__(
        self,
        session_id: str,
        client: ChatHistoryClient | None = None,
        *,
        async_client: AsyncChatHistoryClient | None = None,
        user_id: str = "default",
    ) -> None:
        self.session_id = session_id
        self.user_id = user_id
        self._client = client
        self._async_client = async_client

    def _sync(self) -> ChatHistoryClient:
        if self._client is None:
            raise ValueError("The synchronous methods need a ChatHistoryClient: `client`.")
        return self._client

    def _async(self) -> AsyncChatHistoryClient:
        if self._async_client is None:
            raise ValueError("The asynchronous methods need an AsyncChatHistoryClient: `async_client`.")
        return self._async_client

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # LangChain declares an attribute
        """The whole history, oldest first."""
        return restored(read(self._sync(), self.session_id, self.user_id))

    async def aget_messages(self) -> list[BaseMessage]:
        """Return the whole history, oldest first."""
        return restored(await aread(self._async(), self.session_id, self.user_id))

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see `add_all_messages` of the client.
        """
        stored = [stored_as(each) for each in messages]
        self._sync().add_all_messages(self.session_id, stored, user_id=self.user_id)

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see `add_all_messages` of the client. A
        caller who is cancelled meanwhile is cancelled when they are stored.
        """
        stored = [stored_as(each) for each in messages]
        await self._async().add_all_messages(self.session_id, stored, user_id=self.user_id)

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
    own = {name: value for name, value in data.items() if name not in native}
    return kept({"role": role, **native, FIELD: own}, EXACT_FIELD)


def _is_native(name: str, value: Any) -> bool:
    """Tell whether a value stands natively; no tool calls are no field, so that a query finds real ones."""
    if name in {"name", "tool_call_id"}:
        return isinstance(value, str)
    return value is not None and not (name == "tool_calls" and value == [])


def restored(messages: Sequence[Json]) -> list[BaseMessage]:
    """Return stored messages as LangChain's, also those that were written in another form."""
    return [message for _, message in _restored_each(messages)]


def restored_with_ids(messages: Sequence[Json]) -> list[BaseMessage]:
    """Return stored messages as LangChain's, each with an id, which is the service's if it had none."""
    found = []
    for stored, message in _restored_each(messages):
        message.id = message.id or stored["id"]
        found.append(message)
    return found


def _restored_each(messages: Sequence[Json]) -> list[tuple[Json, BaseMessage]]:
    found: list[tuple[Json, BaseMessage]] = []
    for _, group in groupby(turns_of(messages), lambda turn: turn.message["id"]):
        turns = list(group)
        own = opened(turns[0].message, EXACT_FIELD)
        if _is_own(own):
            found.append((own, _restored(own)))
        else:
            found += ((own, message) for message in _foreign(turns))
    return found


def _is_own(message: Json) -> bool:
    kept_here = message.get(FIELD)
    return isinstance(kept_here, dict) and isinstance(kept_here.get("type"), str)


def _restored(message: Json) -> BaseMessage:
    own = message[FIELD]
    native = {name: message[name] for name in _NATIVE if name in message}
    return messages_from_dict([{"type": own["type"], "data": {**own, **native}}])[0]


# -- messages of other forms ---------------------------------------------------------------------------


def _foreign(turns: Sequence[Turn]) -> list[BaseMessage]:
    """Return the turns of a stored message, each with an id of its own, because LangGraph needs one."""
    messages = [message for turn in turns for message in _of_turn(turn)]
    for place, message in enumerate(messages):
        message.id = f"{turns[0].message['id']},{place}" if place else turns[0].message["id"]
    return messages


def _of_turn(turn: Turn) -> Iterator[BaseMessage]:
    """Yield what one speaker says: one message, or one for each result of a tool."""
    name = turn.message.get("name")
    content = [part for part in turn.parts if isinstance(part, Content)]
    if turn.role == "assistant":
        yield _answer(turn, content, name)
    elif turn.role == "user":
        yield HumanMessage(_content(content), name=name)
    elif turn.role == "tool":
        results = [part for part in turn.parts if isinstance(part, Result)]
        yield from map(_tool_message, results or [Result("", "", tuple(content))])
    else:
        role = {"__openai_role__": turn.role} if turn.role == "developer" else {}
        yield SystemMessage(_content(content), name=name, additional_kwargs=role)


def _answer(turn: Turn, content: list[Content], name: str | None) -> AIMessage:
    calls, invalid = _tool_calls(part for part in turn.parts if isinstance(part, Call))
    thought = "\n".join(part.text for part in turn.parts if isinstance(part, Reasoning) and part.text)
    return AIMessage(
        _content(content),
        name=name,
        tool_calls=calls,
        invalid_tool_calls=invalid,
        additional_kwargs={"reasoning_content": thought} if thought else {},
    )


def _tool_message(result: Result) -> ToolMessage:
    return ToolMessage(
        _content(result.content),
        tool_call_id=result.call_id,
        name=result.name or None,
        status="error" if result.failed else "success",
    )


def _content(parts: Sequence[Content]) -> Any:
    """Return what LangChain takes as content: a text, or a list of blocks."""
    if not parts:
        return ""
    if len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text
    return [_block(part) for part in parts]


def _block(part: Content) -> Any:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Media(kind, url, data, media_type, file_id):
            place = {"url": url} if url else {"base64": data} if data else {"file_id": file_id}
            return {"type": kind, **place, **({"mime_type": media_type} if media_type else {})}
        case Other(given):
            return given if isinstance(given, dict) else as_text(given)


def _tool_calls(calls: Iterable[Call]) -> tuple[list[ToolCall], list[InvalidToolCall]]:
    """Return the calls whose arguments are an object, and the others, which LangChain calls invalid."""
    valid: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for call in calls:
        arguments, call_id = as_object(call.arguments), call.id or None
        if arguments is not None:
            valid.append(ToolCall(name=call.name, args=arguments, id=call_id))
            continue
        text = as_text(call.arguments)
        invalid.append(
            InvalidToolCall(type="invalid_tool_call", name=call.name, args=text, id=call_id, error=None)
        )
    return valid, invalid
