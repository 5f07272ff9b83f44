"""The errors that the service raises on purpose, each with its HTTP status, title and faults in the input."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from pydantic import ValidationError

# The most faults that one answer names. The limit keeps refusing a request cheaper than accepting it.
FAULTS_MAX = 100
# The steps from an input to a place in it: keys of objects and indexes of lists.
Path = tuple[str | int, ...]
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
PATH_KEY_CHARS = 80
_PATH_CHARS = 1_000


@dataclass(frozen=True)
class Fault:
    """A fault in the input: a place, as a JSON path (`$.messages[0].role`), and a clause about the place."""

    path: str
    message: str


def json_path(path: Path) -> str:
    """Render a path as a JSON path: `$.messages[3].tool_calls["a.b"]`. Long keys and paths are cut."""
    return cut("$" + "".join(_path_step(step) for step in path), _PATH_CHARS)


def cut(text: str, most: int = PATH_KEY_CHARS) -> str:
    """Return the text, or the beginning of a long text, because an answer must not quote without a bound."""
    return text if len(text) <= most else text[:most] + "…"


def _path_step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    step = cut(step)
    return f".{step}" if _IDENTIFIER.match(step) else f"[{json.dumps(step)}]"


def faults_of(error: ValidationError, at: Path) -> list[Fault]:
    """Turn Pydantic's errors into faults, one for each place: Pydantic reports each member of a union."""
    faults: dict[str, Fault] = {}
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        steps = [step for step in each["loc"] if not _names_a_union_member(step)]
        path = json_path((*at, *steps))
        if path in faults:
            message = f"{faults[path].message}, or {each['msg'].lower()}"
            faults[path] = Fault(path, message)
        else:
            faults[path] = Fault(path, each["msg"])
    return list(faults.values())


def _names_a_union_member(step: str | int) -> bool:
    return step in {"str", "list[any]"}


class ChatHistoryError(Exception):
    """The base of every error that this service raises on purpose.

    `status` is the HTTP status of the answer, `title` a text that is the same for every error of the class,
    `headers` are further headers of the answer, and `facts` further fields of its problem document. `detail`
    says what happened this time and what to do, in sentences that stand without the title. `faults` are the
    faults in the input; an error keeps the first FAULTS_MAX and says in `detail` if there are more.
    """

    status = 500
    title = "The service failed"
    headers: Mapping[str, str] = MappingProxyType({})
    facts: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, detail: str = "", faults: Sequence[Fault] = ()) -> None:
        if len(faults) > FAULTS_MAX:
            detail = f"{detail} There are more faults; only the first {FAULTS_MAX} are listed.".strip()
        super().__init__(detail or self.title)
        self.detail = detail
        self.faults = tuple(faults[:FAULTS_MAX])

    @classmethod
    def slug(cls) -> str:
        """Return the name of the class in kebab case, with which the `type` of a problem document ends."""
        name = cls.__name__
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


class InvalidRequest(ChatHistoryError):
    """The input breaks a rule. `faults` has the places."""

    status = 422
    title = "The request is not valid"

    @classmethod
    def at(cls, place: Path | str, why: str) -> Self:
        """Return the error with one fault; `place` is a path in the input, or the name of a parameter."""
        return cls.of([Fault(place if isinstance(place, str) else json_path(place), why)])

    @classmethod
    def of(cls, faults: Sequence[Fault]) -> Self:
        """Return the error with these faults; the detail has the first."""
        return cls(f"{faults[0].path}: {faults[0].message}.", faults)


class MalformedBody(ChatHistoryError):
    """The body is not JSON in UTF-8."""

    status = 400
    title = "The body is not JSON"


class MalformedUrl(ChatHistoryError):
    """The URL is not percent-encoded UTF-8, so it is not clear which id it means."""

    status = 400
    title = "The URL is not valid"


class MalformedRequest(ChatHistoryError):
    """The bytes on a connection are not a request of HTTP/1.1. The connection is closed."""

    status = 400
    title = "The request is not valid HTTP"


class HeadersTooLarge(ChatHistoryError):
    """The request line and headers, or the trailers of a body, are larger than `CHAT_HEADER_BYTES_MAX`."""

    status = 431
    title = "The headers are too large"


class BodyTooLarge(ChatHistoryError):
    """The body is larger than the call allows, or has more values than the service parses at once."""

    status = 413
    title = "The body is too large"


class BatchTooLarge(ChatHistoryError):
    """The database cannot store so many bytes in one transaction. Nothing was stored."""

    status = 413
    title = "The batch is too large for one transaction"


