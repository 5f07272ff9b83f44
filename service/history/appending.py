"""The append: one transaction, and telling a replay from a conflict.

Its first statement updates the conversation, which locks it against every other append, so that no two can
take the same `seq`; then it reads what it took, inserts, and commits. The counters and the messages commit
together. Where an id is already in the database, either an earlier request stored this very batch, and the
answer is what it stored (a replay), or the same key or ids were used for other messages (a conflict).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pymongo.errors import DuplicateKeyError

from service.database import Budget, Transaction
from service.documents import Message
from service.errors import (
    BrokenCounter,
    IdempotencyConflict,
    Stale,
)
from service.formats import bson_codec, strict_json
from service.formats.strict_json import Json
from service.history import conditions, encoded_pages, ownership, records, seq_range
from service.history.conditions import Condition
from service.history.new_messages import PreparedBatch
from service.history.records import ConversationState, Totals
from service.history.seq_range import SeqRange
from service.history.store import PAUSE_S, PAUSE_S_MAX, ConversationStore
from service.tenancy import ConversationKey, ConversationRef, local_id, message_document_id

# MongoDB's own limit of one document.
_DOCUMENT_BYTES_MAX = 16 * 1024 * 1024


@dataclass(frozen=True)
class AppendResult:
    """The stored messages as BSON, in order, and whether an earlier request had stored them."""

    documents: list[bytes]
    replayed: bool

    @property
    def messages(self) -> list[Json]:
        """The messages as callers see them, decoded at each call."""
        return records.messages(self.documents)

    @property
    def size(self) -> int:
        """How many bytes they are, as `strict_json.beside` asks."""
        return sum(map(len, self.documents))


class Inserted(NamedTuple):
    """The conversation as a transaction leaves it, and the documents of each batch that it stored."""

    of: ConversationState
    batches: list[list[bytes]]


async def append_alone(
    store: ConversationStore,
    ref: ConversationRef,
    batch: PreparedBatch,
    transaction: Transaction,
    condition: Condition | None = None,
) -> AppendResult:
    """Store a batch in a transaction of its own.

    A replay wins over a condition that is not met any more, because the first request may have changed that.

    There is one Transaction for all attempts, because it remembers whether one of them may have committed.
    """
    pause_s, generation = PAUSE_S, store.kept_pages.generation
    work = functools.partial(insert, store, ref, [batch], condition=condition)
    while True:  # until the deadline of the call
        try:
            inserted = await store.run_exclusive(ref, work, transaction)
        except (DuplicateKeyError, Stale) as error:
            if isinstance(error, DuplicateKeyError) and is_broken_counter(error):
                raise broken_counter(ref.key) from error
            # The transaction that met the duplicate cannot commit, so another one looks, and commits. That
            # costs a replay one round trip more than a read outside of a transaction, and an append nothing.
            before = await store.read_committed(functools.partial(stored_before, store, ref, batch))
        else:
            (documents,) = inserted.batches
            await encoded_pages.keep_appended(store, inserted.of, documents, generation)
            return AppendResult(documents, replayed=False)
        if before is not None:
            # If the answer to a commit of this request was lost, this request stored them: no replay.
            return AppendResult(before, replayed=not transaction.may_have_committed)
        await conditions.refuse_stale(store, ref, condition)
        # The stored messages were deleted between the two transactions, or were lost with a primary, so their
        # ids are free. The pause doubles, so that a database in trouble is asked less often.
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)


async def insert(
    store: ConversationStore,
    ref: ConversationRef,
    batches: Sequence[PreparedBatch],
    transaction: Transaction,
    *,
    condition: Condition | None = None,
) -> Inserted:
    """Take the next seqs and insert the messages, inside a transaction that holds the conversation.

    A batch stands together: no other message is between its own. Each message keeps the totals of all
    messages before it, from which `context` counts.
    """
    messages = [message for batch in batches for message in batch.messages]
    count = len(messages)
    tokens = sum([message.tokens for message in messages])
    turns = sum([message.begins_turn for message in messages])
    # The first statement, so that the lock is held before anything is read. Without it two appends could take
    # the same seqs.
    counted = {"last_seq": count, "message_count": count, "tokens_total": tokens, "turns_total": turns}
    of = await store.lock_and_count(transaction, ref, {**counted, "version": len(batches)})
    if condition is not None:
        before = conditions.before(of, versions=len(batches), appended=count)
        await conditions.require(store, condition, before, transaction)
    seq, tokens, turns = of.last_seq - count, of.tokens_total - tokens, of.turns_total - turns
    documents = []
    for message in messages:
        seq += 1
        fields = records.service_fields(of, message.id, seq, Totals(tokens, turns))
        documents.append(bson_codec.concat_documents(fields, message.fields))
        tokens += message.tokens
        turns += message.begins_turn
    # The counters and the messages commit together. If the process dies before the commit, neither is stored;
    # just after it, both are, and a retry finds the ids.
    await store.database.insert(Message, documents, transaction.session)
    stored = iter(documents)
    return Inserted(of, [list(itertools.islice(stored, len(batch.messages))) for batch in batches])


async def stored_before(
    store: ConversationStore, ref: ConversationRef, batch: PreparedBatch, transaction: Transaction
) -> list[bytes] | None:
    """Return what an earlier request stored under these ids, if it was this very request, or None.

    It looks in a transaction, because the duplicate was seen in one: the message may be committed on the
    primary, and a majority read not show it yet. Raises IdempotencyConflict where it was another request.
    """
    of = await store.state(ref, transaction)
    first = await seq_range.find_message(store, of, batch.messages[0].id, transaction)
    if first is None:
        await _require_none(store, of, batch, transaction)
        return None
    low, count = first["seq"] - 1, len(batch.messages)
    part = SeqRange(of.key, low, low + count + 1)
    # The stored messages may be of any size, so no more is read than this batch could take (twice as much
    # where the engine keeps an exact copy), and one message behind it of any size.
    totals = Totals(of.tokens_total, of.turns_total)  # no smaller than those of any message
    size = sum(
        [
            len(records.service_fields(of, message.id, first["seq"], totals)) + 2 * len(message.fields)
            for message in batch.messages
        ]
    )
    budget = Budget(size + _DOCUMENT_BYTES_MAX)
    documents = await store.database.read(
        Message, part.filter(), sort=seq_range.ASC, session=transaction.session, budget=budget
    )
    await strict_json.beside(sum(map(len, documents)), lambda: require_same(batch, documents))
    return documents[:count]


async def _require_none(
    store: ConversationStore, of: ConversationState, batch: PreparedBatch, transaction: Transaction
) -> None:
    """Raise unless none of the batch's ids is in the database, the first being absent."""
    ids = [message_document_id(of.key, each) for each in batch.ids]
    named = {"_id": {"$in": ids}, "conversation_id": of.key}
    others = await store.database.read(Message, named, session=transaction.session, fields=["user_id"])
    if any(not ownership.owned_by(of.owner, each) for each in others):
        raise broken_counter(of.key)
    if others:
        raise IdempotencyConflict(
            "Some of these messages are stored already, and some are not. Repeat a batch as it "
            "was sent first."
        )


