"""The requests of the API, said once for both clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

from chat_history_client._values import encoded, quoted_id, url_text
from chat_history_client.types import EraseReceipt, Json, Page, Time

Field: TypeAlias = Literal["messages", "items"]

# An argument that was not given, where None means something.
UNSET: Any = object()
PAGE_ITEMS = 1_000
_LINES = {"Accept": "application/x-ndjson"}
EVENTS = {"Accept": "text/event-stream"}
# The service sends a comment every 15 seconds. After three of them that did not come, a stream is lost.
_SILENCE_S = 45.0


@dataclass(frozen=True)
class Call:
    """One request, which may be sent again if it is `repeatable`.

    With `gone_is_done`, a repetition that finds nothing follows an attempt that was done, but not answered.
    With `is_known_again`, the service answers a repetition as it answered the attempt that was done, whatever
    has changed since. `silence_s` is how long the answer may pause, where that is longer than the time-out.
    """

    method: str
    path: str
    params: Mapping[str, Any] | None = None
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    repeatable: bool = True
    gone_is_done: bool = False
    is_known_again: bool = False
    silence_s: float = 0.0

    def options(self) -> Json:
        """Return it as httpx takes it."""
        headers = dict(self.headers or {})
        if self.content is not None:
            headers["Content-Type"] = "application/json"
        given = {name: value for name, value in (self.params or {}).items() if value is not None}
        params = {name: url_text(_plain(value), f"query.{name}") for name, value in given.items()}
        return {"headers": headers, "params": params, "content": self.content}


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


def _plain(value: Any) -> Any:
    """Return a time as text."""
    return value.isoformat() if isinstance(value, datetime) else value


def _conversation(conversation_id: str, *steps: str) -> str:
    return "/".join(("/conversations", quoted_id(conversation_id, "conversation_id"), *steps))


def messages_path(conversation_id: str, *message_ids: str) -> str:
    """Return the path of the messages of a conversation, or of one of them."""
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


def update(conversation_id: str, user_id: str | None, changes: Json, expected: Expected) -> Call:
    """Change what is given of a conversation."""
    body = {name: _plain(value) for name, value in changes.items() if value is not UNSET}
    query = {"user_id": user_id, **expected.params}
    return Call("PATCH", _conversation(conversation_id), query, encoded(body, "$"), expected.headers)


def delete_conversation(conversation_id: str, user_id: str | None, expected: Expected) -> Call:
    """Delete a conversation."""
    return _delete(_conversation(conversation_id), {"user_id": user_id}, expected)


def _delete(path: str, query: Json, expected: Expected = ANYTHING) -> Call:
    params = {**query, **expected.params}
    return Call("DELETE", path, params, headers=expected.headers, gone_is_done=True)


def list_conversations(user_id: str | None, limit: int | None, cursor: str | None) -> Call:
    """Read a page of a user's conversations."""
    return Call("GET", "/conversations", {"user_id": user_id, "limit": limit, "cursor": cursor})


def page_of(answer: Json) -> Page[Any, Any]:
    """Return an answer as a page."""
    return Page(answer["data"], answer["has_more"], answer["next"])


# -- messages ------------------------------------------------------------------------------------------


def read_messages(conversation_id: str, query: Mapping[str, Any]) -> Call:
    """Read a page of a history."""
    return Call("GET", messages_path(conversation_id), query)


def stream_messages(conversation_id: str, query: Mapping[str, Any]) -> Call:
    """Read a history as lines."""
    return Call("GET", messages_path(conversation_id), query, headers=_LINES)


def follow_messages(conversation_id: str, query: Mapping[str, Any], position: int | None) -> Call:
    """Follow a history, after the position of the latest event if there is one."""
    headers = EVENTS if position is None else {**EVENTS, "Last-Event-ID": str(position)}
    return Call("GET", messages_path(conversation_id), query, headers=headers, silence_s=_SILENCE_S)


def follow_conversations(user_id: str | None) -> Call:
    """Follow a list of conversations."""
    return Call("GET", "/events", {"user_id": user_id}, headers=EVENTS, silence_s=_SILENCE_S)


def read_message(conversation_id: str, message_id: str, user_id: str | None) -> Call:
    """Read one message."""
    return Call("GET", messages_path(conversation_id, message_id), {"user_id": user_id})


def delete_message(conversation_id: str, message_id: str, user_id: str | None, expected: Expected) -> Call:
    """Delete one message."""
    return _delete(messages_path(conversation_id, message_id), {"user_id": user_id}, expected)


def delete_messages(conversation_id: str, after: int | None, user_id: str | None, expected: Expected) -> Call:
    """Delete the messages after a seq, or all of them."""
    return _delete(messages_path(conversation_id), {"after": after, "user_id": user_id}, expected)


def pop(conversation_id: str, user_id: str | None, view: Field, expected: Expected) -> Call:
    """Take the newest message. It is never repeated, because a repetition would take another."""
    query = {"user_id": user_id, "as": view if view == "items" else None, **expected.params}
    path = _conversation(conversation_id, "pop")
    return Call("POST", path, query, headers=expected.headers, repeatable=False)


# -- the context of a model call -------------------------------------------------------------------------


def read_context(conversation_id: str, query: Mapping[str, Any]) -> Call:
    """Read what a model is to be sent."""
    return Call("GET", _conversation(conversation_id, "context"), query)


def create_checkpoint(
    conversation_id: str, upto_seq: int, summary: str, metadata: Json | None, user_id: str | None
) -> Call:
    """Store a checkpoint. The service knows the same one again, so it may be repeated."""
    body: Json = {"upto_seq": upto_seq, "summary": summary}
    body |= {} if metadata is None else {"metadata": metadata}
    return Call("POST", _checkpoints(conversation_id), {"user_id": user_id}, encoded(body, "$"))


def list_checkpoints(conversation_id: str, user_id: str | None) -> Call:
    """Read all checkpoints."""
    return Call("GET", _checkpoints(conversation_id), {"user_id": user_id})


def delete_checkpoint(conversation_id: str, checkpoint_id: str, user_id: str | None) -> Call:
    """Delete a checkpoint."""
    return _delete(_checkpoints(conversation_id, checkpoint_id), {"user_id": user_id})


def _checkpoints(conversation_id: str, *checkpoint_ids: str) -> str:
    quoted = [quoted_id(each, "checkpoint_id") for each in checkpoint_ids]
    return _conversation(conversation_id, "checkpoints", *quoted)


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
