"""Checks the messages of an export, and yields them as stored, in batches that one transaction takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import bson

from service.clock import EPOCH
from service.documents import REPLACED_FIELDS, in_utc
from service.errors import InvalidRequest, cut
from service.formats import bson_codec
from service.formats.strict_json import Json
from service.history import records
from service.history.new_messages import message_faults
from service.history.records import ConversationState, Totals
from service.tenancy import ConversationKey, OwnerKey
from service.user_data.exporting import ExportedConversation

# What one transaction stores at most, so that it is done well within the deadline of a call.
_BATCH_ITEMS = 500
_BATCH_BYTES = 8 * 1024 * 1024
# A list finds the conversations from EPOCH to this time, so no other time is imported.
_END = datetime(9999, 1, 1, tzinfo=UTC)
# The fields that an exported message has beside its caller's; SERVICE_FIELDS are those of a stored one.
_EXPORTED_SERVICE_FIELDS = ("id", "conversation_id", "user_id", "seq", "created_at")
# Messages as they are stored, each with its seq.
Batch = list[tuple[int, bytes]]


def check_time(time: datetime, name: str) -> None:
    """Raise InvalidRequest for a time that no list would find."""
    if time.tzinfo is None:
        raise InvalidRequest.at((name,), "must have a time zone")
    if not EPOCH <= time < _END:
        raise InvalidRequest.at(
            (name,), f"must be from {EPOCH.year} to {_END.year - 1}, and is {time.isoformat()}"
        )


def batches(
    exported: ExportedConversation,
    key: ConversationKey,
    owner: OwnerKey,
    messages: Iterable[Json],
    *,
    keep_exact_copy: bool,
) -> Iterator[Batch]:
    """Check messages, and yield them as stored, in batches that one transaction takes."""
    batch: Batch = []
    size, last_seq, last_time, before = 0, 0, EPOCH, Totals(0, 0)
    for message in messages:
        seq, time = message.get("seq"), time_of(message)
        if not isinstance(seq, int) or isinstance(seq, bool) or not last_seq < seq <= exported.last_seq:
            raise InvalidRequest.at(
                ("seq",),
                f"must grow, from 1 to the conversation's last_seq, and is {cut(repr(seq))}",
            )
        if time < last_time:
            raise InvalidRequest.at(("created_at",), f"is earlier at seq {seq} than at the seq before")
        if message.get("conversation_id") != exported.id or message.get("user_id") != exported.user_id:
            raise InvalidRequest.at(
                ("conversation_id",), f"is another conversation's, or another user's, at seq {seq}"
            )
        raw = _encoded(message, key, owner, time, before, keep_exact_copy=keep_exact_copy)
        before = records.totals_after(raw)
        if batch and (len(batch) == _BATCH_ITEMS or size + len(raw) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((seq, raw))
        size += len(raw)
        last_seq, last_time = seq, time
    yield batch


def _encoded(
    message: Json,
    key: ConversationKey,
    owner: OwnerKey,
    time: datetime,
    before: Totals,
    *,
    keep_exact_copy: bool,
) -> bytes:
    """Return a message of an export as it is stored."""
    replacement = _replacement(message)
    own = {*_EXPORTED_SERVICE_FIELDS, *replacement}
    fields = {name: value for name, value in message.items() if name not in own}
    # A message of an earlier version may have fields of its caller's with these names.
    checked = {name: value for name, value in fields.items() if name not in REPLACED_FIELDS}
    if (fault := next(message_faults({"id": message.get("id"), **checked}), None)) is not None:
        raise InvalidRequest.of([fault])
    of = ConversationState(key, owner, message["seq"], time)
    header = records.service_fields(of, message["id"], message["seq"], before)
    header = bson_codec.concat_documents(header, bson.encode(replacement))
    return bson_codec.concat_documents(header, bson_codec.encode(fields, keep_exact_copy=keep_exact_copy))


def _replacement(message: Json) -> Json:
    """Return what says that the message was replaced, as it is stored, or nothing."""
    revision = message.get("revision")
    try:
        time = datetime.fromisoformat(message["updated_at"])
    except (KeyError, TypeError, ValueError):
        return {}
    if type(revision) is not int or revision < 1 or time.tzinfo is None:
        return {}
    return {"revision": revision, "updated_at": in_utc(time)}


def time_of(message: Json) -> datetime:
    """Return the time of an exported message. Raises InvalidRequest."""
    try:
        time = datetime.fromisoformat(message["created_at"])
        if time.tzinfo is not None:
            time = in_utc(time)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest.at(("created_at",), "must be a time") from error
    check_time(time, "created_at")
    return time
