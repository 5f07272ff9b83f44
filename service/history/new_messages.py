"""New messages: checked, named and encoded before anything is stored. Pure, so that a thread may do it.

A message's id is known before the first attempt to store it: the caller's own, or made from the idempotency
key, or random. That makes every repetition safe, the service's own included, because the id is in the
database already or it is not.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import TypeAdapter, ValidationError

from service.documents import REPLACED_FIELDS, SERVICE_FIELDS, MessageFields, Title
from service.errors import FAULTS_MAX, Fault, InvalidRequest, Path, faults_of, json_path
from service.formats import bson_codec, message_pieces, strict_json
from service.formats.strict_json import Json, UnstorableObject
from service.tenancy import ID_RULE, is_valid_id

# Longer than any role, and short enough to be looked at as it is.
_OUTLINE_CHARS = 100
_KNOWN_FIELDS = tuple(MessageFields.model_fields)
_TITLE: TypeAdapter[str | None] = TypeAdapter(Title | None)


@dataclass(frozen=True)
class NewMessage:
    """A message that a caller brings: its fields as given, among them an `id` if it has one of its own.

    `id_prefix` is for a caller whose ids begin with their type (`msg`, `fc`): a message without an id gets
    one that begins so, and an idempotency key may then come together with ids of the caller's own.
    """

    fields: Any
    id_prefix: str | None = None

    def local_id(self) -> str | None:
        """Return the id that the caller gave it, or None."""
        return self.fields.get("id")  # type: ignore[no-any-return]  # a string, once it is checked


@dataclass(frozen=True)
class PreparedMessage:
    """A message that can be stored: its id, the caller's fields as BSON, and what it adds to the totals."""

    id: str
    fields: bytes
    tokens: int = 0
    begins_turn: bool = False


@dataclass(frozen=True)
class PreparedBatch:
    """The messages of one append.

    `next_id_suffix`, where the ids are made from an idempotency key, is how the id of one message more would
    end. Finding that id behind the stored batch shows that the first request's batch was longer.
    """

    messages: list[PreparedMessage]
    next_id_suffix: str | None

    @property
    def ids(self) -> list[str]:
        """The ids of its messages, in order."""
        return [message.id for message in self.messages]


def prepare(
    messages: Sequence[NewMessage],
    idempotency_key: str | None,
    *,
    field: str | None,
    items_max: int,
    keep_exact_copy: bool,
) -> PreparedBatch:
    """Check every message, name it, and encode it: all of them pass, or InvalidRequest names each fault.

    `field` is what the caller's request calls the batch, which begins the path of each fault; it is None
    where the request is the one message itself. `keep_exact_copy` is for the embedded engine (see
    `bson_codec`).
    """
    places = _places(messages, field, items_max)
    faults = (
        fault
        for message, at in zip(messages, places, strict=True)
        for fault in message_faults(
            message.fields, at, key_alone=idempotency_key is not None and message.id_prefix is None
        )
    )
    if found := list(islice(faults, FAULTS_MAX + 1)):
        raise InvalidRequest.of(found)
    ids, next_id_suffix = message_ids(messages, idempotency_key)
    _refuse_repeated(ids, places)
    encoded = [
        bson_codec.encode(
            {name: value for name, value in message.fields.items() if name != "id"},
            at,
            keep_exact_copy=keep_exact_copy,
        )
        for message, at in zip(messages, places, strict=True)
    ]
    tokens = [message_pieces.tokens_of(message.fields)[0] for message in messages]
    turns = [message_pieces.begins_turn(message.fields) for message in messages]
    return PreparedBatch(list(map(PreparedMessage, ids, encoded, tokens, turns)), next_id_suffix)


def require_ids(messages: Sequence[NewMessage], field: str | None) -> None:
    """Raise InvalidRequest unless each message has an id."""
    missing = [
        place
        for place, message in enumerate(messages)
        if isinstance(message.fields, dict) and "id" not in message.fields
    ]
    faults = [
        Fault(json_path((field, place, "id") if field else ("id",)), "is needed to find the message again")
        for place in missing[: FAULTS_MAX + 1]
    ]
    if faults:
        raise InvalidRequest.of(faults)


