"""The OpenAI Agents SDK's session, kept by the service (the extra `agents`).

Items are stored as the service stores those of `/v1` (docs/decisions/0005-openai-items.md), but exactly as
they were given: nothing is filled in, and an id stays in the item. So `/v1` reads them, too.
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

from service import openai_items
from service.clients.http import ChatHistoryClient, NotFound


class ChatHistorySession(SessionABC):
    """A session that is a conversation, owned by `user_id`; its id is the session's unless it is given.

    One request for each `add_items` (of up to 1,000 items and 24 MiB, stored together or not at all, and
    once, whatever happens to the connection), and one for `pop_item`, which gives an item to one caller only.
    May be used from several event loops, as may the client. The conversation is made by the first
    `add_items`.

    A run that is cancelled while it writes stores what it had to store, and is cancelled then. A cancelled
    `pop_item` leaves its item in the session, as the newest.
    """

    def __init__(
        self,
        session_id: str,
        client: ChatHistoryClient,
        *,
        user_id: str = "default",
        conversation_id: str | None = None,
        session_settings: SessionSettings | dict[str, Any] | None = None,
    ) -> None:
        self.session_id = session_id
        self.conversation_id = conversation_id or session_id
        self.session_settings = coerce_session_settings(session_settings or SessionSettings())
        self._client = client
        self._user_id = user_id

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """Return the items, oldest first; with a limit the newest so many."""
        wanted = resolve_session_limit(limit, self.session_settings)
        if wanted is not None and wanted <= 0:
            return []
        try:
            if wanted is None:
                stream = self._client.stream(self.conversation_id, user_id=self._user_id)
                messages = [message async for message in stream]
            else:
                messages = await self._client.newest(self.conversation_id, wanted, user_id=self._user_id)
        except NotFound:
            return []  # nothing was added yet
        items = [item for message in messages for item in _items(message)]
        return items if wanted is None else items[-wanted:]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Append items, in as few batches as the service takes, each of which is stored whole.

        When a batch is refused, those before it stay stored; see ChatHistoryClient.append_all.
        """
        messages = [_message(cast("dict[str, Any]", item)) for item in items]
        await self._client.append_all(self._user_id, self.conversation_id, messages)

    async def pop_item(self) -> TResponseInputItem | None:
        """Take the newest item, or None where there is none.

        A message that was appended natively and reads as several items is taken as a whole, of which this
        returns the last.
        """
        try:
            message = await self._client.pop(self.conversation_id, user_id=self._user_id)
        except NotFound:
            return None
        return _items(message)[-1] if message is not None else None

    async def clear_session(self) -> None:
        """Delete all items; the conversation stays."""
        try:
            await self._client.delete_messages(self.conversation_id, user_id=self._user_id)
        except NotFound:
            return


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """Return the message that an item is stored as, its id, if it has one, being part of the item."""
    return openai_items.message_of(item, keep_id=True)


def _items(message: dict[str, Any]) -> list[TResponseInputItem]:
    """Return what was given, or, of a message that no session stored, what the model takes.

    The ids of items that came through `/v1` are the model's own and stay; those that the service made for
    parts of native messages are none that the model would know.
    """
    item = openai_items.original(message)
    if item is not None and ("id" in item or message["id"].startswith("idem_")):
        read = [item]
    elif item is not None:
        read = openai_items.items_of(message)
    else:
        read = [
            {name: value for name, value in each.items() if name != "id"}
            for each in openai_items.items_of(message)
        ]
    return cast("list[TResponseInputItem]", read)
