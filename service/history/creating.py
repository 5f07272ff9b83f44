"""Creating a conversation (get or create, or with its first messages), and changing one."""

from __future__ import annotations

import asyncio
import functools
import hmac
import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pymongo.errors import DuplicateKeyError, OperationFailure

from service import clock
from service.clock import EPOCH
from service.database import DOCUMENT_TOO_LARGE, Transaction
from service.documents import Conversation
from service.errors import ConversationIdTaken, ConversationNotFound, IdempotencyConflict, InvalidRequest
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import (
    appending,
    conditions,
    conversation_fields,
    deleting,
    group_commit,
    ownership,
    records,
)
from service.history.appending import AppendResult
from service.history.conditions import Condition
from service.history.new_messages import PreparedBatch, checked_id, checked_title, digest
from service.history.records import ConversationRecord
from service.history.store import PAUSE_S, PAUSE_S_MAX, ConversationStore
from service.tenancy import (
    OWNER_WHILE_DELETED,
    ConversationKey,
    ConversationRef,
    OwnerKey,
    TenantScope,
    local_id,
)

# Tells a field that is not given from one that is given as None.
UNSET: Any = object()


async def get_or_create(
    store: ConversationStore,
    scope: TenantScope,
    user_id: str,
    conversation_id: str | None,
    *,
    title: str | None,
    metadata: Json | None,
    expires_at: datetime | None,
) -> tuple[ConversationRecord, bool]:
    """Return the user's conversation with this id, or create it; see `ChatService`."""
    store.database.require_free_disk()
    checked_id(user_id, "user_id")
    title = checked_title(title)
    if conversation_id is not None:
        checked_id(conversation_id, "id")
    # A document can be made only after the database has been opened, which the deadline makes sure of.
    async with store.deadline():
        wanted = _new_conversation(store, scope, user_id, conversation_id, metadata, expires_at=expires_at)
        wanted.title = title
        conversation_fields.refuse_oversize(wanted, "metadata")
        existing = await _own_conversation(store, wanted) if conversation_id is not None else None
        found, created = (existing, False) if existing else await _create(store, wanted)
    return records.of_document(found), created


async def start(
    store: ConversationStore,
    scope: TenantScope,
    user_id: str,
    batch: PreparedBatch | None,
    *,
    metadata: Json | None,
    idempotency_key: str | None,
) -> ConversationRecord:
    """Create a conversation with its first messages; see `ChatService.start_conversation`."""
    store.database.require_free_disk()
    checked_id(user_id, "user_id")
    async with store.deadline():
        by_key = None
        if idempotency_key is not None:
            by_key = await _id_by_key(store, scope, user_id, idempotency_key)
        wanted = _new_conversation(store, scope, user_id, by_key, metadata)
        conversation_fields.refuse_oversize(wanted, "metadata")
        conversation, _ = await _create(store, wanted, batch)
    return records.of_document(conversation)


@dataclass(frozen=True)
class Wanted:
    """The conversation that an append is for, with what it begins with if it is not there yet."""

    user_id: str
    conversation_id: str
    title: str | None
    metadata: Json | None


async def append_or_create(
    store: ConversationStore,
    scope: TenantScope,
    wanted: Wanted,
    batch: PreparedBatch,
    condition: Condition | None,
) -> AppendResult:
    """Append to the user's conversation, and create it first where it is missing; see `ChatService`."""
    user_id, title = checked_id(wanted.user_id, "user_id"), checked_title(wanted.title)
    async with store.deadline():
        new = _new_conversation(store, scope, user_id, wanted.conversation_id, wanted.metadata)
        new.title = title
        conversation_fields.refuse_oversize(new, "metadata")
        ref = ConversationRef(ConversationKey(new.id), OwnerKey(new.user_id))
        transaction = Transaction()
        while True:  # until the deadline of the call
            try:
                result = await group_commit.append(store, ref, batch, condition)
            except ConversationNotFound:
                documents = await _create_with(store, new, batch, condition, transaction)
                if documents is not None:
                    return AppendResult(documents, replayed=False)
                continue  # it is there now, or its id is free
            # If the answer to a commit of this request was lost, this request stored them: no replay.
            return replace(result, replayed=result.replayed and not transaction.may_have_committed)


