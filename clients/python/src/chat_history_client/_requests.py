"""The requests of the API, said once for both clients."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias
from uuid import uuid4

from chat_history_client._values import encoded, quoted_id, refusal, url_text
from chat_history_client.errors import ApiError
from chat_history_client.types import EraseReceipt, Json, Message, Page, Time

Field: TypeAlias = Literal["messages", "items"]

# An argument that was not given, where None means something.
UNSET: Any = object()
PAGE_ITEMS = 1_000
BATCH_ITEMS = 1_000
# The service takes bodies of 32 MiB unless it is told otherwise; proxies before it may count headers, too.
BATCH_BYTES = 24 * 1024 * 1024
_LINES = {"Accept": "application/x-ndjson"}
_SERVICE_FIELDS = frozenset({"conversation_id", "user_id", "seq", "created_at"})
# The fields that the service has in a message that was replaced.
_REPLACED_FIELDS = frozenset({"revision", "updated_at"})


@dataclass(frozen=True)
class Call:
    """One request, which may be sent again if it is `repeatable`.

    With `gone_is_done`, a repetition that finds nothing follows an attempt that was done, but not answered.
    """

    method: str
    path: str
    params: Mapping[str, Any] | None = None
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    repeatable: bool = True
    gone_is_done: bool = False

    def options(self) -> Json:
        """Return it as httpx takes it."""
        headers = dict(self.headers or {})
        if self.content is not None:
            headers["Content-Type"] = "application/json"
        given = {name: value for name, value in (self.params or {}).items() if value is not None}
        params = {name: url_text(_plain(value), f"query.{name}") for name, value in given.items()}
        return {"headers": headers, "params": params, "content": self.content}


def _plain(value: Any) -> Any:
    """Return a time as text."""
    return value.isoformat() if isinstance(value, datetime) else value


def _conversation(conversation_id: str, *steps: str) -> str:
    return "/".join(("/conversations", quoted_id(conversation_id, "conversation_id"), *steps))


def _messages(conversation_id: str, *message_ids: str) -> str:
    quoted = [quoted_id(each, "message_id") for each in message_ids]
    return _conversation(conversation_id, "messages", *quoted)


def _user(user_id: str, *steps: str) -> str:
    return "/".join(("/users", quoted_id(user_id, "user_id"), *steps))


# -- conversations -------------------------------------------------------------------------------------


def create(
    user_id: str,
    conversation_id: str | None = None,
    *,
    title: str | None = None,
    metadata: Json | None = None,
    expires_at: Time | None = None,
) -> Call:
    """Get or create a conversation."""
    # The id is ours if it is not the caller's, so that a repetition finds what the first attempt made.
    body: Json = {"user_id": user_id, "id": conversation_id or _new_id()}
    more = {"title": title, "metadata": metadata, "expires_at": _plain(expires_at)}
    body |= {name: value for name, value in more.items() if value is not None}
    return Call("POST", "/conversations", content=encoded(body, "$"))


def _new_id() -> str:
    """Return an id like those that the service makes: it begins with the time, and has 80 random bits."""
    return f"conv_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def read_conversation(conversation_id: str, user_id: str | None) -> Call:
    """Read a conversation."""
    return Call("GET", _conversation(conversation_id), {"user_id": user_id})


def update(conversation_id: str, user_id: str | None, changes: Json) -> Call:
    """Change what is given of a conversation."""
    body = {name: _plain(value) for name, value in changes.items() if value is not UNSET}
    return Call("PATCH", _conversation(conversation_id), {"user_id": user_id}, encoded(body, "$"))


def delete_conversation(conversation_id: str, user_id: str | None) -> Call:
    """Delete a conversation."""
    return Call("DELETE", _conversation(conversation_id), {"user_id": user_id}, gone_is_done=True)


def list_conversations(user_id: str | None, limit: int | None, cursor: str | None) -> Call:
    """Read a page of a user's conversations."""
    return Call("GET", "/conversations", {"user_id": user_id, "limit": limit, "cursor": cursor})


def page_of(answer: Json) -> Page[Any, Any]:
    """Return an answer as a page."""
    return Page(answer["data"], answer["has_more"], answer["next"])


# -- messages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What must be true for a write: the newest seq, or the version, that the caller based it on."""

    last_seq: int | None = None
    version: int | None = None

    @property
    def params(self) -> Json:
        """The parameters of the query that say so."""
        return {"expected_last_seq": self.last_seq}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that say so."""
        return {} if self.version is None else {"If-Match": f'"{self.version}"'}


ANYTHING = Expected()


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
    return Call("POST", _messages(conversation_id), {"user_id": user_id, **expected.params}, body, headers)


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
    path = _messages(conversation_id, message_id)
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
    return Call("PUT", _messages(conversation_id), query, body, expected.headers)


def read_messages(conversation_id: str, query: Mapping[str, Any]) -> Call:
    """Read a page of a history."""
    return Call("GET", _messages(conversation_id), query)


def stream_messages(conversation_id: str, query: Mapping[str, Any]) -> Call:
    """Read a history as lines."""
    return Call("GET", _messages(conversation_id), query, headers=_LINES)


def read_message(conversation_id: str, message_id: str, user_id: str | None) -> Call:
    """Read one message."""
    return Call("GET", _messages(conversation_id, message_id), {"user_id": user_id})


def delete_message(conversation_id: str, message_id: str, user_id: str | None) -> Call:
    """Delete one message."""
    path = _messages(conversation_id, message_id)
    return Call("DELETE", path, {"user_id": user_id}, gone_is_done=True)


def delete_messages(conversation_id: str, after: int | None, user_id: str | None) -> Call:
    """Delete the messages after a seq, or all of them."""
    return Call("DELETE", _messages(conversation_id), {"after": after, "user_id": user_id}, gone_is_done=True)


def pop(conversation_id: str, user_id: str | None, view: Field) -> Call:
    """Take the newest message. It is never repeated, because a repetition would take another."""
    query = {"user_id": user_id, "as": view if view == "items" else None}
    return Call("POST", _conversation(conversation_id, "pop"), query, repeatable=False)


# -- users ---------------------------------------------------------------------------------------------


def erase(user_id: str, *, dry_run: bool) -> Call:
    """Erase a user, or count what that would remove."""
    return Call("DELETE", _user(user_id), {"dry_run": "true" if dry_run else None})


def read_erasure(user_id: str, erasure_id: str) -> Call:
    """Ask how far an erasure is."""
    return Call("GET", _user(user_id, "erasures", quoted_id(erasure_id, "erasure_id")))


def goes_on(erasure: Json) -> bool:
    """Tell whether this is an erasure that has not ended; a receipt has no `state`."""
    return erasure.get("state") == "running"


def receipt_of(erasure: Json) -> EraseReceipt:
    """Return an erasure that has ended, or was answered at once, as its receipt."""
    return {
        "user_id": erasure["user_id"],
        "conversations": erasure["conversations"],
        "messages": erasure["messages"],
        "dry_run": erasure.get("dry_run", False),
    }


def export(user_id: str) -> Call:
    """Read everything of a user as lines."""
    return Call("GET", _user(user_id, "export"), headers=_LINES)


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
