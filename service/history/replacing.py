"""Replacing: one message in its place, and a history by a list, each in one transaction.

- A message that is replaced keeps its id, `seq` and `created_at`; its `revision` counts the replacements.
- A list becomes the history. What stands equal in front stays untouched, a changed message of the common
  beginning is replaced in its place, the rest is cut off, and the rest of the list is appended. All of it
  commits together, so no reader finds the history in between (test_replacing).
- A repetition finds what it would store, changes nothing, and is answered as the first request was, also
  where its condition is stale by now.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pymongo.errors import DuplicateKeyError

from service.database import Budget, Transaction
from service.documents import Message
from service.errors import BatchTooLarge, IdempotencyConflict, InvalidRequest, MessageNotFound, Stale
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import (
    appending,
    checkpoints,
    conditions,
    group_commit,
    records,
    rewrites,
    seq_range,
)
from service.history.conditions import Condition
from service.history.new_messages import PreparedBatch, PreparedMessage
from service.history.records import STATE_FIELDS, ConversationState
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.tenancy import ConversationRef, local_id, message_document_id

# The fields of a conversation that a replacement needs.
_LOCKED = tuple({*STATE_FIELDS, *rewrites.FIELDS})
# What one transaction reads at once of the history that a list takes the place of.
_CHUNK_ITEMS = 256


class _Unchanged(Exception):
    """What should be stored is stored already."""


@dataclass(frozen=True)
class PutResult:
    """The message as it is stored, and whether it was appended."""

    document: bytes
    created: bool

    @property
    def message(self) -> Json:
        """The message as callers see it."""
        return records.message(self.document)


# -- one message -----------------------------------------------------------------------------------


async def put_message(
    store: ConversationStore,
    ref: ConversationRef,
    batch: PreparedBatch,
    *,
    upsert: bool,
    condition: Condition | None,
) -> PutResult:
    """Replace the message that has the id of the one in the batch; see `ChatService.replace_message`."""
    store.database.require_free_disk()
    async with store.deadline():
        while True:  # until the deadline of the call
            try:
                replaced = await _replace(store, ref, batch.messages[0], condition)
                return PutResult(replaced, created=False)
            except MessageNotFound:
                if not upsert:
                    raise
            try:
                appended = await group_commit.append(store, ref, batch, condition)
            except IdempotencyConflict:
                continue  # another request has just appended it, with other content
            return PutResult(appended.documents[0], created=not appended.replayed)


async def _replace(
    store: ConversationStore, ref: ConversationRef, message: PreparedMessage, condition: Condition | None
) -> bytes:
    async def replace(transaction: Transaction) -> bytes:
        locked = await store.lock_and_update(transaction, ref, {}, _LOCKED)
        of = records.state(locked)
        stored = await _find(store, of, message.id, transaction)
        if _is_same(stored, message):
            raise _Unchanged
        await conditions.require(store, condition, of, transaction)
        new = records.replaced(stored, message.fields, of.updated_at)
        await store.database.replace(Message, [new], transaction.session)
        seq = records.message(new)["seq"]
        changed = rewrites.noting(bson_codec.decode_anything(locked), seq - 1, seq, {})
        await store.lock_and_update(transaction, ref, changed, ["user_id"])
        await checkpoints.drop_from(store, ref, of, seq, transaction)
        return new

    while True:
        try:
            return await store.run_exclusive(ref, replace)
        except (_Unchanged, MessageNotFound, Stale):
            # That transaction was undone, and what it saw may not be durable. This one commits.
            stored = await store.read_committed(functools.partial(_look_for, store, ref, message.id))
        if stored is None:
            raise _not_found(message.id)
        if _is_same(stored, message):
            return stored
        await conditions.refuse_stale(store, ref, condition)


async def _look_for(
    store: ConversationStore, ref: ConversationRef, message_id: str, transaction: Transaction
) -> bytes | None:
    of = await store.state(ref, transaction)
    return await seq_range.find_stored(store, of, message_id, transaction)


async def _find(
    store: ConversationStore, of: ConversationState, message_id: str, transaction: Transaction
) -> bytes:
    stored = await seq_range.find_stored(store, of, message_id, transaction)
    if stored is None:
        raise _not_found(message_id)
    return stored


def _not_found(message_id: str) -> MessageNotFound:
    return MessageNotFound(f"There is no message {message_id} in this conversation.")


def _is_same(stored: bytes, message: PreparedMessage) -> bool:
    """Tell whether a message is stored exactly so, keys in the same order, `1` and `1.0` being two."""
    before = records.caller_fields(records.message(stored))
    return json.dumps(before) == json.dumps(bson_codec.decode(message.fields))


# -- a whole history -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The way from a history to a list.

    `kept` is the common beginning as it is stored in the end, and `replaced` are those of it that change.
    """

    kept: list[bytes]
    replaced: list[bytes]
    cut: list[bytes]
    new: list[PreparedMessage]

    @property
    def is_done(self) -> bool:
        """Tell whether the list is the history already."""
        return not (self.replaced or self.cut or self.new)


