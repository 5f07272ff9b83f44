"""Checkpoints: summaries that `context` sends in place of the messages that they tell of.

An agent writes a summary of a history up to a seq. The history stays as it is. The invariants, each tested in
tests/integration/test_checkpoints.py:

- A checkpoint stands at the end of a turn, and each new one further on than all others.
- `checkpoint_seq` of the conversation is the `upto_seq` of its newest checkpoint, or 0. Every change of the
  checkpoints begins with an update of the conversation, so it excludes appends, deletions and other changes.
- No checkpoint tells of a message that was deleted or replaced: it goes in the same transaction
  (`drop_from`), and an older one counts again. A summary must not keep what a user had removed.
- A conversation's checkpoints go with it, in the transaction in which it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import bson
from pymongo import DESCENDING

from service import clock
from service.database import Transaction
from service.documents import Checkpoint
from service.errors import CheckpointNotForward, CheckpointNotFound, InvalidRequest
from service.formats import bson_codec, message_pieces
from service.formats.strict_json import Json
from service.history import ownership, records, seq_range
from service.history.records import ConversationState
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.settings import CHECKPOINT_METADATA_BYTES_MAX, CHECKPOINTS_MAX, SUMMARY_BYTES_MAX
from service.tenancy import ConversationKey, ConversationRef, local_id, message_document_id

_NEWEST_FIRST = [("upto_seq", DESCENDING)]
# How far back the end of a history is read to see whether its turn has ended.
_STEP_ITEMS = 64


async def create(
    store: ConversationStore, ref: ConversationRef, upto_seq: int, summary: str, metadata: Json | None
) -> tuple[Json, bool]:
    """Store a checkpoint, and return it, and False if an earlier request stored it; see `ChatService`."""
    store.database.require_free_disk()
    fields = fields_of(summary, metadata, keep_exact_copy=store.database.embedded_engine)

    async def insert(transaction: Transaction) -> Json | InvalidRequest | CheckpointNotForward:
        of = records.state(await store.lock_and_update(transaction, ref, {}))
        if upto_seq <= of.checkpoint_seq:
            return await _repeated(store, of, upto_seq, fields, transaction)
        if (fault := await _fault_of_place(store, of, upto_seq, transaction)) is not None:
            return fault
        raw = stored_form(of.key, of.owner, upto_seq, of.updated_at, fields)
        # The checkpoint and the counter that names it commit together.
        await store.lock_and_update(transaction, ref, {"$set": {"checkpoint_seq": upto_seq}})
        await store.database.insert(Checkpoint, [raw], transaction.session)
        await _drop_oldest(store, of, transaction)
        created.append(raw)
        return shown(raw)

    created: list[bytes] = []
    async with store.deadline():
        # An error is a result, too, so that what the transaction saw is durable when the caller is told.
        result = await store.run_exclusive(ref, insert)
    if isinstance(result, Exception):
        raise result
    return result, bool(created)


async def remove(store: ConversationStore, ref: ConversationRef, checkpoint_id: str) -> None:
    """Remove a checkpoint; if it was the newest, the one before it counts again."""

    async def delete(transaction: Transaction) -> CheckpointNotFound | None:
        of = records.state(await store.lock_and_update(transaction, ref, {}))
        named = {"_id": message_document_id(of.key, checkpoint_id), "conversation_id": of.key}
        result = await Checkpoint.find(named).delete(session=transaction.session)
        if not result or not result.deleted_count:
            # Where an earlier run may have committed, it has removed the checkpoint.
            return None if transaction.may_have_committed else _not_found(checkpoint_id)
        if checkpoint_id == _id_of(of.checkpoint_seq):
            await _set_newest_below(store, ref, of, of.checkpoint_seq, transaction)
        return None

    async with store.deadline():
        missing = await store.run_exclusive(ref, delete)
    if missing is not None:
        raise missing


async def drop_from(
    store: ConversationStore, ref: ConversationRef, of: ConversationState, seq: int, transaction: Transaction
) -> None:
    """Remove the checkpoints that tell of the message with this seq, or of later ones.

    It is for every change of a history that is no append, in the transaction of the change, behind the update
    that locks the conversation and returned its state. It costs nothing where no checkpoint is concerned.
    """
    if of.checkpoint_seq < seq:
        return
    await _set_newest_below(store, ref, of, seq, transaction)
    covering = {"conversation_id": of.key, "upto_seq": {"$gte": seq}}
    await Checkpoint.find(covering).delete(session=transaction.session)


async def _set_newest_below(
    store: ConversationStore, ref: ConversationRef, of: ConversationState, seq: int, transaction: Transaction
) -> None:
    left = await _upto_seqs(store, of, transaction)
    newest = max((each for each in left if each < seq), default=0)
    await store.lock_and_update(transaction, ref, {"$set": {"checkpoint_seq": newest}})


async def _drop_oldest(store: ConversationStore, of: ConversationState, transaction: Transaction) -> None:
    """Keep the newest CHECKPOINTS_MAX, so that a list and an export of them are bounded."""
    beyond = (await _upto_seqs(store, of, transaction))[CHECKPOINTS_MAX:]
    if beyond:
        oldest = {"conversation_id": of.key, "upto_seq": {"$lte": beyond[0]}}
        await Checkpoint.find(oldest).delete(session=transaction.session)


async def _upto_seqs(store: ConversationStore, of: ConversationState, transaction: Transaction) -> list[int]:
    found = await store.database.read(
        Checkpoint,
        {"conversation_id": of.key},
        sort=_NEWEST_FIRST,
        session=transaction.session,
        fields=["upto_seq"],
    )
    return [bson_codec.decode_anything(each)["upto_seq"] for each in found]


# -- reading ---------------------------------------------------------------------------------------


async def newest(
    store: ConversationStore, of: ConversationState, transaction: Transaction | None = None
) -> Json | None:
    """Return the newest checkpoint of a conversation, found by its id, or None."""
    if not of.checkpoint_seq:
        return None
    named: Json = {"_id": message_document_id(of.key, _id_of(of.checkpoint_seq))}
    if not store.database.embedded_engine:
        named["conversation_id"] = of.key
    session = transaction.session if transaction else None
    found = await store.database.read(Checkpoint, named, limit=1, session=session)
    return shown(found[0]) if found and ownership.owned_by(of.owner, found[0]) else None


async def listed(store: ConversationStore, ref: ConversationRef) -> list[Json]:
    """Return the checkpoints of a conversation, newest first; there are at most CHECKPOINTS_MAX."""
    async with store.reading():
        of = await store.state(ref)
        if not of.checkpoint_seq:
            return []
        found = await store.database.read(Checkpoint, {"conversation_id": of.key}, sort=_NEWEST_FIRST)
    return [shown(each) for each in ownership.all_owned_by(of.owner, of.key, found)]


def shown(raw: bytes) -> Json:
    """Return a stored checkpoint as callers see it."""
    stored = bson_codec.decode(raw)
    about = {"conversation_id": local_id(stored["conversation_id"]), "user_id": local_id(stored["user_id"])}
    return {"id": local_id(stored.pop("_id")), **stored, **about}


# -- what is stored --------------------------------------------------------------------------------


def fields_of(summary: str, metadata: Json | None, *, keep_exact_copy: bool) -> bytes:
    """Check and encode what an agent says. Raises InvalidRequest."""
    if len(summary.encode("utf-8", "surrogatepass")) > SUMMARY_BYTES_MAX:
        raise InvalidRequest.at(("summary",), f"has more than {SUMMARY_BYTES_MAX} bytes")
    if metadata is not None:
        size = len(bson_codec.encode({"metadata": metadata}, keep_exact_copy=False))
        if size > CHECKPOINT_METADATA_BYTES_MAX:
            why = f"has {size} bytes as BSON, and may have {CHECKPOINT_METADATA_BYTES_MAX}"
            raise InvalidRequest.at(("metadata",), why)
    return bson_codec.encode({"summary": summary, "metadata": metadata}, keep_exact_copy=keep_exact_copy)


def stored_form(
    key: ConversationKey, owner: str, upto_seq: int, created_at: datetime, fields: bytes
) -> bytes:
    """Return a checkpoint as it is stored: what the service says of it, then what the agent said."""
    header: dict[str, Any] = {
        "_id": message_document_id(key, _id_of(upto_seq)),
        "conversation_id": key,
        "user_id": owner,
        "upto_seq": upto_seq,
        "created_at": clock.to_milliseconds(created_at),
    }
    return bson_codec.concat_documents(bson.encode(header), fields)


def _id_of(upto_seq: int) -> str:
    return f"cp_{upto_seq}"


def _not_found(checkpoint_id: str) -> CheckpointNotFound:
    return CheckpointNotFound(f"There is no checkpoint {checkpoint_id} in this conversation.")


async def _repeated(
    store: ConversationStore, of: ConversationState, upto_seq: int, fields: bytes, transaction: Transaction
) -> Json | CheckpointNotForward:
    """Return the newest checkpoint if this very request stored it, or the error that names it."""
    before = await newest(store, of, transaction)
    if before is not None and upto_seq == of.checkpoint_seq:
        given = bson_codec.decode(fields)
        if bson_codec.json_equal({name: before[name] for name in given}, given):
            return before
    return CheckpointNotForward(
        f"The newest checkpoint, {_id_of(of.checkpoint_seq)}, stands at seq {of.checkpoint_seq}, and a new "
        "one must stand behind it. Delete that checkpoint first, or choose a later turn."
    )


async def _fault_of_place(
    store: ConversationStore, of: ConversationState, upto_seq: int, transaction: Transaction
) -> InvalidRequest | None:
    """Return the error for a seq that is not the end of a turn, or None."""
    if upto_seq > of.last_seq:
        return InvalidRequest.at(("upto_seq",), f"is beyond the newest message, whose seq is {of.last_seq}")
    behind = SeqRange(of.key, upto_seq, of.last_seq, owner=of.owner)
    after = await seq_range.read(store, behind, 1, backwards=False, transaction=transaction)
    if after:
        ended = message_pieces.begins_turn(records.message(after[0]))
    else:
        part = SeqRange(of.key, 0, upto_seq, owner=of.owner)
        found = await seq_range.read(store, part, _STEP_ITEMS, backwards=True, transaction=transaction)
        ended = _has_ended(records.messages(found[::-1]))
    if ended:
        return None
    why = "is not the end of a turn: the next message must be a user's, or the last answer be complete"
    return InvalidRequest.at(("upto_seq",), why)


def _has_ended(messages: Sequence[Json]) -> bool:
    """Tell whether a history ends with an answer that leaves no call open."""
    found = [piece for message in messages for piece in message_pieces.pieces(message)]
    if not found or not found[-1].is_assistants:
        return False
    return not message_pieces.arrange(found, repair=False).open_calls
