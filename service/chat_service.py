"""The verbs of the service, for the HTTP routes and for Python callers alike.

The model. A conversation has one owner and a counter, `last_seq`. A message belongs to one conversation and
has a place in it, `seq`, that it never leaves. The invariants, each with the test that proves it
(tests/integration); the rules that keep them are in `service.history`:

- `seq` is 1, 2, 3 … in the order of commits; a reader that has seen n + 1 will never find a new n or less
  (test_concurrency).
- All messages of one append commit together with the counters that count them, and stand together
  (test_concurrency).
- `created_at` never decreases along `seq`, whatever the clocks of several processes say (test_history).
- An append that is repeated with its key, or with its ids, is stored once (test_idempotency).
- A message always has its conversation: an append and a deletion of the conversation exclude each other
  (test_concurrency).
- A read costs what it returns, not what it passes over (test_flat_cost).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from service.chat_reader import ChatReader
from service.formats.strict_json import Json
from service.history import (
    checkpoints,
    creating,
    deleting,
    deleting_messages,
    group_commit,
    new_messages,
    replacing,
)
from service.history.appending import AppendResult
from service.history.conditions import Condition
from service.history.context import ContextRequest, ShortenedResults
from service.history.creating import UNSET
from service.history.listing import ConversationPage, ListPosition
from service.history.live import LiveEvent
from service.history.new_messages import NewMessage, PreparedBatch
from service.history.reading import HistoryFilter, MessagePage
from service.history.records import ConversationRecord
from service.history.replacing import PutResult
from service.history.state import ServiceState, service_state
from service.history.store import ConversationStore

__all__ = [
    "UNSET",
    "AppendResult",
    "ChatService",
    "Condition",
    "ContextRequest",
    "ConversationPage",
    "ConversationRecord",
    "ConversationStore",
    "HistoryFilter",
    "Json",
    "ListPosition",
    "LiveEvent",
    "MessagePage",
    "NewMessage",
    "PreparedBatch",
    "PutResult",
    "ServiceState",
    "ShortenedResults",
    "service_state",
]


class ChatService(ChatReader):
    """The verbs, limited to a tenant, or to one user of it: nothing else exists for the caller.

    A verb that writes takes a `condition`, and raises Stale where the conversation does not meet it; nothing
    is changed then. A repetition of a write that was done is answered as such, and not as stale. Those that
    only read are in `ChatReader`, with what holds for all.
    """

    # -- conversations -----------------------------------------------------------------------------

    async def get_or_create_conversation(
        self,
        user_id: str,
        conversation_id: str | None = None,
        *,
        title: str | None = None,
        metadata: Json | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[ConversationRecord, bool]:
        """Return the user's conversation with this id and False, or a new one and True.

        Title, metadata and expiry are those of a new one; an existing one stays as it is. Raises
        ConversationIdTaken where another user owns the id, InvalidRequest for what cannot be stored.
        """
        return await creating.get_or_create(
            self._store,
            self._scope,
            user_id,
            conversation_id,
            title=title,
            metadata=metadata,
            expires_at=expires_at,
        )

    async def start_conversation(
        self,
        user_id: str,
        messages: Sequence[Mapping[str, Any]] | PreparedBatch = (),
        *,
        metadata: Json | None = None,
        idempotency_key: str | None = None,
    ) -> ConversationRecord:
        """Create a conversation with its first messages: all of it commits together, or nothing.

        With a key the request may be repeated, and returns the conversation that it made first. Raises what
        `add_messages` raises, and IdempotencyConflict where the key made one with other messages.
        """
        return await creating.start(
            self._store,
            self._scope,
            user_id,
            self._prepared(messages, idempotency_key) if messages else None,
            metadata=metadata,
            idempotency_key=idempotency_key,
        )

    async def update_conversation(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        title: str | None = UNSET,
        metadata: Json | None = UNSET,
        expires_at: datetime | None = UNSET,
        condition: Condition | None = None,
    ) -> ConversationRecord:
        """Set the title, the expiry, or the metadata as a whole, and return the conversation as it is then.

        What is not given stays as it is; None clears it. Raises ConversationNotFound, InvalidRequest.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await creating.update(
            self._store, ref, title=title, metadata=metadata, expires_at=expires_at, condition=condition
        )

    async def delete_conversation(
        self, conversation_id: str, user_id: str | None = None, *, condition: Condition | None = None
    ) -> None:
        """Delete the conversation with all its messages. Raises ConversationNotFound.

        It is gone for everybody at once. A long one then loses its messages batch by batch; if the process
        dies in between, the maintenance of any process finishes the deletion.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        await deleting.delete_conversation(self._store, ref, condition=condition)

    # -- appending ---------------------------------------------------------------------------------

    async def add_message(
        self,
        conversation_id: str,
        message: Mapping[str, Any],
        user_id: str | None = None,
        *,
        idempotency_key: str | None = None,
        condition: Condition | None = None,
    ) -> AppendResult:
        """Append one message; see `add_messages`, whose errors then begin at the message itself."""
        batch = self.prepare([NewMessage(message)], idempotency_key=idempotency_key, field=None)
        return await self.add_messages(conversation_id, batch, user_id, condition=condition)

    async def add_messages(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]] | PreparedBatch,
        user_id: str | None = None,
        *,
        idempotency_key: str | None = None,
        condition: Condition | None = None,
    ) -> AppendResult:
        """Append a batch, whole or not at all, and return what is stored.

        A message has a `role` and any other JSON; its `id` may be the caller's own. A request with a key or
        with ids may be repeated: it is stored once, and `replayed` then says so. The messages are given as
        they are, or as `prepare` made them, which then has the key. Raises ConversationNotFound,
        InvalidRequest (with the path of each fault) and IdempotencyConflict.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        batch = self._prepared(messages, idempotency_key)
        return await group_commit.append(self._store, ref, batch, condition)

    async def append_or_create(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]] | PreparedBatch,
        user_id: str,
        *,
        title: str | None = None,
        metadata: Json | None = None,
        idempotency_key: str | None = None,
        condition: Condition | None = None,
    ) -> AppendResult:
        """Append a batch to the user's conversation; where it is missing, create it in the same transaction.

        An existing one keeps its title and metadata. Raises ConversationIdTaken where it is another user's.
        """
        batch = self._prepared(messages, idempotency_key)
        wanted = creating.Wanted(user_id, conversation_id, title, metadata)
        return await creating.append_or_create(self._store, self._scope, wanted, batch, condition)

    # -- replacing ---------------------------------------------------------------------------------

    async def replace_message(
        self,
        conversation_id: str,
        message: PreparedBatch,
        user_id: str | None = None,
        *,
        upsert: bool = False,
        condition: Condition | None = None,
    ) -> PutResult:
        """Replace a message, which keeps its place and its time; with `upsert` append it if it is missing.

        The same content again changes nothing. Raises ConversationNotFound, MessageNotFound.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await replacing.put_message(self._store, ref, message, upsert=upsert, condition=condition)

    async def put_messages(
        self,
        conversation_id: str,
        messages: PreparedBatch,
        user_id: str | None = None,
        *,
        after: int = 0,
        condition: Condition | None = None,
    ) -> AppendResult:
        """Make the history after a seq exactly this list, whose messages have ids, in one transaction.

        What stands equal in front stays, a changed message there is replaced in its place, and the rest is
        cut off and appended. Raises ConversationNotFound, IdempotencyConflict for an id before `after`, and
        BatchTooLarge where the history is more than one transaction takes.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        stored = await replacing.put_messages(self._store, ref, messages, after=after, condition=condition)
        return AppendResult(stored, replayed=False)

    def prepare_named(self, messages: Sequence[NewMessage], *, field: str | None) -> PreparedBatch:
        """Check messages which all have ids, for `replace_message` and `put_messages`; there may be none."""
        new_messages.require_ids(messages, field)
        return self.prepare(messages, field=field) if messages else PreparedBatch([], None)

    def prepare(
        self,
        messages: Sequence[NewMessage],
        *,
        idempotency_key: str | None = None,
        field: str | None = "messages",
    ) -> PreparedBatch:
        """Check messages, name and encode them, for `add_messages` and `start_conversation`.

        It waits for nothing, so a thread may do it. `field` is what the caller's request calls the batch, and
        None where the request is the one message. Raises InvalidRequest, with the path of each fault.
        """
        return new_messages.prepare(
            messages,
            idempotency_key,
            field=field,
            items_max=self._store.settings.batch_items_max,
            keep_exact_copy=self._store.database.embedded_engine,
        )

    def _prepared(
        self, messages: Sequence[Mapping[str, Any]] | PreparedBatch, idempotency_key: str | None
    ) -> PreparedBatch:
        if isinstance(messages, PreparedBatch):
            return messages
        return self.prepare(list(map(NewMessage, messages)), idempotency_key=idempotency_key)

    # -- checkpoints ------------------------------------------------------------------------------

    async def create_checkpoint(
        self,
        conversation_id: str,
        upto_seq: int,
        summary: str,
        user_id: str | None = None,
        *,
        metadata: Json | None = None,
    ) -> tuple[Json, bool]:
        """Store a summary of the history up to a seq, and return it and True, or False for a repetition.

        Raises ConversationNotFound, InvalidRequest where no turn ends there, and CheckpointNotForward.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await checkpoints.create(self._store, ref, upto_seq, summary, metadata)

    async def delete_checkpoint(
        self, conversation_id: str, checkpoint_id: str, user_id: str | None = None
    ) -> None:
        """Delete a checkpoint, so that the one before counts. Raises CheckpointNotFound."""
        ref = self._scope.conversation(conversation_id, user_id)
        await checkpoints.remove(self._store, ref, checkpoint_id)

    # -- deleting messages -------------------------------------------------------------------------

    async def delete_message(
        self,
        conversation_id: str,
        message_id: str,
        user_id: str | None = None,
        *,
        condition: Condition | None = None,
    ) -> None:
        """Delete one message; its seq stays empty. Raises ConversationNotFound, MessageNotFound."""
        ref = self._scope.conversation(conversation_id, user_id)
        await deleting_messages.delete_message(self._store, ref, message_id, condition)

    async def pop_message(
        self, conversation_id: str, user_id: str | None = None, *, condition: Condition | None = None
    ) -> Json | None:
        """Delete the newest message and return it, or None where there is none: no two callers get the same.

        Not to be repeated when its answer is lost, because it would delete another. Raises
        ConversationNotFound.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await deleting_messages.pop_message(self._store, ref, condition)

    async def delete_messages(
        self,
        conversation_id: str,
        user_id: str | None = None,
        *,
        after: int = 0,
        condition: Condition | None = None,
    ) -> int:
        """Delete all messages with a seq above `after`; return how many. Raises ConversationNotFound.

        Up to DELETE_BATCH_ITEMS go at once; more go batch by batch, newest first, so that the history is at
        every moment whole up to some message, also if the process dies in between. A message that is appended
        meanwhile stays.
        """
        ref = self._scope.conversation(conversation_id, user_id)
        return await deleting_messages.delete_messages(self._store, ref, after, condition)