async def _create_with(
    store: ConversationStore,
    new: Conversation,
    batch: PreparedBatch,
    condition: Condition | None,
    transaction: Transaction,
) -> list[bytes] | None:
    """Insert a conversation and its messages together, and return these, or None where its id is not free."""
    ref = ConversationRef(ConversationKey(new.id), OwnerKey(new.user_id))

    async def insert(transaction: Transaction) -> list[bytes]:
        await new.insert(session=transaction.session)
        inserted = await appending.insert(store, ref, [batch], transaction, condition=condition)
        return inserted.batches[0]

    try:
        return await store.run_exclusive(ref, insert, transaction)
    except DuplicateKeyError as error:
        if "writeErrors" in (error.details or {}):
            raise appending.broken_counter(ref.key) from error
    existing = await store.read_committed(functools.partial(_under_taken_id, store, ref, None))
    if existing is None:
        await asyncio.sleep(PAUSE_S)
    elif existing.user_id == OWNER_WHILE_DELETED and not await deleting.resume_deletion(store, ref.key):
        raise _id_taken(ref.key)
    return None


async def update(
    store: ConversationStore,
    ref: ConversationRef,
    *,
    title: str | None,
    metadata: Json | None,
    expires_at: datetime | None,
    condition: Condition | None = None,
) -> ConversationRecord:
    """Change what is not UNSET, and return the conversation as it is then; see `ChatService`."""
    store.database.require_free_disk()
    changes: Json = {}
    too_large: InvalidRequest | None = None
    if title is not UNSET:
        changes["title"] = checked_title(title)
    if metadata is not UNSET:
        fields, too_large = conversation_fields.metadata_fields(store, metadata)
        changes |= fields if too_large is None else {}
    given = "title" if metadata is UNSET else "metadata"

    async def change(transaction: Transaction) -> Conversation:
        if too_large is not None:
            # An earlier version stored larger metadata. A caller who sends just that again changes nothing of
            # it, and may change the rest.
            before = records.conversation(await store.find(ref, transaction))
            if not bson_codec.json_equal(before.metadata, metadata):
                raise too_large
        if expires_at is not UNSET:
            active = await _last_activity(store, ref, transaction)
            changes.update(conversation_fields.expiry_fields(store, ref.key, expires_at, active))
        edit = {"$inc": {"edits": 1}, **({"$set": changes} if changes else {})}
        locked = await store.lock_and_update(transaction, ref, edit, fields=None)
        await conditions.require(store, condition, records.state(locked), transaction)
        changed = records.document(locked)
        # Looked at before the commit, because only now both the title and the metadata are known; the error
        # aborts the transaction, so nothing is changed.
        conversation_fields.refuse_oversize(changed, given)
        return changed

    async with store.deadline():
        if not changes and too_large is None and expires_at is UNSET:
            await conditions.refuse_stale(store, ref, condition)
            return records.conversation(await store.find(ref))
        try:
            return records.of_document(await conditions.run_exclusive(store, ref, change, condition))
        except OperationFailure as error:
            if error.code in DOCUMENT_TOO_LARGE:  # the server refused it before it could be looked at
                raise conversation_fields.oversize(given) from error
            raise


def _new_conversation(
    store: ConversationStore,
    scope: TenantScope,
    user_id: str,
    conversation_id: str | None,
    metadata: Json | None,
    *,
    expires_at: datetime | None = None,
) -> Conversation:
    now = clock.now()
    fields, too_large = conversation_fields.metadata_fields(store, metadata)
    if too_large is not None:
        raise too_large
    key = scope.conversation_key(conversation_id or new_id(now))
    return Conversation(
        id=key,
        user_id=scope.owner_key(user_id),
        **fields,
        **conversation_fields.expiry_fields(store, key, expires_at, now),
        created_at=now,
        updated_at=now,
        active_at=now,
        rewrites=conversation_fields.first_rewrites(),
    )


def new_id(now: datetime) -> str:
    """Return an id that begins with the time, so ids sort as they were made, and 80 random bits.

    New conversations and their messages then stand together in every index, so an insert meets pages that
    the database's cache holds already. Random ids would spread over all of each index.
    """
    milliseconds = (now - EPOCH) // timedelta(milliseconds=1)
    return f"conv_{milliseconds:012x}{secrets.token_hex(10)}"


async def _last_activity(
    store: ConversationStore, ref: ConversationRef, transaction: Transaction
) -> datetime:
    found = await store.find(ref, transaction, ["active_at", "updated_at"])
    fields = bson_codec.decode_anything(found)
    active = fields.get("active_at") or fields.get("updated_at")
    return active if isinstance(active, datetime) else clock.now()


