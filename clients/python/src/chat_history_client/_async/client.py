"""The API as Python calls. `_sync/client.py` is generated from `_async/client.py`, by `make client`.

Calls are repeated, by tenacity, until there is an answer or `retry_s` is over: after a lost connection, and
after a 503 or 429, whose `Retry-After` is kept to. An append carries an idempotency key that is made once for
all its repetitions, so it is stored once. A failure that no repetition can mend (a certificate that is not
trusted, a header that HTTP cannot carry) is raised at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Unpack

from chat_history_client import _requests as requests
from chat_history_client._async.calls import Calls
from chat_history_client._requests import UNSET, Expected
from chat_history_client._stream import ExportStream, HistoryStream, ItemStream
from chat_history_client.types import (
    Conversation,
    ConversationPage,
    EraseReceipt,
    HistoryFilters,
    Item,
    Json,
    Message,
    MessageItems,
    MessagePage,
    Order,
    Time,
)


class AsyncChatHistoryClient(Calls):
    """A client of the service; one may be used from several threads and processes, and from event loops.

    `base_url` is the service's, or else the environment's `CHAT_HISTORY_URL`, or else http://127.0.0.1:8000.
    `api_key` is an API key or a token, or else `CHAT_HISTORY_API_KEY`; "" sends none. `timeout_s` is that of
    one attempt, `retry_s` is how long a call is repeated, and `headers` go with every request. `transport` is
    httpx's, or a function that makes one, which is needed where there are several event loops or processes.

    Calls raise ApiError and its kinds, or httpx.TransportError when no attempt had an answer. A `base_url` or
    a header that cannot work is a ValueError at once. A value that is not JSON (a set, bytes, a time, a key
    that is not a string) is a TypeError that names its place. Where `user_id` may be given, the conversation
    must be that user's.

    In the asynchronous client a write that is cancelled is finished first, within `retry_s + timeout_s`: its
    outcome is settled when the CancelledError comes. So it is not lost, nor does it show up later. Reads are
    cancelled at once.
    """

    # -- conversations -----------------------------------------------------------------------------

    async def get_or_create_conversation(
        self,
        user_id: str,
        conversation_id: str | None = None,
        *,
        title: str | None = None,
        metadata: Json | None = None,
        expires_at: Time | None = None,
    ) -> Conversation:
        """Return the user's conversation with this id, or create it; without an id, create one.

        `title`, `metadata` and `expires_at` are those of a new conversation, which the service removes, with
        its messages, from `expires_at` on.
        """
        call = requests.create(
            user_id, conversation_id, title=title, metadata=metadata, expires_at=expires_at
        )
        conversation: Conversation = await self._do(call)
        return conversation

    async def get_conversation(self, conversation_id: str, *, user_id: str | None = None) -> Conversation:
        """Read a conversation."""
        conversation: Conversation = await self._do(requests.read_conversation(conversation_id, user_id))
        return conversation

    async def update_conversation(
        self,
        conversation_id: str,
        *,
        title: str | None = UNSET,
        metadata: Json | None = UNSET,
        expires_at: Time | None = UNSET,
        user_id: str | None = None,
    ) -> Conversation:
        """Change the title, the metadata as a whole, or the expiry; None clears, the rest stays."""
        changes = {"title": title, "metadata": metadata, "expires_at": expires_at}
        conversation: Conversation = await self._do(requests.update(conversation_id, user_id, changes))
        return conversation

    async def delete_conversation(self, conversation_id: str, *, user_id: str | None = None) -> None:
        """Delete a conversation with all its messages."""
        await self._do(requests.delete_conversation(conversation_id, user_id))

    async def list_conversations(
        self, user_id: str | None, *, limit: int | None = None, cursor: str | None = None
    ) -> ConversationPage:
        """Return a page of a user's conversations, latest activity first; `next` is the next `cursor`.

        With None it is a page of all users' conversations, for which the key must have the scope `admin`.
        """
        return requests.page_of(await self._do(requests.list_conversations(user_id, limit, cursor)))

    async def stream_conversations(self, user_id: str | None) -> AsyncGenerator[Conversation, None]:
        """Yield all conversations of a user, or of all users, latest activity first, page by page."""
        page = await self.list_conversations(user_id)
        while True:
            for conversation in page.data:
                yield conversation
            if not page.has_more:
                return
            page = await self.list_conversations(user_id, cursor=page.next)

    # -- appending ---------------------------------------------------------------------------------

    async def add_message(
        self,
        conversation_id: str,
        message: Mapping[str, Any],
        *,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> Message:
        """Append one message, once, and return what is stored; see `add_messages`."""
        expected = Expected(expected_last_seq, expected_version)
        call = requests.append_one(conversation_id, message, idempotency_key, user_id, expected)
        stored: Message = await self._do(call)
        return stored

    async def add_messages(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
        create_for: str | None = None,
    ) -> list[Message]:
        """Append a batch, all of it or nothing, once; return what is stored.

        Without an `idempotency_key`, and without ids in the messages, a key is made for this call. The
        service takes up to 1,000 messages and 32 MiB; `add_all_messages` takes any number.

        With `expected_last_seq` it is stored only if no message was appended after that seq (0: only if there
        is none), and with `expected_version` only if the history has not changed at all. Otherwise this call
        raises Stale, which has the messages that were `missed`. With `create_for`, a user's id, the
        conversation is created for that user first, if it is not there.
        """
        expected = Expected(expected_last_seq, expected_version)
        new = None if create_for is None else {"user_id": create_for}
        call = requests.append(
            conversation_id, "messages", messages, idempotency_key, user_id, expected=expected, create=new
        )
        stored = await self._do(call)
        return list(stored["data"])

    async def add_items(
        self,
        conversation_id: str,
        items: Sequence[Mapping[str, Any]],
        *,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
        create_for: str | None = None,
    ) -> list[MessageItems]:
        """Append OpenAI's items exactly as they are, as `add_messages` appends messages."""
        expected = Expected(expected_last_seq, expected_version)
        new = None if create_for is None else {"user_id": create_for}
        call = requests.append(
            conversation_id, "items", items, idempotency_key, user_id, expected=expected, create=new
        )
        stored = await self._do(call)
        return list(stored["data"])

    async def add_all_messages(
        self, conversation_id: str, messages: Sequence[Mapping[str, Any]], *, user_id: str
    ) -> None:
        """Append messages of any number and size, and create the user's conversation where it is not there.

        They go in batches of up to 1,000 messages and 24 MiB, or smaller ones where the service says that
        these are too large (413). Each batch is stored whole or not at all, and once. When one is refused,
        those before it stay stored, those behind it are not sent, and the error counts its places from the
        beginning of `messages`. A message that is too large by itself is sent alone, so that the service
        says so.
        """
        await self._add_all(conversation_id, "messages", messages, user_id)

    async def add_all_items(
        self, conversation_id: str, items: Sequence[Mapping[str, Any]], *, user_id: str
    ) -> None:
        """Append items of any number and size, as `add_all_messages` appends messages."""
        await self._add_all(conversation_id, "items", items, user_id)

    # -- replacing ---------------------------------------------------------------------------------

    async def replace_message(
        self,
        conversation_id: str,
        message_id: str,
        message: Mapping[str, Any],
        *,
        upsert: bool = False,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> Message:
        """Replace a message in its place; with `upsert` append it if it is missing. Return what is stored.

        A message that was read may be changed and given as it is. The conditions are those of `add_messages`.
        """
        expected = Expected(expected_last_seq, expected_version)
        call = requests.replace_message(
            conversation_id, message_id, message, user_id, upsert=upsert, expected=expected
        )
        stored: Message = await self._do(call)
        return stored

    async def put_messages(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        after: int | None = None,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> list[Message]:
        """Make the history, or what follows the seq `after`, exactly this list; return what is stored.

        Each message has an `id`. What stands equal in front stays as it is, a changed message there is
        replaced in its place, and the rest is cut off and appended, all in one transaction.
        """
        expected = Expected(expected_last_seq, expected_version)
        call = requests.put_messages(conversation_id, messages, user_id, after=after, expected=expected)
        stored = await self._do(call)
        return list(stored["data"])

    # -- reading -----------------------------------------------------------------------------------

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

    # -- deleting ----------------------------------------------------------------------------------

    async def delete_message(
        self, conversation_id: str, message_id: str, *, user_id: str | None = None
    ) -> None:
        """Delete one message."""
        await self._do(requests.delete_message(conversation_id, message_id, user_id))

    async def delete_messages(
        self, conversation_id: str, *, after: int | None = None, user_id: str | None = None
    ) -> None:
        """Delete the messages after a seq, or all of them."""
        await self._do(requests.delete_messages(conversation_id, after, user_id))

    async def pop_message(self, conversation_id: str, *, user_id: str | None = None) -> Message | None:
        """Take the newest message, or None where there is none; no two callers get the same one.

        It is never repeated once it was sent, for that would take another; when the answer is lost, this
        raises, and the message may be gone. When the asynchronous caller was cancelled, and so will not have
        the message, it is appended again, with its id, before the cancellation goes on: it stays in the
        history, as the newest.
        """
        return await self._pop(conversation_id, user_id, "messages")

    async def pop_item(self, conversation_id: str, *, user_id: str | None = None) -> Item | None:
        """Take the newest item, as `pop_message` takes a message, or None where there is none.

        A message that was not appended as an item, and reads as several, is taken as a whole, of which this
        returns the last.
        """
        taken = await self._pop(conversation_id, user_id, "items")
        item: Item | None = None if taken is None else taken["items"][-1]
        return item

    # -- users -------------------------------------------------------------------------------------

    async def erase_user(self, user_id: str, *, dry_run: bool = False, wait_s: float = 3600) -> EraseReceipt:
        """Erase a user, with all conversations and messages, or count what that would remove.

        The service goes on with a large erasure by itself, and this asks for its receipt until it has ended,
        for `wait_s` seconds, and then raises TimeoutError; the erasure goes on nevertheless. An erasure that
        was interrupted goes on when it is repeated, as this does after a lost connection. If the answer to a
        finished erasure was lost, the receipt of the repetition counts nothing.
        """
        return await self._erase(user_id, dry_run, wait_s)

    def export_user(self, user_id: str) -> AsyncGenerator[Json, None]:
        """Yield everything of a user, line by line, as `chat-history import` takes it back.

        An export that breaks off after its first line raises httpx.TransportError: begin a new one.
        """
        return self._stream(ExportStream(user_id))
