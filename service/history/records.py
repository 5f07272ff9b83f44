"""Stored documents and what callers see of them. Pure; nothing here changes its argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import bson
from bson.errors import InvalidBSON
from pydantic import ValidationError

from service.documents import REPLACED_FIELDS, SERVICE_FIELDS, Conversation
from service.errors import MalformedDocument
from service.formats import bson_codec, json_answers, message_pieces
from service.formats.strict_json import Json
from service.history import written_types
from service.tenancy import ConversationKey, OwnerKey, local_id, message_document_id

_VERIFY = "`chat-history verify` names it. An operator must correct or remove it."
_MALFORMED_CONVERSATION = f"The stored conversation is not well formed. {_VERIFY}"
_PRINTED_CHARS = 200


@dataclass(frozen=True)
class ConversationRecord:
    """A conversation as callers see it: ids without their tenant, metadata in the order in which it came."""

    id: str
    user_id: str
    title: str | None
    metadata: Json
    created_at: datetime
    updated_at: datetime
    active_at: datetime
    last_seq: int
    message_count: int
    version: int
    edits: int
    expires_at: datetime | None

    @cached_property
    def json(self) -> bytes:
        """The conversation as the API answers it, encoded once. Raises MalformedDocument."""
        shown = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "edits"}
        if self.expires_at is None:
            del shown["expires_at"]
        return json_answers.dumps(shown)


# The fields of a conversation that a call on its messages reads, beside the `_id`. The title and the
# metadata, which may be large, are not among them, so they are moved only where they are answered.
STATE_FIELDS = (
    *("user_id", "last_seq", "message_count", "updated_at", "version", "rewrites"),
    *("tokens_total", "turns_total", "checkpoint_seq"),
)
# The fields of a stored message that hold the totals of the messages before it (see Totals).
_TOKENS_BEFORE, _TURNS_BEFORE = "_tokens_before", "_turns_before"


@dataclass(frozen=True)
class ConversationState:
    """What the rules need of a stored conversation. `updated_at` is not before the time of any message.

    `message_count` is None where it is not well formed.
    """

    key: ConversationKey
    owner: OwnerKey
    last_seq: int
    updated_at: datetime
    message_count: int | None = None
    version: int = 0
    tokens_total: int = 0
    turns_total: int = 0
    # The `upto_seq` of the newest checkpoint, or 0 where there is none.
    checkpoint_seq: int = 0
    # It grows with each change of the history that is no append.
    rewrites: int = 0


class EncodedMessage(NamedTuple):
    """A message as JSON in UTF-8, and the size of its document, which counts for the size of a page."""

    seq: int
    json: bytes
    stored_bytes: int


class Totals(NamedTuple):
    """The tokens and the turns of all messages that were ever appended before a message.

    They never change while the message is there, whatever is deleted or replaced around it.
    """

    tokens: int
    turns: int


def document(raw: bytes) -> Conversation:
    """Read a stored conversation, all of it checked. Raises MalformedDocument."""
    try:
        conversation: Conversation = Conversation.model_validate(bson_codec.decode(raw))
    except (InvalidBSON, ValidationError) as error:
        raise MalformedDocument(_MALFORMED_CONVERSATION) from error
    return conversation


def conversation(raw: bytes) -> ConversationRecord:
    """Return a stored conversation as callers see it. Raises MalformedDocument."""
    try:
        stored = bson_codec.decode(raw)
    except InvalidBSON as error:
        raise MalformedDocument(_MALFORMED_CONVERSATION) from error
    if not written_types.is_as_written(stored):
        return of_document(document(raw))  # the model corrects, or refuses, what somebody wrote by hand
    return as_written(stored)


def as_written(stored: Json) -> ConversationRecord:
    """Return a decoded conversation, if `is_as_written` says so, as callers see it."""
    exact, updated_at = stored.get("exact_metadata"), stored["updated_at"]
    return ConversationRecord(
        id=local_id(stored["_id"]),
        user_id=local_id(stored["user_id"]),
        title=stored.get("title"),
        metadata=stored.get("metadata", {}) if exact is None else _exact_metadata(exact),
        created_at=stored["created_at"],
        updated_at=updated_at,
        active_at=stored.get("active_at") or updated_at,
        last_seq=int(stored.get("last_seq", 0)),
        message_count=int(stored.get("message_count", 0)),
        version=int(stored.get("version", 0)),
        edits=int(stored.get("edits", 0)),
        expires_at=stored.get("expires_at"),
    )


def of_document(stored: Conversation) -> ConversationRecord:
    """Return a conversation that was read, or stored, as callers see it. Raises MalformedDocument."""
    shown = {each.name: getattr(stored, each.name) for each in fields(ConversationRecord)}
    shown |= {"id": local_id(stored.id), "user_id": local_id(stored.user_id)}
    shown["active_at"] = stored.active_at or stored.updated_at
    if stored.exact_metadata is not None:
        shown["metadata"] = _exact_metadata(stored.exact_metadata)
    elif stored.metadata:
        shown["metadata"] = bson_codec.to_plain(stored.metadata)
    return ConversationRecord(**shown)


def _exact_metadata(raw: bytes) -> Json:
    try:
        metadata: Json = bson_codec.decode(raw)["metadata"]
    except (InvalidBSON, KeyError) as error:
        raise MalformedDocument(_MALFORMED_CONVERSATION) from error
    return metadata


def state(raw: bytes) -> ConversationState:
    """Return what the rules need of a stored conversation, of which STATE_FIELDS were read.

    Raises MalformedDocument.
    """
    return state_of(state_fields(raw))


def state_fields(raw: bytes) -> Json:
    """Decode a stored conversation of which STATE_FIELDS were read. Raises MalformedDocument."""
    try:
        return bson_codec.decode(raw)
    except InvalidBSON as error:
        raise MalformedDocument(_MALFORMED_CONVERSATION) from error


def state_of(stored: Json) -> ConversationState:
    """Return what the rules need of STATE_FIELDS.

    Only these fields are checked, so nothing else in the document keeps anybody from its messages. Raises
    MalformedDocument.
    """
    key, owner, updated_at = map(stored.get, ("_id", "user_id", "updated_at"))
    last_seq, *counts = (_whole(stored.get(name, 0)) for name in _COUNTS)
    if (
        isinstance(key, str)
        and isinstance(owner, str)
        and isinstance(last_seq, int)
        and not isinstance(last_seq, bool)
        and isinstance(updated_at, datetime)
    ):
        message_count, *known = (each if type(each) is int else None for each in counts)
        return ConversationState(
            *(ConversationKey(key), OwnerKey(owner), last_seq, updated_at),
            message_count,
            *(each or 0 for each in known),
        )
    raise MalformedDocument(_MALFORMED_CONVERSATION)


_COUNTS = (
    *("last_seq", "message_count", "version", "tokens_total", "turns_total", "checkpoint_seq", "rewrites"),
)


def _whole(value: Any) -> Any:
    """Return a whole number that a shell wrote which has only doubles as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def service_fields(of: ConversationState, message_id: str, seq: int, before: Totals) -> bytes:
    """Encode what the service says of a new message, which stands before the caller's own fields.

    The message's time is the conversation's, which the same transaction has just moved and never moves back.
    """
    return bson.encode(
        {
            "_id": message_document_id(of.key, message_id),
            "conversation_id": of.key,
            "user_id": of.owner,
            "seq": seq,
            "created_at": of.updated_at,
            _TOKENS_BEFORE: before.tokens,
            _TURNS_BEFORE: before.turns,
        }
    )


