"""Microsoft agent-framework's history provider, kept by the service (the extra `agent-framework`).

A message is stored as a native document: its role, and its contents as agent-framework writes them
(`{type: function_call, call_id, name, arguments}`, so that `content.name` can be queried). What else it
writes of a message stands in `agent_framework`. It is restored equal. A message with a value that the service
cannot store (NaN, half an emoji) is kept whole in `agent_framework_exact`, as `_exact` says.

A message that was written in another form is read by `_message_turns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from agent_framework import Content, HistoryProvider, Message
from agent_framework.exceptions import ContentError

from chat_history_client import AsyncChatHistoryClient
from chat_history_client._adapters import aread
from chat_history_client._exact import kept, opened
from chat_history_client._message_parts import Call, Media, Other, Part, Reasoning, Result, Text, as_text
from chat_history_client._message_parts import data_url as _data_url
from chat_history_client._message_turns import Turn, turns_of
from chat_history_client.types import Json

FIELD = "agent_framework"
EXACT_FIELD = "agent_framework_exact"
_ROLES = frozenset({"user", "assistant", "tool", "system", "developer"})


class ChatHistoryProvider(HistoryProvider):
    """Loads a session's history before a run, and stores what the run brought behind it.

    The conversation's id is the session's, and its owner `user_id`; it is made by the first run, and if it
    is another user's, that raises Conflict before the model is called. The messages of a run are stored
    together or not at all, and once, whatever happens to the connection.
    """

    DEFAULT_SOURCE_ID = "chat_history"

    def __init__(
        self,
        client: AsyncChatHistoryClient,
        *,
        user_id: str = "default",
        source_id: str = DEFAULT_SOURCE_ID,
        **options: Any,
    ) -> None:
        """Take the client, the owner, and the options of `HistoryProvider` (`store_inputs` and others)."""
        super().__init__(source_id, **options)
        self._client = client
        self._user_id = user_id

    async def get_messages(
        self, session_id: str | None, *, state: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Message]:
        """Return the whole history, oldest first."""
        del state, kwargs  # they are for providers that keep the history in the session
        return restored(await aread(self._client, _conversation(session_id), self._user_id))

    async def save_messages(
        self,
        session_id: str | None,
        messages: Sequence[Message],
        *,
        state: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append messages, in as few batches as the service takes, each of which is stored whole."""
        del state, kwargs
        stored = [stored_as(each) for each in messages]
        await self._client.add_all_messages(_conversation(session_id), stored, user_id=self._user_id)


def _conversation(session_id: str | None) -> str:
    if session_id is None:
        raise ValueError("A history needs a session. Run the agent with `session=agent.create_session()`.")
    return session_id


def stored_as(message: Message) -> Json:
    """Return the native message that a message is stored as."""
    own = message.to_dict()
    role = message.role if message.role in _ROLES else "user"
    content = own.pop("contents", None)
    return kept({"role": role, "content": content, FIELD: own}, EXACT_FIELD)


def restored(messages: Sequence[Json]) -> list[Message]:
    """Return stored messages as agent-framework's, also those that were written in another form."""
    found: list[Message] = []
    for _, group in groupby(turns_of(messages), lambda turn: turn.message["id"]):
        turns = list(group)
        own = opened(turns[0].message, EXACT_FIELD)
        if isinstance(own.get(FIELD), dict):
            found.append(Message.from_dict({**own[FIELD], "contents": own.get("content") or []}))
        else:
            found += map(_foreign, turns)
    return found


def _foreign(turn: Turn) -> Message:
    role = "system" if turn.role == "developer" else turn.role
    contents = [content for part in turn.parts for content in _contents(part)]
    return Message(role, contents, message_id=turn.message["id"])


def _contents(part: Part) -> Iterator[Content]:
    match part:
        case Text(text):
            yield Content.from_text(text)
        case Reasoning(text) if text:
            yield Content.from_text_reasoning(text=text)
        case Media():
            yield _media(part)
        case Call(call_id, name, arguments):
            given = arguments if isinstance(arguments, str | dict | None) else as_text(arguments)
            yield Content.from_function_call(call_id, name, arguments=given)
        case Result(call_id, _, content):
            items = [each for one in content for each in _contents(one)]
            yield Content.from_function_result(call_id, result=items)
        case Other(given):
            yield Content.from_text(as_text(given))


def _media(media: Media) -> Content:
    if not (media.url or media.data):
        return Content.from_hosted_file(media.file_id, media_type=media.media_type or None)
    try:
        return Content.from_uri(_data_url(media), media_type=media.media_type or f"{media.kind}/*")
    except ContentError:
        return Content.from_text(as_text(media.given))  # no URL that agent-framework takes
