"""The OpenAI Agents SDK's session, kept by the service (the extra `agents`).

Items are stored exactly as they were given: nothing is filled in, and an id stays in the item. They are
native messages as well, and items of the service's OpenAI API. A value that the service cannot store (NaN,
half an emoji) is kept as `_exact` says.
"""

from __future__ import annotations

from typing import Any, cast

from agents.items import TResponseInputItem
from agents.memory.session import SessionABC
from agents.memory.session_settings import (
    SessionSettings,
    coerce_session_settings,
    resolve_session_limit,
)

from chat_history_client import AsyncChatHistoryClient, Item, NotFound
from chat_history_client._adapters import aread_or_begin
from chat_history_client._exact import kept_item, opened_item


class ChatHistorySession(SessionABC):
    """A session that is a conversation, owned by `user_id`; its id is the session's unless it is given.

    One request for each `add_items` (of up to 1,000 items and 24 MiB, stored together or not at all, and
    once, whatever happens to the connection), and one for `pop_item`, which gives an item to one caller only.
    May be used from several event loops, as may the client. The conversation is made by the first
    `get_items` or `add_items`; if it is another user's, either raises Conflict.

    With `max_context_tokens`, `get_items` without a limit returns what a model is to be sent within so many
    tokens, as the service's `get_context` has it; the session itself stays whole.

    A run that is cancelled while it writes stores what it had to store, and is cancelled then. A cancelled
    `pop_item` leaves its item in the session, as the newest.
    """

    def __init__(
        self,
        session_id: str,
        client: AsyncChatHistoryClient,
        *,
        user_id: str = "default",
        conversation_id: str | None = None,
        max_context_tokens: int | None = None,
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> None:
        self.session_id = session_id
        self.conversation_id = conversation_id or session_id
        self.session_settings = coerce_session_settings(session_settings or SessionSettings())
        self._client = client
        self._user_id = user_id
        self._max_context_tokens = max_context_tokens

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """Return the items, oldest first; with a limit the newest so many."""
        count = resolve_session_limit(limit, self.session_settings)

        async def read_items() -> list[Item]:
            client, name, user = self._client, self.conversation_id, self._user_id
            if count is not None:
                return await client.last_items(name, count, user_id=user)
            if (most := self._max_context_tokens) is not None:
                context = await client.get_context(name, max_tokens=most, format="responses", user_id=user)
                return context["messages"]
            return [item async for item in client.stream_items(name, user_id=user)]

        items = await aread_or_begin(self._client, self.conversation_id, self._user_id, read_items)
        return cast("list[TResponseInputItem]", list(map(opened_item, items)))

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Append items, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see `add_all_items` of the client.
        """
        given = list(map(kept_item, cast("list[Item]", items)))
        await self._client.add_all_items(self.conversation_id, given, user_id=self._user_id)

    async def pop_item(self) -> TResponseInputItem | None:
        """Take the newest item, or None where there is none; see `pop_item` of the client."""
        try:
            item = await self._client.pop_item(self.conversation_id, user_id=self._user_id)
        except NotFound:
            return None
        return None if item is None else cast("TResponseInputItem", opened_item(item))

    async def clear_session(self) -> None:
        """Delete all items; the conversation stays."""
        try:
            await self._client.delete_messages(self.conversation_id, user_id=self._user_id)
        except NotFound:
            return
