"""The verbs that only read, for the HTTP routes and for Python callers alike (see `service.chat_service`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Unpack

from service.formats.strict_json import Json
from service.history import checkpoints, context, listing, live, reading
from service.history.context import ContextRequest
from service.history.listing import ConversationPage, ListPosition
from service.history.live import LiveEvent
from service.history.reading import HistoryFilter, MessagePage, Order
from service.history.records import ConversationRecord
from service.history.store import ConversationStore
from service.tenancy import TenantScope


class ChatReader:
    """What can be asked of the conversations of a tenant, or of one user of it.

    Wherever a `user_id` may be given, the conversation must be that user's; one that is not raises
    ConversationNotFound, just as one that does not exist. Every verb may raise DatabaseUnavailable. Messages
    are plain dicts: `id`, `conversation_id`, `user_id`, `seq` (int), `created_at` (aware datetime, UTC,
    milliseconds), then the caller's fields in the caller's order.
    """

    def __init__(self, store: ConversationStore, scope: TenantScope) -> None:
        self._store = store
        self._scope = scope

    # -- conversations -----------------------------------------------------------------------------

    async def get_conversation(self, conversation_id: str, user_id: str | None = None) -> ConversationRecord:
        """Return the conversation. Raises ConversationNotFound."""
        return await reading.conversation(self._store, self._scope.conversation(conversation_id, user_id))

    async def get_version(self, conversation_id: str, user_id: str | None = None) -> int:
        """Return how often the history changed. Raises ConversationNotFound."""
        return await reading.version(self._store, self._scope.conversation(conversation_id, user_id))

    async def list_conversations(
        self, user_id: str | None, *, limit: int | None = None, after: ListPosition | None = None
    ) -> ConversationPage:
        """Return a page of the user's conversations, or of all, latest activity first, after a position.

        It has at most `limit`, and fewer, with `has_more`, where they are large (`CHAT_PAGE_BYTES_MAX`). A
        conversation that is not well formed is left out and logged, so that the others can be read.
        """
        if user_id is None and self._scope.user_id is None:
            return await listing.page_of_tenant(self._store, self._scope, limit, after)
        return await listing.page(self._store, self._scope, user_id or "", limit, after)

    async def get_list_position(self, conversation_id: str, user_id: str) -> ListPosition:
        """Return the present place of a conversation in its user's list. Raises ConversationNotFound."""
        return listing.position_of(self._store, await self.get_conversation(conversation_id, user_id))

    def follow_list(self, user_id: str | None = None) -> AsyncIterator[list[LiveEvent]]:
        """Yield which conversations of a user, or of the tenant, are created, changed and deleted.

        `head` says that the list must be read (again), because not every earlier change is told.
        """
        return live.follow_list(self._store, self._scope, user_id)

    # -- messages ----------------------------------------------------------------------------------

    async def get_message(self, conversation_id: str, message_id: str, user_id: str | None = None) -> Json:
        """Return one message. Raises ConversationNotFound, MessageNotFound."""
        ref = self._scope.conversation(conversation_id, user_id)
        return await reading.message(self._store, ref, message_id)

    async def get_chat_history(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        limit: int | None = None,
        last: int | None = None,
        order: Order = "asc",
        **which: Unpack[HistoryFilter],
    ) -> MessagePage[Json]:
        """Return a page of messages, oldest first, or newest first with `order="desc"`.

        `last` asks for the newest so many, oldest first, in place of `limit` and `order`. A page has at most
        `limit` messages, and fewer, with `has_more`, where they are large (`CHAT_PAGE_BYTES_MAX`). Raises
        ConversationNotFound, InvalidRequest.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await reading.page(self._store, ref, which, limit=limit, last=last, order=order)

    async def get_encoded_history(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        limit: int | None = None,
        last: int | None = None,
        order: Order = "asc",
        **which: Unpack[HistoryFilter],
    ) -> MessagePage[bytes]:
        """Return the page of `get_chat_history`, with its messages as JSON, of which some are kept."""
        ref = self._scope.conversation(conversation_id, user_id)
        return await reading.encoded_page(self._store, ref, which, limit=limit, last=last, order=order)

    def stream_chat_history(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        limit: int | None = None,
        order: Order = "asc",
        **which: Unpack[HistoryFilter],
    ) -> AsyncIterator[list[Json]]:
        """Yield the whole history in parts, each read when it is asked for; memory stays that of a part.

        It ends at the last message that was there when it began. The arguments are those of
        `get_chat_history`, but that `limit` may be any number, or None for all. The first part may be empty;
        it raises the errors of the arguments, but that of an impossible id, which the call raises.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return reading.stream(self._store, ref, which, limit=limit, order=order)

    def follow_chat_history(
        self, conversation_id: str, user_id: str | None = None, *, after: int | None = None
    ) -> AsyncIterator[list[LiveEvent]]:
        """Yield the messages after a seq, or from now on, and then whatever happens, without an end.

        The first part raises ConversationNotFound. The iterator ends after `gone`, or with the service.
        """
        return live.follow(self._store, self._scope.conversation(conversation_id, user_id), after)

    async def wait_for_messages(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        seconds: int,
        limit: int | None = None,
        **which: Unpack[HistoryFilter],
    ) -> MessagePage[Json]:
        """Return a page as soon as it has a message, or an empty one after so many seconds."""
        ref = self._scope.conversation(conversation_id, user_id)
        return await live.wait_for_page(self._store, ref, which, limit=limit, seconds=seconds)

    # -- the context of a model call, and checkpoints -----------------------------------------------

    async def get_context(
        self, conversation_id: str, wanted: ContextRequest, user_id: str | None = None
    ) -> Json:
        """Return what a model is to be sent of the conversation, with counts; see docs/context.md.

        Raises ConversationNotFound.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await context.context(self._store, ref, wanted)

    async def list_checkpoints(self, conversation_id: str, user_id: str | None = None) -> list[Json]:
        """Return all checkpoints of the conversation, newest first. Raises ConversationNotFound."""
        return await checkpoints.listed(self._store, self._scope.conversation(conversation_id, user_id))