async def _own_conversation(store: ConversationStore, wanted: Conversation) -> Conversation | None:
    """Find the user's own conversation under the wanted id.

    This is a majority read, so what it finds is durable. That the id is free or another user's may have
    changed since; the insert finds that out.
    """
    found = await store.database.read(Conversation, {"_id": wanted.id}, limit=1)
    if not found or not ownership.owned_by(wanted.user_id, found[0]):
        return None
    return records.document(found[0])


async def _create(
    store: ConversationStore, wanted: Conversation, batch: PreparedBatch | None = None
) -> tuple[Conversation, bool]:
    """Insert a conversation with its first messages, or find the user's own with this id.

    Returns the conversation, and whether this call created it. Raises ConversationIdTaken, BrokenCounter, and
    IdempotencyConflict where the id's conversation began with other messages.
    """
    ref = ConversationRef(ConversationKey(wanted.id), OwnerKey(wanted.user_id))

    async def insert(transaction: Transaction) -> None:
        # The conversation and its first messages commit together, so nobody finds the one without the others.
        await wanted.insert(session=transaction.session)
        if batch is not None:
            await appending.insert(store, ref, [batch], transaction)

    # One Transaction for all attempts, because it remembers whether one of them may have committed.
    transaction, pause_s = Transaction(), PAUSE_S
    while True:  # until the deadline of the call
        try:
            await store.run_exclusive(ref, insert, transaction)
        except DuplicateKeyError as error:
            # Another request inserted it first, or an earlier attempt of ours did, whose answer was lost.
            if "writeErrors" in (error.details or {}):
                # Only the insert of many messages reports `writeErrors`. So the conversation's id was free,
                # and messages without a conversation have the ids or seqs that its own would take.
                raise appending.broken_counter(ref.key) from error
            existing = await store.read_committed(functools.partial(_under_taken_id, store, ref, batch))
        else:
            return wanted, True
        if existing is not None and existing.user_id != OWNER_WHILE_DELETED:
            return existing, transaction.may_have_committed
        if existing is not None and not await deleting.resume_deletion(store, ref.key):
            raise _id_taken(ref.key)
        # The conversation was deleted between the two transactions, or just now, so its id is free.
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)


async def _under_taken_id(
    store: ConversationStore, ref: ConversationRef, batch: PreparedBatch | None, transaction: Transaction
) -> Conversation | None:
    """Find the conversation with an id that was just taken, in a transaction, where the conflict was seen.

    Returns the user's own conversation, or one that is being deleted, or None. If another user owns it,
    raises ConversationIdTaken: callers choose ids, so a taken id cannot be hidden.
    """
    found = await store.database.read(Conversation, {"_id": ref.key}, limit=1, session=transaction.session)
    if not found:
        return None
    existing = records.document(found[0])
    own = existing.user_id == ref.owner
    if own and batch and await appending.stored_before(store, ref, batch, transaction) is None:
        # They were stored together with the conversation, and are gone.
        raise IdempotencyConflict(
            "The idempotency key was used for messages that were deleted. Use a new key."
        )
    if existing.user_id not in {ref.owner, OWNER_WHILE_DELETED}:
        raise _id_taken(ref.key)
    return existing


async def _id_by_key(store: ConversationStore, scope: TenantScope, user_id: str, idempotency_key: str) -> str:
    """Return the id that the owner's key stands for.

    It is made with a secret. Otherwise another user could compute it, take it first, and find out by a 409
    which keys the owner has used. Version 0.1.0 made it without one, so what the owner's key stands for since
    then is looked for first, or a retry across the upgrade would make a second conversation.
    """
    owner = scope.owner_key(user_id)
    before = f"conv_{digest(f'{local_id(owner)}/{idempotency_key}')}"
    named = {"_id": scope.conversation_key(before), "user_id": owner}
    if await store.database.read(Conversation, named, limit=1, fields=["_id"]):
        return before
    text = f"{owner}/{idempotency_key}".encode()
    return f"conv_{hmac.new(await store.database.secret(), text, 'sha256').hexdigest()[:32]}"


def _id_taken(key: ConversationKey) -> ConversationIdTaken:
    return ConversationIdTaken(f"The id {local_id(key)} is not free. Choose another.")
