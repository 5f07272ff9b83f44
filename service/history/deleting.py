"""Deleting: a message, the newest, the end of a history, a conversation; and resuming interrupted deletions.

A conversation is gone for everybody in the transaction that takes its owner away (OWNER_WHILE_DELETED). A
long one then loses its messages batch by batch, newest first; if the process dies in between, the maintenance
of any process goes on. A message always has its conversation, because an append and a deletion exclude each
other.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from service import clock
from service.database import Transaction
from service.documents import IDLE, Checkpoint, Conversation, Message
from service.errors import BatchTooLarge, ConversationNotFound, MessageNotFound, Stale
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import checkpoints, conditions, records, rewrites, seq_range
from service.history.conditions import Condition
from service.history.records import STATE_FIELDS
from service.history.seq_range import SeqRange
from service.history.store import PAUSE_S_MAX, ConversationStore
from service.settings import DELETE_BATCH_ITEMS
from service.tenancy import OWNER_WHILE_DELETED, ConversationKey, ConversationRef, message_document_id

# The fields of a conversation that a deletion of messages needs.
_LOCKED = tuple({*STATE_FIELDS, *rewrites.FIELDS})


# -- conversations ---------------------------------------------------------------------------------


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
        await _delete_range(store, deleting, SeqRange(key, 0, last_seq))
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


# -- messages --------------------------------------------------------------------------------------


async def delete_message(
    store: ConversationStore, ref: ConversationRef, message_id: str, condition: Condition | None = None
) -> None:
    """Delete one message; its seq stays empty. Raises ConversationNotFound, MessageNotFound, Stale."""

    async def delete(transaction: Transaction) -> None:
        locked = await store.lock_and_update(transaction, ref, {}, _LOCKED)
        of = records.state(locked)
        await conditions.require(store, condition, of, transaction)
        found = await seq_range.find_message(store, of, message_id, transaction)
        if found is None:
            raise MessageNotFound(f"There is no message {message_id} in this conversation.")
        await _delete_one(store, ref, transaction, locked, found)

    transaction = Transaction()
    async with store.deadline():
        while True:  # until the deadline of the call
            try:
                return await store.run_exclusive(ref, delete, transaction)
            except (MessageNotFound, Stale) as error:
                # That transaction was aborted, and what it saw may not be durable. This one commits.
                if not await store.read_committed(functools.partial(_has_message, store, ref, message_id)):
                    if transaction.may_have_committed:
                        return None  # an earlier run deleted it, and its answer was lost
                    if isinstance(error, MessageNotFound):
                        raise
                await conditions.refuse_stale(store, ref, condition)
            # The message exists again: it was stored meanwhile, or its deletion was lost with a primary.
            await asyncio.sleep(PAUSE_S_MAX)


async def _has_message(
    store: ConversationStore, ref: ConversationRef, message_id: str | None, transaction: Transaction
) -> bool:
    return await seq_range.has_message(store, await store.state(ref, transaction), message_id, transaction)


async def _delete_one(
    store: ConversationStore, ref: ConversationRef, transaction: Transaction, locked: bytes, message: Json
) -> None:
    """Delete a message that the transaction has read, and uncount it: both commit together."""
    of, seq = records.state(locked), message["seq"]
    named = {
        "_id": message_document_id(of.key, message["id"]),
        "conversation_id": of.key,
        "user_id": of.owner,
    }
    await Message.find(named).delete(session=transaction.session)
    await store.lock_and_update(transaction, ref, _fewer(locked, 1, seq - 1, seq), ["user_id"])
    await checkpoints.drop_from(store, ref, of, seq, transaction)


def _fewer(locked: bytes, messages: int, low: int, high: int) -> Json:
    """Return the change of a conversation that loses so many messages in a part of it."""
    return rewrites.noting(bson_codec.decode_anything(locked), low, high, {"message_count": -messages})


async def pop_message(
    store: ConversationStore, ref: ConversationRef, condition: Condition | None = None
) -> Json | None:
    """Delete the newest message and return it, or None where there is none; see `ChatService`."""
    popped: list[Json] = []
    in_doubt: list[Json] = []

    async def pop(transaction: Transaction) -> Json:
        if transaction.may_have_committed and popped:
            # It is reset, so that at the next run it tells of this run alone.
            in_doubt.append(popped[-1])
            transaction.may_have_committed = False
        for before in in_doubt:
            # Read in this transaction, because a majority read may still show the message that was popped,
            # and another message would then be popped in its place.
            if not await _has_message(store, ref, before["id"], transaction):
                transaction.wrote = False
                return before  # an earlier run popped it, and its answer was lost
        locked = await store.lock_and_update(transaction, ref, {}, _LOCKED)
        of = records.state(locked)
        await conditions.require(store, condition, of, transaction)
        found = await seq_range.read(store, SeqRange.whole(of), 1, backwards=True, transaction=transaction)
        if not found:
            raise MessageNotFound("There is no message in this conversation.")
        popped.append(records.message(found[0]))
        await _delete_one(store, ref, transaction, locked, popped[-1])
        return popped[-1]

    transaction = Transaction()
    async with store.deadline():
        while True:  # until the deadline of the call
            try:
                return await store.run_exclusive(ref, pop, transaction)
            except Stale:
                await conditions.refuse_stale(store, ref, condition)
            except MessageNotFound:
                # That transaction was aborted, and what it saw may not be durable. This one commits.
                if not await store.read_committed(functools.partial(_has_message, store, ref, None)):
                    return None
            await asyncio.sleep(PAUSE_S_MAX)  # one was appended meanwhile


async def delete_messages(
    store: ConversationStore, ref: ConversationRef, after: int, condition: Condition | None = None
) -> int:
    """Delete all messages with a seq above `after`, newest first; see `ChatService.delete_messages`.

    The condition is one of the first transaction, which locks the conversation.
    """
    # In a transaction, because a majority read may show an older, lower `last_seq`, and the messages above it
    # would stay.
    async with store.deadline():
        of = await store.read_committed(functools.partial(store.state, ref))
    part = SeqRange(of.key, min(after, of.last_seq), of.last_seq)
    if condition is not None and part.low == part.high:
        async with store.deadline():
            await conditions.refuse_stale(store, ref, condition)
    return await _delete_range(store, ref, part, condition)


async def _delete_range(
    store: ConversationStore, ref: ConversationRef, part: SeqRange, condition: Condition | None = None
) -> int:
    # Newest first, so that after each commit the history is whole up to some message. Each batch has a
    # deadline of its own, because a long history may take longer than one.
    deleted, items_max = 0, DELETE_BATCH_ITEMS
    while part.low < part.high:
        batch = _Batch(part, items_max, None if deleted else condition)
        try:
            async with store.deadline():
                work = functools.partial(_delete_batch, store, ref, batch)
                count = await conditions.run_exclusive(store, ref, work, batch.condition)
        except BatchTooLarge:
            if items_max == 1:
                raise
            items_max //= 2  # the messages are large, so the transaction must have fewer
            continue
        deleted += count
        part = part.clip(part.low, batch.chosen.low if batch.chosen else part.low)
    return deleted


@dataclass
class _Batch:
    """The newest messages of a part, which one transaction deletes, and what each of its runs deleted."""

    part: SeqRange
    items_max: int
    condition: Condition | None = None
    chosen: SeqRange | None = None
    counts: list[int] = field(default_factory=list)


async def _delete_batch(
    store: ConversationStore, ref: ConversationRef, batch: _Batch, transaction: Transaction
) -> int:
    """Delete the messages and uncount them: both commit together, so the count is always true.

    The first run chooses which, and the later ones keep to them. Where nothing is left for a later run, an
    earlier one whose answer was lost has committed, because these messages are below `last_seq` and do not
    come back.
    """
    locked = await store.lock_and_update(transaction, ref, {}, _LOCKED)
    # If an earlier run may have committed, the condition counts only if it turns out that it did not.
    in_doubt = bool(batch.counts) and transaction.may_have_committed
    if batch.condition is not None and not in_doubt:
        await conditions.require(store, batch.condition, records.state(locked), transaction)
    if batch.chosen is None:
        left = bson_codec.decode_anything(locked).get("message_count")
        batch.chosen = await _choose(store, batch, left, transaction)
    result = await Message.find(batch.chosen.filter()).delete(session=transaction.session)
    count = result.deleted_count if result else 0
    if count:
        if batch.condition is not None and in_doubt:
            await conditions.require(store, batch.condition, records.state(locked), transaction)
        part, fields = batch.chosen, bson_codec.decode_anything(locked)
        await store.lock_and_update(transaction, ref, _fewer(locked, count, part.low, part.high), ["user_id"])
        if fields.get("checkpoint_seq"):
            await checkpoints.drop_from(store, ref, records.state(locked), part.low + 1, transaction)
    elif in_doubt:
        return max(batch.counts)
    else:
        # Its `updated_at` has moved all the same.
        await store.lock_and_update(transaction, ref, {"$inc": {"edits": 1}})
    batch.counts.append(count)
    return count


async def _choose(
    store: ConversationStore, batch: _Batch, left: object, transaction: Transaction
) -> SeqRange:
    """Return the end of a part that has as many messages as one transaction deletes, however many seqs."""
    part = replace(batch.part, messages=left if isinstance(left, int) else None)
    if part.high - part.low <= batch.items_max:
        return part
    newest = await seq_range.read(
        store, part, batch.items_max, backwards=True, transaction=transaction, fields=["seq"]
    )
    if len(newest) < batch.items_max:
        return part
    return part.clip(bson_codec.decode_anything(newest[-1])["seq"] - 1, part.high)