def _places(messages: Sequence[NewMessage], field: str | None, items_max: int) -> list[Path]:
    """Return the path of each message of a batch, which is neither empty nor too long."""
    if field is None:
        return [()]
    if not 1 <= len(messages) <= items_max:
        raise InvalidRequest.at((field,), f"must have 1 to {items_max} {field}, and has {len(messages)}")
    return [(field, index) for index in range(len(messages))]


def message_ids(messages: Sequence[NewMessage], idempotency_key: str | None) -> tuple[list[str], str | None]:
    """Name every message: by its own id, or by the key, or by the batch's first own id, or at random.

    So a batch in which any message has an id of its own is as repeatable as one that has a key. With a key,
    the second result is how the id would end that a longer batch had next, to tell the two apart.
    """
    own_ids = [message.local_id() for message in messages]
    known = idempotency_key or next(filter(None, own_ids), None)
    stem = digest(known) if known else secrets.token_hex(16)
    default = "idem" if idempotency_key else "msg"
    ids = [
        own_id if own_id is not None else f"{message.id_prefix or default}_{_suffix(stem, place, message)}"
        for place, (own_id, message) in enumerate(zip(own_ids, messages, strict=True))
    ]
    return ids, _suffix(stem, len(messages), messages[-1]) if idempotency_key else None


def _suffix(stem: str, place: int, message: NewMessage) -> str:
    return f"{stem}.{place}" if message.id_prefix is None else f"{stem}{place:04x}"


def digest(text: str) -> str:
    """Return 32 hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _refuse_repeated(ids: Sequence[str], places: Sequence[Path]) -> None:
    seen: set[str] = set()
    for message_id, at in zip(ids, places, strict=True):
        if message_id in seen:
            raise InvalidRequest.at((*at, "id"), "stands twice in this batch")
        seen.add(message_id)


def message_faults(fields: Any, at: Path = (), *, key_alone: bool = False) -> Iterator[Fault]:
    """Yield what is wrong with a message's own fields; what BSON cannot hold is for `bson_codec` to find.

    With `key_alone` an idempotency key names the messages, so they may have no ids of their own.
    """
    if not isinstance(fields, dict):
        yield Fault(json_path(at), "must be an object")
        return
    if isinstance(fields, UnstorableObject):
        yield Fault(json_path(at), fields.why)
        return
    for name in (*SERVICE_FIELDS, *REPLACED_FIELDS):
        if name in fields:
            yield Fault(json_path((*at, name)), "is set by the service")
    if key_alone and "id" in fields:
        why = "ids make a request repeatable by themselves; send them or an Idempotency-Key, not both"
        yield Fault(json_path((*at, "id")), why)
    if "id" in fields and not is_valid_id(fields["id"]):
        yield Fault(json_path((*at, "id")), ID_RULE)
    try:
        MessageFields.model_validate(_outline(fields))
    except ValidationError as error:
        yield from faults_of(error, at)


def _outline(fields: Json) -> Json:
    """Return what a message's model judges: the fields that it knows, without what is inside of them."""
    outline: Json = {}
    for name in _KNOWN_FIELDS:
        if name in fields:
            value = fields[name]
            kind = type(value)
            if kind is str:
                outline[name] = value if len(value) <= _OUTLINE_CHARS else ""
            else:
                outline[name] = kind() if kind is list or kind is dict else value
    return outline


def checked_id(value: Any, name: str) -> str:
    """Return the id, or raise InvalidRequest for a parameter of this name."""
    if not is_valid_id(value):
        strict_json.check(value, (name,))
        raise InvalidRequest.at((name,), ID_RULE)
    return value


def checked_title(value: Any) -> str | None:
    """Return the title, or raise InvalidRequest."""
    strict_json.check(value, ("title",))
    try:
        return _TITLE.validate_python(value, strict=True)
    except ValidationError as error:
        raise InvalidRequest.at(("title",), error.errors()[0]["msg"]) from error
