"""The calls that read messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Unpack

from chat_history_client import _requests as requests
from chat_history_client._async.calls import Calls
from chat_history_client._stream import HistoryStream, ItemStream
from chat_history_client._tail import HistoryTail, ListTail
from chat_history_client.types import (
    HistoryEvent,
    HistoryFilters,
    Item,
    ListEvent,
    Message,
    MessagePage,
    Order,
)


class Reading(Calls):
    """Reads messages, in pages and in streams."""

    async def get_chat_history(
        self,
        conversation_id: str,
        *,
        limit: int | None = None,
        last: int | None = None,
        order: Order | None = None,
        **filters: Unpack[HistoryFilters],
    ) -> MessagePage:
        """Return a page of messages, oldest first, or newest first with `order="desc"`.

        `last` asks for the newest so many, oldest first, in place of `limit` and `order`.
        """
        query = {"limit": limit, "last": last, "order": order, **filters}
        return requests.page_of(await self._do(requests.read_messages(conversation_id, query)))

    async def last_messages(
        self, conversation_id: str, count: int, *, user_id: str | None = None
    ) -> list[Message]:
        """Return the newest so many messages, oldest first, in as many requests as it takes."""
        return await self._last(conversation_id, count, {"user_id": user_id})

    async def last_items(self, conversation_id: str, count: int, *, user_id: str | None = None) -> list[Item]:
        """Return the newest so many items, oldest first; see `stream_items`."""
        newest = await self._last(conversation_id, count, {"user_id": user_id, "as": "items"})
        items = [item for message in newest for item in message["items"]]
        return items[max(0, len(items) - count) :]

    def stream_chat_history(
        self,
        conversation_id: str,
        *,
        limit: int | None = None,
        order: Order | None = None,
        **filters: Unpack[HistoryFilters],
    ) -> AsyncGenerator[Message, None]:
        """Yield the history, message by message; where the connection breaks, go on behind the last one.

        A child process may go on with a stream of the synchronous client that its parent began; it does so on
        a connection of its own.
        """
        query = {"limit": limit, "order": order, **filters}
        return self._stream(HistoryStream(conversation_id, query))

    def stream_items(self, conversation_id: str, *, user_id: str | None = None) -> AsyncGenerator[Item, None]:
        """Yield the history as OpenAI's items, oldest first.

        An item is what `add_items` was given, exactly. A message that was appended in another way reads as
        what a model takes: the message, if it says anything, and a `function_call` for each tool call.
        """
        return self._stream(ItemStream(conversation_id, user_id))

    async def get_message(
        self, conversation_id: str, message_id: str, *, user_id: str | None = None
    ) -> Message:
        """Read one message."""
        message: Message = await self._do(requests.read_message(conversation_id, message_id, user_id))
        return message

    # -- following ---------------------------------------------------------------------------------

    def tail(
        self, conversation_id: str, *, after: int | None = None, user_id: str | None = None
    ) -> AsyncGenerator[HistoryEvent, None]:
        """Yield what happens to a conversation, as it happens, until it is deleted.

        It begins after the seq `after` (0: with the first message), or without it with what is new. Every
        message comes once as `message`, in the order of `seq`, whatever happens to the connection or to the
        service meanwhile. `updated` and `deleted` tell what became of messages, also while the connection was
        lost, and may tell it twice. When the conversation was deleted, the last event is `gone`, and the
        iterator ends; a conversation that is not there at the beginning is NotFound.

        A lost connection is opened again, as a call is repeated. After `retry_s` without any, its error is
        raised. With the `id` of the last event as `after`, a later `tail` goes on there.
        """
        return self._follow(HistoryTail(conversation_id, after, user_id))

    def tail_conversations(self, user_id: str | None) -> AsyncGenerator[ListEvent, None]:
        """Yield which conversations of a user, or with None of all, are created, changed and deleted.

        `head` comes first, and after each lost connection: read the list then, because not every earlier
        change is told. It has no end of its own.
        """
        return self._follow(ListTail(user_id))
