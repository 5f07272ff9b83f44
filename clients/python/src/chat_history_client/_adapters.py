"""How every adapter reads a conversation that may not be there yet, or may be another user's."""

from __future__ import annotations

from chat_history_client._async.client import AsyncChatHistoryClient
from chat_history_client._sync.client import ChatHistoryClient
from chat_history_client.errors import ApiError, Conflict, NotFound
from chat_history_client.types import Item, Json, Message


def read(client: ChatHistoryClient, conversation_id: str, user_id: str) -> list[Message]:
    """Return the whole history; begin the conversation if it is not there."""
    try:
        return list(client.stream_chat_history(conversation_id, user_id=user_id))
    except NotFound:
        begin(client, conversation_id, user_id)
        return []


async def aread(client: AsyncChatHistoryClient, conversation_id: str, user_id: str) -> list[Message]:
    """Return the whole history; begin the conversation if it is not there."""
    try:
        stream = client.stream_chat_history(conversation_id, user_id=user_id)
        return [message async for message in stream]
    except NotFound:
        await abegin(client, conversation_id, user_id)
        return []


async def aread_items(
    client: AsyncChatHistoryClient, conversation_id: str, user_id: str, count: int | None
) -> list[Item]:
    """Return all items, or the newest so many; begin the conversation if it is not there."""
    try:
        if count is not None:
            return await client.last_items(conversation_id, count, user_id=user_id)
        return [item async for item in client.stream_items(conversation_id, user_id=user_id)]
    except NotFound:
        await abegin(client, conversation_id, user_id)
        return []


def begin(client: ChatHistoryClient, conversation_id: str, user_id: str) -> None:
    """Create the conversation, or raise Conflict if it is another user's.

    The service gives the same answer for a conversation that is another user's and for one that does not
    exist. Only creating it tells them apart, and a reader is told before it pays for a run of a model.
    """
    try:
        client.get_or_create_conversation(user_id, conversation_id)
    except ApiError as error:
        _raise_unless_read_only(error, conversation_id, user_id)


async def abegin(client: AsyncChatHistoryClient, conversation_id: str, user_id: str) -> None:
    """Create the conversation, or raise Conflict if it is another user's; see `begin`."""
    try:
        await client.get_or_create_conversation(user_id, conversation_id)
    except ApiError as error:
        _raise_unless_read_only(error, conversation_id, user_id)


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
