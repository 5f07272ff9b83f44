"""Stores a conversation as an export has it, ids and times included.

An import takes the conversation's id first, under an owner that no reader can be, and each batch asserts that
it still has the id. So readers cannot see a half-imported conversation: it appears whole, with the last
batch. The same import again finds what is stored and goes on; after 10 minutes without activity its id is
free again, and what it stored is removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from pymongo import ASCENDING
from pymongo.errors import DuplicateKeyError

from service import clock
from service.database import Transaction
from service.documents import Checkpoint, Conversation, Message
from service.errors import ConversationIdTaken, DatabaseUnavailable, InvalidRequest, faults_of
from service.formats import bson_codec, strict_json
from service.formats.strict_json import Json
from service.history import checkpoints, conversation_fields, deleting, records, retention
from service.history.records import Totals
from service.history.seq_range import SeqRange
from service.history.store import ConversationStore
from service.settings import CHECKPOINTS_MAX
from service.tenancy import (
    OWNER_WHILE_DELETED,
    ConversationKey,
    OwnerKey,
    TenantScope,
    local_id,
)
from service.user_data import import_batches
from service.user_data.exporting import ExportedConversation
from service.user_data.import_batches import Batch

# How often an import tries to take an id that others take and delete meanwhile, and the pause between.
_ATTEMPTS = 20
_PAUSE_S = 0.1
# The fields of a conversation that an import reads: all that `documents.Conversation` requires, and no
# metadata, which may be large.
_FIELDS = ("user_id", "importing", "created_at", "updated_at", "last_seq", "message_count")


async def import_conversation(
    store: ConversationStore,
    scope: TenantScope,
    conversation: Json,
    messages: Iterable[Json],
    *,
    dry_run: bool,
) -> int | None:
    """Store a conversation as an export has it; see `UserData.import_conversation`."""
    exported = _checked_conversation(conversation)
    key, owner = scope.conversation_key(exported.id), scope.owner_key(exported.user_id)
    batches = import_batches.batches(
        exported, key, owner, messages, keep_exact_copy=store.database.embedded_engine
    )
    stored = await (_find_taken(store, key, owner) if dry_run else _take_id(store, exported, key, owner))
    if stored is not None:
        same = stored.user_id == owner and stored.last_seq == exported.last_seq
        for batch in batches:
            same = same and await _count_stored(store, key, batch) == len(batch)
        if same and stored.message_count == exported.message_count:
            return None
        raise ConversationIdTaken(
            f"The id {exported.id} is taken by a conversation that is not the one in the export."
        )
    count = 0
    pending: Batch = []
    for batch in batches:
        if pending and not dry_run:
            await _insert(store, key, owner, pending)
        pending = batch
        count += len(batch)
    if count != exported.message_count:
        raise InvalidRequest.at(
            ("message_count",), f"is {exported.message_count}, and there are {count} messages"
        )
    if not dry_run:
        document = _document(store, exported, key, owner)
        # A reader that asks for times trusts this (see `verify`), and an older version may have let
        # something else in, so it is corrected and not refused.
        newest = [bson_codec.decode(raw)["created_at"] for _, raw in pending[-1:]]
        document.updated_at = max(document.updated_at, document.created_at, *newest)
        document.active_at = max([document.active_at or document.created_at, document.created_at, *newest])
        document.tokens_total, document.turns_total = _totals_after(pending)
        document.due_at = retention.due_at(
            store.settings, key, expires_at=document.expires_at, active=document.active_at
        )
        summaries = _checkpoints(store, exported, key, owner)
        await _insert(store, key, owner, pending, document, with_checkpoints=summaries)
    return count


async def _find_taken(store: ConversationStore, key: ConversationKey, owner: OwnerKey) -> Conversation | None:
    """Return the conversation that keeps this id from being imported, if any, without taking the id."""
    async with store.deadline():
        found = await store.database.read(Conversation, {"_id": key}, limit=1, fields=_FIELDS)
        stored = _unless_own_import(found, owner)
    deleting = stored is not None and stored.user_id == OWNER_WHILE_DELETED and stored.importing is None
    return None if deleting else stored


async def _take_id(
    store: ConversationStore, exported: ExportedConversation, key: ConversationKey, owner: OwnerKey
) -> Conversation | None:
    """Take the id for this import, or resume an import of the same user; or return who else has the id.

    Messages without a conversation, which an older version left of an import, are taken with the id. The same
    import finds them stored already, and an import of something else finds that they are too many.
    """

    async def take(transaction: Transaction) -> list[bytes]:
        session = transaction.session
        named = {"_id": key}
        found = await store.database.read(Conversation, named, limit=1, session=session, fields=_FIELDS)
        if not found:
            # With the commit the id is taken: no reader finds the conversation, and no other caller can
            # create one. If the process dies then, the id is free again after IDLE.
            await Conversation(
                id=key,
                user_id=OWNER_WHILE_DELETED,
                importing=owner,
                created_at=exported.created_at,
                updated_at=clock.now(),
                last_seq=exported.last_seq,
                message_count=await Message.find({"conversation_id": key}, session=session).count(),
            ).insert(session=session)
        return found

    for _ in range(_ATTEMPTS):
        async with store.deadline():
            try:
                found = await store.database.transaction(take)
            except DuplicateKeyError:
                continue  # another request has just taken it, or our own first run did
            stored = _unless_own_import(found, owner)
        if stored is None or stored.user_id != OWNER_WHILE_DELETED:
            return stored
        if not await deleting.resume_deletion(store, key):
            raise ConversationIdTaken(
                f"Another user's import of a conversation {exported.id} is going on. Import it again later."
            )
        await asyncio.sleep(_PAUSE_S)
    raise DatabaseUnavailable(
        f"Other calls create and delete a conversation {exported.id} all the time. Import it again."
    )


def _document(
    store: ConversationStore, exported: ExportedConversation, key: ConversationKey, owner: OwnerKey
) -> Conversation:
    raw = bson_codec.encode({"metadata": exported.metadata}, keep_exact_copy=False)
    changed = store.database.embedded_engine and bson_codec.changes_when_decoded_as_dbref(raw)
    fields = exported.model_dump(exclude={"id", "user_id", "checkpoints"})
    if exported.checkpoints:
        fields["checkpoint_seq"] = exported.checkpoints[-1].upto_seq
    document = Conversation(
        id=key,
        user_id=owner,
        exact_metadata=raw if changed else None,
        rewrites=conversation_fields.first_rewrites(),
        **fields,
    )
    conversation_fields.refuse_oversize(document, "metadata")
    return document


def _checkpoints(
    store: ConversationStore, exported: ExportedConversation, key: ConversationKey, owner: OwnerKey
) -> list[bytes]:
    """Return the checkpoints of an export as they are stored. Raises InvalidRequest."""
    exact, last_seq, found = store.database.embedded_engine, 0, list[bytes]()
    for each in exported.checkpoints:
        if not last_seq < each.upto_seq <= exported.last_seq:
            raise InvalidRequest.at(
                ("checkpoints",), f"must have an upto_seq that grows, up to last_seq, and has {each.upto_seq}"
            )
        import_batches.check_time(each.created_at, "checkpoints")
        fields = checkpoints.fields_of(each.summary, each.metadata, keep_exact_copy=exact)
        found.append(checkpoints.stored_form(key, owner, each.upto_seq, each.created_at, fields))
        last_seq = each.upto_seq
    return found[-CHECKPOINTS_MAX:]


async def _count_stored(store: ConversationStore, key: ConversationKey, batch: Batch) -> int:
    """Return how many of these messages are stored with the same content."""
    if not batch:
        return 0
    part = SeqRange(key, batch[0][0] - 1, batch[-1][0])
    async with store.deadline():
        found = await store.database.read(Message, part.filter(), sort=[("seq", ASCENDING)])
    given = [_compared(raw) for _, raw in batch]
    known = {each["_id"]: each for each in map(_compared, found)}
    return sum(known.get(each["_id"]) == each for each in given)


def _compared(raw: bytes) -> Json:
    """Return a stored message as it is compared: where it was appended, its totals may be others."""
    return records.without_totals(bson_codec.decode(raw))


def _totals_after(batch: Batch) -> Totals:
    return records.totals_after(batch[-1][1]) if batch else Totals(0, 0)


async def _insert(
    store: ConversationStore,
    key: ConversationKey,
    owner: OwnerKey,
    batch: Batch,
    whole: Conversation | None = None,
    *,
    with_checkpoints: Sequence[bytes] = (),
) -> None:
    """Store the messages of a batch that are not stored yet; with `whole` also the conversation.

    Its checkpoints are stored with the last batch, so that nobody finds them without it.

    The first statement asserts that the import still has the id, and locks it, so that two imports of the
    same conversation take turns.
    """
    part = SeqRange(key, batch[0][0] - 1, batch[-1][0]) if batch else None
    importing = {"_id": key, "user_id": OWNER_WHILE_DELETED, "importing": owner}

    async def insert(transaction: Transaction) -> None:
        session = transaction.session
        active = {"$set": {"updated_at": clock.now()}}
        locked = await store.database.update(Conversation, importing, active, session, _FIELDS)
        missing = await _missing(store, key, part, batch, transaction)
        if locked is None:
            transaction.wrote = False
            named = {"_id": key, "user_id": owner}
            found = await store.database.read(
                Conversation, named, limit=1, session=session, fields=["user_id"]
            )
            if missing or not found:
                raise ConversationIdTaken(
                    f"The import lost the id {local_id(key)}: the import stood still for 10 minutes, or its "
                    "user was erased, so the stored messages were removed. Import the conversation again."
                )
            # Complete already, by our own first run, whose answer was lost, or by a second import.
            return
        if missing:
            await store.database.insert(Message, missing, session)
        # Counted batch by batch, so that no transaction has to count a long conversation.
        count = records.document(locked).message_count + len(missing)
        # The count commits with the messages. With the last batch the same commit gives the conversation its
        # owner, so readers find it whole, or not at all.
        changes: Json = {"message_count": count}
        if whole is not None:
            if count != whole.message_count:
                raise _conflicting_import(key)
            changes = whole.model_dump(exclude={"id", "revision_id"})
            if with_checkpoints:
                await store.database.insert(Checkpoint, with_checkpoints, session)
        await store.database.update(Conversation, importing, {"$set": changes}, session, ["user_id"])

    async with store.deadline():
        try:
            await store.database.transaction(insert)
        except DuplicateKeyError as error:
            raise _conflicting_import(key) from error


async def _missing(
    store: ConversationStore,
    key: ConversationKey,
    part: SeqRange | None,
    batch: Batch,
    transaction: Transaction,
) -> list[bytes]:
    """Return the messages that are not stored yet. Raises ConversationIdTaken where one has other content."""
    if part is None:
        return []
    found = await store.database.read(Message, part.filter(), session=transaction.session)
    stored = {each["_id"]: each for each in map(_compared, found)}
    missing = []
    for _, raw in batch:
        given = _compared(raw)
        if given["_id"] not in stored:
            missing.append(raw)
        elif stored.pop(given["_id"]) != given:
            raise _conflicting_import(key)
    return missing


def _checked_conversation(conversation: Json) -> ExportedConversation:
    strict_json.check(conversation)
    try:
        exported = ExportedConversation.model_validate(conversation)
    except ValidationError as error:
        raise InvalidRequest.of(faults_of(error, ())) from error
    import_batches.check_time(exported.created_at, "created_at")
    import_batches.check_time(exported.updated_at, "updated_at")
    if exported.active_at is not None:
        import_batches.check_time(exported.active_at, "active_at")
    return exported


def _unless_own_import(found: list[bytes], owner: OwnerKey) -> Conversation | None:
    """Return the conversation that was found, or None for this user's own import, which is resumed."""
    stored = records.document(found[0]) if found else None
    own_import = stored is not None and stored.user_id == OWNER_WHILE_DELETED and stored.importing == owner
    return None if own_import else stored


def _conflicting_import(key: ConversationKey) -> ConversationIdTaken:
    """Return the error for messages of another import with the same conversation id."""
    return ConversationIdTaken(
        f"Another import of the conversation {local_id(key)} was started and not finished, or two messages "
        "of this export have the same id. What an interrupted import stored is removed after 10 minutes. "
        "Import the conversation again then."
    )
