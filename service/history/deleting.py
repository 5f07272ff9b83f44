"""Deleting a conversation, and resuming the deletions that were interrupted.

A conversation is gone for everybody in the transaction that takes its owner away (OWNER_WHILE_DELETED). A
long one then loses its messages batch by batch, newest first; if the process dies in between, the maintenance
of any process goes on. A message always has its conversation, because an append and a deletion exclude each
other.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from datetime import datetime

from service import clock
from service.database import Transaction
from service.documents import IDLE, Checkpoint, Conversation, Message
from service.errors import BatchTooLarge, ConversationNotFound
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import conditions, deleting_messages, records
from service.history.conditions import Condition
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.settings import DELETE_BATCH_ITEMS
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, ConversationRef


async def delete_conversation(
    store: ConversationStore,
    ref: ConversationRef,
    within_transaction: Callable[[Transaction, int], Awaitable[None]] | None = None,
    condition: Condition | None = None,
) -> None:
    """Delete a conversation, well formed or not. Raises ConversationNotFound, Stale.

    `within_transaction` is told how many messages there are; what it writes commits with the moment at which
    the conversation is gone.
    """

    async def _owner(transaction: Transaction) -> str | None:
        locked = bson_codec.decode_anything(await store.lock_and_update(transaction, ref, {}, ["user_id"]))
        owner = locked.get("user_id")
        return owner if isinstance(owner, str) else None

    async def begin(items_max: int, transaction: Transaction) -> bool:
        try:
            owner = ref.owner or await _owner(transaction)
            # Without an owner no caller's filter matches it, so it is gone for everybody with this commit.
            gone = {"user_id": OWNER_WHILE_DELETED, "importing": None, "due_at": None}
            changes = {"$set": {**gone, "deleted_owner": owner}}
            locked = await store.lock_and_update(transaction, ref, changes)
        except ConversationNotFound:
            if transaction.may_have_committed:
                return False  # an earlier run committed, and its answer was lost; the rest is deleted below
            raise
        if condition is not None:
            await conditions.require(store, condition, records.state(locked), transaction)
        fields = bson_codec.decode_anything(locked)
        count = fields.get("message_count")
        if within_transaction is not None:
            await within_transaction(transaction, count if isinstance(count, int) else 0)
        at_once = isinstance(count, int) and count <= items_max
        if at_once:
            await _remove_rest(transaction, ref.key, fields)
        return at_once

    try:
        async with store.deadline():
            work = functools.partial(begin, DELETE_BATCH_ITEMS)
            gone = await conditions.run_exclusive(store, ref, work, condition)
    except BatchTooLarge:
        # Few messages, but large ones. First the conversation is gone, then they are deleted in smaller
        # parts.
        async with store.deadline():
            work = functools.partial(begin, -1)
            gone = await conditions.run_exclusive(store, ref, work, condition)
    if not gone:
        await resume_deletion(store, ref.key)


async def _remove_rest(transaction: Transaction, key: ConversationKey, fields: Json) -> None:
    """Delete what is left: it commits with the conversation, so no message and no checkpoint is orphaned."""
    # Beanie's `delete` forgets the session of its `find`, so it is given again. Without it the deletion would
    # be outside of the transaction.
    session = transaction.session
    await Message.find({"conversation_id": key}).delete(session=session)
    if fields.get("checkpoint_seq"):
        await Checkpoint.find({"conversation_id": key}).delete(session=session)
    await Conversation.find_one({"_id": key}).delete(session=session)


async def resume_deletion(store: ConversationStore, key: ConversationKey) -> bool:
    """Finish deleting a conversation: remove its messages, newest first, then the conversation.

    Returns False for one that is being imported, and whose import had activity lately: that one stays. An
    import without activity was interrupted, and what it stored is deleted.
    """
    deleted = ConversationRef(key, OWNER_WHILE_DELETED)
    async with store.deadline():
        try:
            last_seq = await store.run_exclusive(deleted, functools.partial(_take_up, store, deleted))
        except ConversationNotFound:
            return True  # another process has finished it
    if last_seq is None:
        return False
    # Each step has these conditions in its filter, because another process may finish the deletion meanwhile,
    # and another user may then take the id.
    deleting = ConversationRef(key, OWNER_WHILE_DELETED, {"importing": None})

    async def remove(transaction: Transaction) -> None:
        left = await store.lock_and_update(transaction, deleting, {})
        await _remove_rest(transaction, key, bson_codec.decode_anything(left))

    try:
        # A conversation without a well-formed `last_seq` (it is 0 then) loses all its messages at once.
        await deleting_messages.delete_range(store, deleting, SeqRange(key, 0, last_seq))
        async with store.deadline():
            await store.run_exclusive(deleting, remove)
    except ConversationNotFound:
        pass  # another process has finished it
    return True


async def _take_up(
    store: ConversationStore, deleted: ConversationRef, transaction: Transaction
) -> int | None:
    """Return the `last_seq` of a conversation whose deletion is to be finished, 0 where it has none.

    Returns None for an import that is going on.
    """
    read = ("last_seq", "updated_at", "importing")
    fields = bson_codec.decode_anything(await store.find(deleted, transaction, read))
    last_seq, time = fields.get("last_seq"), fields.get("updated_at")
    if fields.get("importing") is not None:
        if isinstance(time, datetime) and clock.now() - time < IDLE:
            return None
        # From this commit on, the next batch of that import fails, because its filter has `importing`.
        await store.lock_and_update(transaction, deleted, {"$set": {"importing": None}})
    return last_seq if isinstance(last_seq, int) else 0


async def resume_deletions(store: ConversationStore) -> int:
    """Resume the deletions and imports that a crash or an outage interrupted, of all tenants.

    Returns how many there were; an import that is going on is none of them.
    """
    async with store.deadline():
        # Only their ids are read, because their metadata may be large.
        found = await store.database.read(Conversation, {"user_id": OWNER_WHILE_DELETED}, fields=["_id"])
    keys = [bson_codec.decode_anything(each)["_id"] for each in found]
    return await store.for_each("deletion_not_finished", keys, functools.partial(resume_deletion, store))
