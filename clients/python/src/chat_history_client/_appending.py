"""The requests that append and replace messages, said once for both clients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from chat_history_client._requests import ANYTHING, Call, Expected, Field, messages_path
from chat_history_client._values import encoded, refusal
from chat_history_client.errors import ApiError
from chat_history_client.types import Json, Message

BATCH_ITEMS = 1_000
# The service takes bodies of 32 MiB unless it is told otherwise; proxies before it may count headers, too.
BATCH_BYTES = 24 * 1024 * 1024
_SERVICE_FIELDS = frozenset({"conversation_id", "user_id", "seq", "created_at"})
# The fields that the service has in a message that was replaced.
_REPLACED_FIELDS = frozenset({"revision", "updated_at"})


def append_one(
    conversation_id: str,
    message: Mapping[str, Any],
    key: str | None,
    user_id: str | None,
    expected: Expected = ANYTHING,
) -> Call:
    """Append one message, which is the body itself."""
    plain = dict(message)
    key = uuid4().hex if key is None and "id" not in plain else key
    return _append(conversation_id, encoded(plain, "$"), key, user_id, expected)


def append(
    conversation_id: str,
    field: Field,
    values: Sequence[Mapping[str, Any]],
    key: str | None,
    user_id: str | None,
    *,
    expected: Expected = ANYTHING,
    create: Json | None = None,
) -> Call:
    """Append messages or items, under the caller's key, or one made here, or ids of the caller's own."""
    given = list(values)
    own_ids = field == "messages" and any(isinstance(each, Mapping) and "id" in each for each in given)
    key = uuid4().hex if key is None and not own_ids else key
    sent = _encoded_each(field, given)
    return append_encoded(conversation_id, field, sent, key, user_id, expected=expected, create=create)


def append_encoded(
    conversation_id: str,
    field: Field,
    values: Sequence[bytes],
    key: str | None,
    user_id: str | None,
    *,
    expected: Expected = ANYTHING,
    create: Json | None = None,
) -> Call:
    """Append messages or items that are encoded already.

    `create` has the conversation that is created if it is not there.
    """
    new = b"" if create is None else b'"conversation":' + encoded(create, "$.conversation") + b","
    body = b"{" + new + b'"%s":[' % field.encode() + b",".join(values) + b"]}"
    return _append(conversation_id, body, key, user_id, expected)


def _append(
    conversation_id: str, body: bytes, key: str | None, user_id: str | None, expected: Expected
) -> Call:
    if key is not None and not (key.isascii() and key.isprintable()):
        raise refusal("header.Idempotency-Key", "only printable ASCII characters can be sent")
    headers = expected.headers | ({} if key is None else {"Idempotency-Key": key})
    query = {"user_id": user_id, **expected.params}
    return Call("POST", messages_path(conversation_id), query, body, headers, is_known_again=True)


def _encoded_each(field: Field, values: Sequence[Any]) -> list[bytes]:
    plain = [dict(each) if isinstance(each, Mapping) else each for each in values]
    return [encoded(each, f"$.{field}[{place}]") for place, each in enumerate(plain)]


def put_back(conversation_id: str, message: Message, user_id: str | None) -> Call:
    """Append a message again that was taken. Its own id makes this append repeatable."""
    return append(conversation_id, "messages", [_given(message)], None, user_id)


def _given(message: Mapping[str, Any]) -> Json:
    """Return a message without what the service adds, so that one that was read can be sent again."""
    if not message.keys() >= _SERVICE_FIELDS:
        return dict(message)
    return {name: each for name, each in message.items() if name not in _SERVICE_FIELDS | _REPLACED_FIELDS}


def replace_message(
    conversation_id: str,
    message_id: str,
    message: Mapping[str, Any],
    user_id: str | None,
    *,
    upsert: bool,
    expected: Expected,
) -> Call:
    """Replace one message. The same content again changes nothing, so it may be repeated."""
    query = {"user_id": user_id, "upsert": "true" if upsert else None, **expected.params}
    path = messages_path(conversation_id, message_id)
    return Call("PUT", path, query, encoded(_given(message), "$"), expected.headers)


def put_messages(
    conversation_id: str,
    messages: Sequence[Mapping[str, Any]],
    user_id: str | None,
    *,
    after: int | None,
    expected: Expected,
) -> Call:
    """Make the history exactly this list. The same list again changes nothing, so it may be repeated."""
    query = {"user_id": user_id, "after": after, **expected.params}
    sent = _encoded_each("messages", [_given(each) for each in messages])
    body = b'{"messages":[' + b",".join(sent) + b"]}"
    return Call("PUT", messages_path(conversation_id), query, body, expected.headers)


# -- batches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Messages or items of a longer list, as they are sent, with the key under which they are stored once.

    Where a message has an id of its own (`has_id`), the ids do this, and no key is sent.
    """

    field: Field
    first: int
    values: Sequence[bytes]
    has_id: Sequence[bool]
    key: str

    def call(self, conversation_id: str, user_id: str) -> Call:
        """Return the request that appends it, and creates the user's conversation first if it is missing."""
        key, new = None if any(self.has_id) else self.key, {"user_id": user_id}
        return append_encoded(conversation_id, self.field, self.values, key, user_id, create=new)

    def halves(self) -> list[Batch]:
        """Return it as two, each with a key that a repetition of this makes again."""
        cut = len(self.values) // 2
        return [
            Batch(self.field, self.first, self.values[:cut], self.has_id[:cut], f"{self.key}-0"),
            Batch(self.field, self.first + cut, self.values[cut:], self.has_id[cut:], f"{self.key}-1"),
        ]

    def can_be_halved(self, error: ApiError) -> bool:
        """Tell whether the service, or a proxy before it, refused this for its size alone."""
        return error.status == 413 and len(self.values) > 1

    def name_places(self, error: ApiError) -> None:
        """Count the places that an error names from the list's beginning, not from the batch's."""
        place = re.compile(rf"\$\.{self.field}\[(\d+)\]")

        def moved(text: str) -> str:
            return place.sub(lambda at: f"$.{self.field}[{int(at[1]) + self.first}]", text)

        error.detail = moved(error.detail)
        error.errors = [{**each, "path": moved(str(each.get("path", "")))} for each in error.errors]
        error.args = (moved(str(error)),)


def batches(field: Field, values: Sequence[Any]) -> list[Batch]:
    """Cut messages or items into batches by their number and by their bytes, as few as there can be."""
    cuts: list[Batch] = []
    first, size = 0, 0
    sent = _encoded_each(field, values)
    has_id = [field == "messages" and "id" in each for each in values]

    def cut(end: int) -> Batch:
        return Batch(field, first, sent[first:end], has_id[first:end], uuid4().hex)

    for place, value in enumerate(sent):
        if place > first and (place - first == BATCH_ITEMS or size + len(value) >= BATCH_BYTES):
            cuts.append(cut(place))
            first, size = place, 0
        size += len(value) + 1
    return [*cuts, cut(len(sent))] if sent else []
