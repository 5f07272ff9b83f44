"""What can go wrong, each named after the fact: a status, a title, one line. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

# The most faults that one answer names, so that refusing costs less than accepting.
FAULTS_MAX = 100


@dataclass(frozen=True)
class Fault:
    """One place in the input and what is wrong with it; `path` is a JSON path (`$.messages[0].role`)."""

    path: str
    message: str


class ChatHistoryError(Exception):
    """The base of every error that this service raises on purpose.

    `status` is the HTTP status that the error means, `title` a sentence that never changes, `headers`
    what belongs to such an answer, `detail` what happened this time, `faults` the places in the input, of
    which an error keeps the first FAULTS_MAX and says in `detail` that there are more.
    """

    status = 500
    title = "The service failed"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str = "", faults: Sequence[Fault] = ()) -> None:
        if len(faults) > FAULTS_MAX:
            detail = f"{detail} There are more faults; only the first {FAULTS_MAX} are listed.".strip()
        super().__init__(detail or self.title)
        self.detail = detail
        self.faults = tuple(faults[:FAULTS_MAX])

    @classmethod
    def slug(cls) -> str:
        """Return the error's name in kebab case, which ends its `type`."""
        name = cls.__name__
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


class InvalidRequest(ChatHistoryError):
    """The input breaks a rule; `faults` says where."""

    status = 422
    title = "The request is not valid"


class MalformedBody(ChatHistoryError):
    """The body is not JSON in UTF-8."""

    status = 400
    title = "The body is not JSON"


class MalformedRequest(ChatHistoryError):
    """What came is not a request by the rules of HTTP/1.1. The connection ends."""

    status = 400
    title = "The request is not valid HTTP"


class HeadersTooLarge(ChatHistoryError):
    """The request line and the headers, or a body's trailers, are more than `CHAT_HEADER_BYTES_MAX`."""

    status = 431
    title = "The headers are too large"


class BodyTooLarge(ChatHistoryError):
    """The body is larger than its call allows, or is made of more values than the service parses at once."""

    status = 413
    title = "The body is too large"


class BatchTooLarge(ChatHistoryError):
    """The database cannot take so many bytes in one transaction. Nothing was stored."""

    status = 413
    title = "The batch is too large for one transaction"


class BodyTooSlow(ChatHistoryError):
    """The body did not arrive within `CHAT_BODY_TIMEOUT_MS`."""

    status = 408
    title = "The body took too long"


class UnsupportedBody(ChatHistoryError):
    """The body's content type or encoding is not one that the service reads."""

    status = 415
    title = "The body must be application/json, not compressed"


class Unauthenticated(ChatHistoryError):
    """There is no key and no token, or none that is good. Which of the two is not said."""

    status = 401
    title = "A valid API key or token is needed"
    headers = MappingProxyType({"WWW-Authenticate": 'Bearer realm="chat-history"'})


class ScopeMissing(ChatHistoryError):
    """The key is good, and not for this."""

    status = 403
    title = "The key does not allow this"
    headers = MappingProxyType(
        {"WWW-Authenticate": 'Bearer realm="chat-history", error="insufficient_scope"'}
    )


class HostNotServed(ChatHistoryError):
    """The request calls the service by a name that is not one of its own."""

    status = 421
    title = "This host is not served here"


class CrossSiteRequest(ChatHistoryError):
    """A browser sent this for a page of another origin, and there is no authentication."""

    status = 403
    title = "Pages of other origins may not call this service"


class TooManyRequests(ChatHistoryError):
    """The rate of this key or this address is used up. Nothing was done; `Retry-After` says when again."""

    status = 429
    title = "Too many requests"

    def __init__(self, detail: str, headers: Mapping[str, str]) -> None:
        super().__init__(detail)
        self.headers = headers


class ConversationNotFound(ChatHistoryError):
    """No such conversation, or it is somebody else's: one answer for both."""

    status = 404
    title = "There is no such conversation"


class UserNotFound(ChatHistoryError):
    """There is no such user for this caller."""

    status = 404
    title = "There is no such user"


class MessageNotFound(ChatHistoryError):
    """The conversation has no such message."""

    status = 404
    title = "There is no such message"


class ConversationIdTaken(ChatHistoryError):
    """The id that the caller chose is not free."""

    status = 409
    title = "This conversation id is taken"


class IdempotencyConflict(ChatHistoryError):
    """The idempotency key or a message id stands for a different request already."""

    status = 409
    title = "This key or id was used for different messages"


class BrokenCounter(ChatHistoryError):
    """Messages stand where a conversation's next one belongs: its counter does not count them."""

    status = 500
    title = "The conversation's counter is broken"


class DatabaseUnavailable(ChatHistoryError):
    """The database does not answer, or not in time. Nothing is known to be stored; retry."""

    status = 503
    title = "The database is not available"


class Overloaded(ChatHistoryError):
    """There are more connections than `CHAT_CONNECTIONS_MAX`. Nothing was done; retry."""

    status = 503
    title = "There are too many connections"


class StorageFull(ChatHistoryError):
    """The database has no room left. Nothing was stored."""

    status = 507
    title = "The database has no room left"


class UnsuitableDatabase(ChatHistoryError):
    """The database is one that this service cannot run on (a standalone `mongod`)."""

    status = 503
    title = "The database cannot serve this service"


class MalformedDocument(ChatHistoryError):
    """A document in the database has another form than the service's: somebody changed it by hand."""

    title = "A stored document is not well formed"