class BodyTooSlow(ChatHistoryError):
    """The body did not arrive within `CHAT_BODY_TIMEOUT_MS`."""

    status = 408
    title = "The body took too long"


class UnsupportedBody(ChatHistoryError):
    """The service does not read bodies of this content type or encoding."""

    status = 415
    title = "The body must be application/json, not compressed"


class Unauthenticated(ChatHistoryError):
    """The request has no API key or token, or the key or token is not valid. The answer does not say why."""

    status = 401
    title = "A valid API key or token is needed"
    headers = MappingProxyType({"WWW-Authenticate": 'Bearer realm="chat-history"'})


class InsufficientScope(ChatHistoryError):
    """The API key or token is valid, but lacks the permission that the call needs."""

    status = 403
    title = "The key does not allow this"
    headers = MappingProxyType(
        {"WWW-Authenticate": 'Bearer realm="chat-history", error="insufficient_scope"'}
    )


class HostNotServed(ChatHistoryError):
    """The `Host` of the request is not a name of this service."""

    status = 421
    title = "This host is not served here"


class CrossSiteRequest(ChatHistoryError):
    """A browser sent the request for a page of another origin, and the service has no authentication."""

    status = 403
    title = "Pages of other origins may not call this service"


class FormRefused(ChatHistoryError):
    """A form of the console was sent without the token that only its page has."""

    status = 403
    title = "The form was not accepted"


class TooManyRequests(ChatHistoryError):
    """The rate limit of this key or address is used up. Nothing was done; retry after `Retry-After`."""

    status = 429
    title = "Too many requests"

    def __init__(self, detail: str, headers: Mapping[str, str]) -> None:
        super().__init__(detail)
        self.headers = headers


class ConversationNotFound(ChatHistoryError):
    """The conversation does not exist, or is another user's or tenant's; the answer is the same for both."""

    status = 404
    title = "There is no such conversation"


class UserNotFound(ChatHistoryError):
    """The caller cannot access this user."""

    status = 404
    title = "There is no such user"


class ErasureNotFound(ChatHistoryError):
    """The user has no such erasure, or it ended more than seven days ago."""

    status = 404
    title = "There is no such erasure"


class MessageNotFound(ChatHistoryError):
    """The conversation has no such message."""

    status = 404
    title = "There is no such message"


class CheckpointNotFound(ChatHistoryError):
    """The conversation has no such checkpoint."""

    status = 404
    title = "There is no such checkpoint"


class CheckpointNotForward(ChatHistoryError):
    """A new checkpoint must stand behind the newest one."""

    status = 409
    title = "There is a newer checkpoint"


class ConversationIdTaken(ChatHistoryError):
    """Another conversation has the id that the caller chose."""

    status = 409
    title = "This conversation id is taken"


class IdempotencyConflict(ChatHistoryError):
    """The idempotency key or a message id was used before, for other messages."""

    status = 409
    title = "This key or id was used for different messages"


class Stale(ChatHistoryError):
    """The conversation is not as the caller's precondition says, so nothing was stored or deleted.

    `missed` are the messages that the caller does not know, where the precondition tells which these are.
    """

    status = 409
    title = "The conversation has changed"
    headers = MappingProxyType({"x-should-retry": "false"})

    def __init__(
        self,
        detail: str,
        *,
        version: int,
        last_seq: int,
        missed: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(detail)
        self.facts = {"version": version, "last_seq": last_seq}
        if missed is not None:
            self.facts = {**self.facts, "missed": missed}

    def hide_messages(self) -> None:
        """Make it an error for a caller that may not read messages."""
        self.facts = {name: value for name, value in self.facts.items() if name != "missed"}


class BrokenCounter(ChatHistoryError):
    """Messages are stored at the next seq of a conversation, because its counter is too low."""

    status = 500
    title = "The conversation's counter is broken"


class DatabaseUnavailable(ChatHistoryError):
    """The database did not answer in time. A write may or may not have been stored; retry."""

    status = 503
    title = "The database is not available"


class Overloaded(ChatHistoryError):
    """The process has more connections than `CHAT_CONNECTIONS_MAX`. Nothing was done; retry."""

    status = 503
    title = "There are too many connections"


class StorageFull(ChatHistoryError):
    """The disk of the database is full. Nothing was stored."""

    status = 507
    title = "The database has no room left"


class UnsuitableDatabase(ChatHistoryError):
    """The service cannot run on this database, for example on a standalone `mongod`."""

    status = 503
    title = "The database cannot serve this service"


class MalformedDocument(ChatHistoryError):
    """A stored document does not have the form that the service writes, because it was changed by hand."""

    title = "A stored document is not well formed"
