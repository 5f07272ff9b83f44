"""The calls that write messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chat_history_client import _appending as appending
from chat_history_client import _requests as requests
from chat_history_client._async.calls import Calls
from chat_history_client._requests import Expected
from chat_history_client.types import Item, Message, MessageItems


class Writing(Calls):
    """Appends, replaces and deletes messages."""

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
        call = appending.append_one(conversation_id, message, idempotency_key, user_id, expected)
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
        call = appending.append(
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
        call = appending.append(
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
        call = appending.replace_message(
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
        call = appending.put_messages(conversation_id, messages, user_id, after=after, expected=expected)
        stored = await self._do(call)
        return list(stored["data"])

    # -- deleting ----------------------------------------------------------------------------------

    async def delete_message(
        self,
        conversation_id: str,
        message_id: str,
        *,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> None:
        """Delete one message. The conditions are those of `delete_messages`."""
        expected = Expected(expected_last_seq, expected_version)
        await self._do(requests.delete_message(conversation_id, message_id, user_id, expected))

    async def delete_messages(
        self,
        conversation_id: str,
        *,
        after: int | None = None,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> None:
        """Delete the messages after a seq, or all of them.

        The conditions `expected_last_seq` and `expected_version` are those of `add_messages`. Stale is raised
        only if this call has changed nothing. Where an answer was lost, and the repetition is stale, the
        first attempt may have been done: then its error is raised, and the conversation is to be read again.
        """
        expected = Expected(expected_last_seq, expected_version)
        await self._do(requests.delete_messages(conversation_id, after, user_id, expected))

    async def pop_message(
        self,
        conversation_id: str,
        *,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> Message | None:
        """Take the newest message, or None where there is none; no two callers get the same one.

        It is never repeated once it was sent, for that would take another; when the answer is lost, this
        raises, and the message may be gone. When the asynchronous caller was cancelled, and so will not have
        the message, it is appended again, with its id, before the cancellation goes on: it stays in the
        history, as the newest. The conditions are those of `add_messages`.
        """
        expected = Expected(expected_last_seq, expected_version)
        return await self._pop(conversation_id, user_id, "messages", expected)

    async def pop_item(
        self,
        conversation_id: str,
        *,
        user_id: str | None = None,
        expected_last_seq: int | None = None,
        expected_version: int | None = None,
    ) -> Item | None:
        """Take the newest item, as `pop_message` takes a message, or None where there is none.

        A message that was not appended as an item, and reads as several, is taken as a whole, of which this
        returns the last.
        """
        expected = Expected(expected_last_seq, expected_version)
        taken = await self._pop(conversation_id, user_id, "items", expected)
        item: Item | None = None if taken is None else taken["items"][-1]
        return item