def require_same(batch: PreparedBatch, documents: Sequence[bytes]) -> None:
    """Raise IdempotencyConflict unless the documents are this very batch, and at most one more behind it."""
    found, count = records.messages(documents), len(batch.messages)
    stored = found[:count]
    if [each["id"] for each in stored] != batch.ids:
        raise IdempotencyConflict(
            "The idempotency key or the message ids were used for a batch of other messages, or some "
            "messages of that batch were deleted. Use a new key or new ids."
        )
    # The messages of a batch have consecutive seqs, so a longer batch goes on with the next message.
    next_suffixes = [each["id"].partition("_")[2] for each in found[count:]]
    if batch.next_id_suffix in next_suffixes:
        raise IdempotencyConflict("The idempotency key was used for a longer batch. Use a new key.")
    for message, before in zip(batch.messages, stored, strict=True):
        if not bson_codec.json_equal(records.caller_fields(before), bson_codec.decode(message.fields)):
            raise IdempotencyConflict(
                f"The message {message.id} is stored with other content. Use a new idempotency key or id."
            )


def is_broken_counter(error: DuplicateKeyError) -> bool:
    """Tell a `seq` that is taken from an id that is taken, by the index that the server names.

    Only the second is a replay: a transaction that holds the conversation takes seqs that nobody has.
    """
    details = error.details or {}
    for each in details.get("writeErrors") or [details]:
        if each.get("code") == 11000:
            pattern = each.get("keyPattern")
            return "seq" in pattern if pattern else "conversation_id_1_seq_1" in str(each.get("errmsg"))
    return "conversation_id_1_seq_1" in str(error)


def broken_counter(key: ConversationKey) -> BrokenCounter:
    """Return the error for messages that stand where the conversation's next one belongs."""
    return BrokenCounter(
        f"Messages that the conversation {local_id(key)} does not count stand where its next one belongs. "
        "They were left by an interrupted import, or by a change made by hand. Nothing was stored. "
        "`chat-history verify` shows them, and `chat-history verify --repair` corrects the conversation; or "
        "use another conversation."
    )