async def put_messages(
    store: ConversationStore,
    ref: ConversationRef,
    batch: PreparedBatch,
    *,
    after: int,
    condition: Condition | None,
) -> list[bytes]:
    """Make the history after a seq exactly this list; see `ChatService.put_messages`."""
    store.database.require_free_disk()

    async def put(transaction: Transaction) -> list[bytes]:
        locked = await store.lock_and_update(transaction, ref, {}, _LOCKED)
        of = records.state(locked)
        plan = await _plan(store, of, batch.messages, after, transaction)
        if plan.is_done:
            raise _Unchanged
        await conditions.require(store, condition, of, transaction)
        return await _carry_out(store, ref, locked, plan, transaction)

    async with store.deadline():
        while True:  # until the deadline of the call
            try:
                return await store.run_exclusive(ref, put)
            except (_Unchanged, DuplicateKeyError, Stale) as error:
                if isinstance(error, DuplicateKeyError) and appending.is_broken_counter(error):
                    raise appending.broken_counter(ref.key) from error
                # That transaction was undone, and what it saw may not be durable. This one commits.
                look = functools.partial(_look, store, ref, batch, after)
                plan = await store.read_committed(look)
            if plan.is_done:
                return plan.kept
            await conditions.refuse_stale(store, ref, condition)


async def _look(
    store: ConversationStore,
    ref: ConversationRef,
    batch: PreparedBatch,
    after: int,
    transaction: Transaction,
) -> _Plan:
    """Return what would have to be done. Raises IdempotencyConflict where an id stands before the list."""
    of = await store.state(ref, transaction)
    named = {
        "_id": {"$in": [message_document_id(of.key, each) for each in batch.ids]},
        "conversation_id": of.key,
    }
    found = await store.database.read(Message, named, session=transaction.session, fields=["seq"])
    for each in map(bson_codec.decode_anything, found):
        if each["seq"] <= after:
            raise IdempotencyConflict(
                f"The message {local_id(each['_id'])} stands at or before seq {after}, which this request "
                "leaves as it is. Leave the message out of the list, or give another `after`."
            )
    return await _plan(store, of, batch.messages, after, transaction)


async def _plan(
    store: ConversationStore,
    of: ConversationState,
    messages: Sequence[PreparedMessage],
    after: int,
    transaction: Transaction,
) -> _Plan:
    if after > of.last_seq:
        raise InvalidRequest.at("query.after", f"is behind the last message, which has seq {of.last_seq}")
    stored = await _stored_after(store, of, after, transaction)
    kept, replaced = [], []
    for raw, message in zip(stored, messages, strict=False):
        if _id_of(raw) != message.id:
            break
        if _is_same(raw, message):
            kept.append(raw)
        else:
            replaced.append(records.replaced(raw, message.fields, of.updated_at))
            kept.append(replaced[-1])
    return _Plan(kept, replaced, stored[len(kept) :], list(messages[len(kept) :]))


def _id_of(raw: bytes) -> str:
    return local_id(str(bson_codec.decode_anything(raw)["_id"]))


async def _stored_after(
    store: ConversationStore, of: ConversationState, after: int, transaction: Transaction
) -> list[bytes]:
    """Read all messages after a seq. Raises BatchTooLarge where they are more than one transaction takes."""
    items_max, bytes_max = store.settings.batch_items_max, store.settings.body_bytes_max
    part, budget = SeqRange.whole(of).clip(after, of.last_seq), Budget(bytes_max)
    found: list[bytes] = []
    while part.low < part.high:
        chunk = await seq_range.read(
            store, part, _CHUNK_ITEMS, backwards=False, transaction=transaction, budget=budget
        )
        found += chunk
        if len(found) > items_max or budget.spent:
            raise BatchTooLarge(
                f"After seq {after} the history has more than {items_max} messages, or more than {bytes_max} "
                "bytes, which are more than one transaction replaces. Give a later `after`, or delete the "
                "end of the history first."
            )
        if len(chunk) < _CHUNK_ITEMS:
            break
        part = part.rest_after(records.message(chunk[-1])["seq"], backwards=False)
    return found


async def _carry_out(
    store: ConversationStore,
    ref: ConversationRef,
    locked: bytes,
    plan: _Plan,
    transaction: Transaction,
) -> list[bytes]:
    """Make the changes of a plan, which commit together, and return the list as it is stored.

    What is cut off goes first, because the list may have its ids in another order.
    """
    of = records.state(locked)
    if plan.replaced:
        await store.database.replace(Message, plan.replaced, transaction.session)
    if plan.cut:
        low = records.message(plan.cut[0])["seq"] - 1
        behind = SeqRange(of.key, low, of.last_seq).filter()
        await Message.find(behind).delete(session=transaction.session)
    if plan.replaced or plan.cut:
        changed = [records.message(each)["seq"] for each in (*plan.replaced, *plan.cut)]
        # The append below counts the new version, where there is one.
        counted = {"message_count": -len(plan.cut), "version": 0 if plan.new else 1}
        noted = rewrites.noting(bson_codec.decode_anything(locked), min(changed) - 1, max(changed), counted)
        await store.lock_and_update(transaction, ref, noted, ["user_id"])
        await checkpoints.drop_from(store, ref, of, min(changed), transaction)
    new: list[bytes] = []
    if plan.new:
        (new,) = (await appending.insert(store, ref, [PreparedBatch(plan.new, None)], transaction)).batches
    return [*plan.kept, *new]
