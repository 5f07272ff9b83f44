"""Deleting messages of a conversation: one, the newest, or the end of the history.

The deletion and the new count commit together. The seq of a deleted message stays empty.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field, replace

from service.database import Transaction
from service.documents import Message
from service.errors import BatchTooLarge, MessageNotFound, Stale
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import checkpoints, conditions, records, rewrites, seq_range
from service.history.conditions import Condition
from service.history.records import STATE_FIELDS
from service.history.seq_range import SeqRange
from service.history.store import PAUSE_S_MAX, ConversationStore
from service.settings import DELETE_BATCH_ITEMS
from service.tenancy import ConversationRef, message_document_id

# The fields of a conversation that a deletion of messages needs.
_LOCKED = tuple({*STATE_FIELDS, *rewrites.FIELDS})


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
    return await delete_range(store, ref, part, condition)


async def delete_range(
    store: ConversationStore, ref: ConversationRef, part: SeqRange, condition: Condition | None = None
) -> int:
    """Delete the messages of a part, and return how many there were."""
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
