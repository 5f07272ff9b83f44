"""How every adapter reads a conversation that may not be there yet, or may be another user's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from chat_history_client._async.client import AsyncChatHistoryClient
from chat_history_client._sync.client import ChatHistoryClient
from chat_history_client.errors import ApiError, Conflict, NotFound
from chat_history_client.types import Json, Message

T = TypeVar("T")


def read(client: ChatHistoryClient, conversation_id: str, user_id: str) -> list[Message]:
    """Return the whole history; begin the conversation if it is not there."""
    stream = client.stream_chat_history(conversation_id, user_id=user_id)
    return read_or_begin(client, conversation_id, user_id, lambda: list(stream))


async def aread(client: AsyncChatHistoryClient, conversation_id: str, user_id: str) -> list[Message]:
    """Return the whole history; begin the conversation if it is not there."""

    async def whole() -> list[Message]:
        stream = client.stream_chat_history(conversation_id, user_id=user_id)
        return [message async for message in stream]

    return await aread_or_begin(client, conversation_id, user_id, whole)


def read_or_begin(
    client: ChatHistoryClient, conversation_id: str, user_id: str, read_it: Callable[[], list[T]]
) -> list[T]:
    """Return what is read of a conversation, or begin the conversation if it is not there.

    The service gives the same answer for a conversation that is another user's and for one that does not
    exist. Only creating it tells them apart: Conflict is raised if it is another user's, so that a reader is
    told before it pays for a run of a model.
    """
    try:
        return read_it()
    except NotFound:
        try:
            client.get_or_create_conversation(user_id, conversation_id)
        except ApiError as error:
            _raise_unless_read_only(error, conversation_id, user_id)
        return []


async def aread_or_begin(
    client: AsyncChatHistoryClient,
    conversation_id: str,
    user_id: str,
    read_it: Callable[[], Awaitable[list[T]]],
) -> list[T]:
    """Return what is read of a conversation, or begin it; see `read_or_begin`."""
    try:
        return await read_it()
    except NotFound:
        try:
            await client.get_or_create_conversation(user_id, conversation_id)
        except ApiError as error:
            _raise_unless_read_only(error, conversation_id, user_id)
        return []


def _raise_unless_read_only(error: ApiError, conversation_id: str, user_id: str) -> None:
    if error.status == 403:
        return  # A key that may only read saves nothing, so nothing is lost if the conversation is empty.
    if not isinstance(error, Conflict):
        raise error
    detail = (
        f"The conversation {conversation_id!r} belongs to another user than {user_id!r}. Give each user's "
        "conversation an id of its own, for example one that begins with the user's id."
    )
    problem: Json = {"type": error.type, "title": "This conversation id is taken", "detail": detail}
    raise Conflict(error.status, problem) from error