def message(raw: bytes) -> Json:
    """Return a stored message as callers see it: its own id first, the rest in its order."""
    return messages([raw])[0]


def messages(documents: Sequence[bytes]) -> list[Json]:
    """Return stored messages as callers see them. Raises MalformedDocument."""
    try:
        return [_message(each) for each in bson_codec.decode_all(documents)]
    except (AttributeError, InvalidBSON, KeyError, TypeError) as error:
        raise MalformedDocument(f"A message of this conversation is not well formed. {_VERIFY}") from error


def encoded(documents: Sequence[bytes]) -> list[EncodedMessage]:
    """Return stored messages as callers see them, as JSON. Raises MalformedDocument."""
    try:
        shown = [_message(each) for each in bson_codec.decode_all(documents, with_zones=False)]
        for each in shown:
            # Each message has it. Formatted here it costs half of what a call from the encoder does.
            if type(each["created_at"]) is datetime:
                each["created_at"] = json_answers.timestamp(each["created_at"])
        return [
            EncodedMessage(each["seq"], json_answers.dumps(each), len(raw))
            for each, raw in zip(shown, documents, strict=True)
        ]
    except (AttributeError, InvalidBSON, KeyError, TypeError) as error:
        raise MalformedDocument(f"A message of this conversation is not well formed. {_VERIFY}") from error


def with_totals(documents: Sequence[bytes]) -> list[tuple[Json, Totals | None]]:
    """Return stored messages as callers see them, each with its totals.

    A message that an earlier version stored has None. Raises MalformedDocument.
    """
    return list(zip(messages(documents), map(_totals, documents), strict=True))


def totals_after(raw: bytes) -> Totals:
    """Return the totals of the next message behind a stored one, which has totals."""
    before, shown = _totals(raw) or Totals(0, 0), message(raw)
    return Totals(
        before.tokens + message_pieces.tokens_of(shown)[0],
        before.turns + message_pieces.begins_turn(shown),
    )


def _totals(raw: bytes) -> Totals | None:
    stored = bson_codec.decode_anything(raw)
    tokens, turns = stored.get(_TOKENS_BEFORE), stored.get(_TURNS_BEFORE)
    return Totals(tokens, turns) if type(tokens) is int and type(turns) is int else None


def without_totals(stored: Json) -> Json:
    """Return a decoded message without its totals, which differ between a copy and its original."""
    return {name: value for name, value in stored.items() if name not in {_TOKENS_BEFORE, _TURNS_BEFORE}}


def _message(stored: Json) -> Json:
    """Take over a decoded message, which nobody else has."""
    # Statements, because a call for each would be half of what reading a message costs.
    if _TOKENS_BEFORE in stored:
        del stored[_TOKENS_BEFORE]
    if _TURNS_BEFORE in stored:
        del stored[_TURNS_BEFORE]
    stored["conversation_id"] = local_id(stored["conversation_id"])
    stored["user_id"] = local_id(stored["user_id"])
    return {"id": local_id(stored.pop("_id")), **stored}


def caller_fields(shown: Json) -> Json:
    """Return the fields of a message that its caller gave it."""
    own = {"id", *SERVICE_FIELDS, *(REPLACED_FIELDS if was_replaced(shown) else ())}
    return {name: value for name, value in shown.items() if name not in own}


def was_replaced(message: Json) -> bool:
    """Tell whether the `revision` and `updated_at` of a decoded message are the service's."""
    return isinstance(message.get("updated_at"), datetime)


def replaced(raw: bytes, fields: bytes, now: datetime) -> bytes:
    """Return a stored message with other fields of its caller's, and the service's own kept."""
    before = bson_codec.decode_anything(raw)
    kept = {name: before[name] for name in before if name in SERVICE_FIELDS and name != bson_codec.EXACT_COPY}
    revision = before["revision"] + 1 if was_replaced(before) else 1
    service = bson.encode({**kept, "revision": revision, "updated_at": now})
    return bson_codec.concat_documents(service, fields)


def printable_id(value: Any) -> str:
    """Return an id that somebody may have made by hand as it can be logged and printed."""
    plain = isinstance(value, str | int | bson.ObjectId)
    return str(value)[:_PRINTED_CHARS] if plain else f"(a {type(value).__name__})"
