"""Bodies in and out, as the API says them; no document of the database leaves the service."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
)
from starlette.responses import Response, StreamingResponse

from service.chat_service import ConversationList, History, ListPosition
from service.documents import Conversation, Id, MessageFields, Seq, Time, Title
from service.errors import Fault, InvalidRequest, MalformedDocument
from service.roles import Role

NDJSON = "application/x-ndjson"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _plain_digits(value: Any) -> Any:
    """Refuse what `int` would also take: signs, spaces, underscores, other scripts' digits."""
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        raise ValueError("must be digits only")
    return value


def digits(bounded: Any) -> BeforeValidator:
    """Read a query parameter as digits only; its schema stays that of the bounded integer."""
    return BeforeValidator(_plain_digits, json_schema_input_type=bounded)


_Items = Annotated[int, Field(ge=1, le=1_000)]
ID_SCHEMA = TypeAdapter(Id).json_schema()
PageItems = Annotated[_Items, digits(_Items)]
SeqParameter = Annotated[Seq, digits(Seq)]


def _text(value: Any) -> Any:
    """Refuse a number, which would be read as seconds since 1970."""
    if not isinstance(value, str):
        raise ValueError("must be a time, as text")  # noqa: TRY004  (what Pydantic turns into a fault)
    return value


# A body is read strictly, but JSON has no times: theirs come as text.
Expiry = Annotated[Time, Field(strict=False), BeforeValidator(_text, json_schema_input_type=AwareDatetime)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewConversation(_Closed):
    """A conversation to get or create."""

    user_id: Id
    id: Id | None = Field(None, description="An id of your own; without it a new one is made.")
    title: Title | None = None
    metadata: dict[str, Any] | None = None
    expires_at: Expiry | None = Field(
        None, description="From then on it is removed, with its messages; soon, where that is past already."
    )


class ConversationChanges(_Closed):
    """What to change; what is left out stays, null clears."""

    title: Title | None = None
    metadata: dict[str, Any] | None = Field(None, description="Replaces the metadata as a whole.")
    expires_at: Expiry | None = None


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class NewMessage(MessageFields):
    """A message to append. Fields that are not named here are kept as they are."""

    id: Id = Field(
        "",
        description="An id of your own, unique in its conversation; it makes the append repeatable.",
        json_schema_extra=_without_default,
    )


class NewMessages(_Closed):
    """A batch of messages, appended whole or not at all."""

    messages: list[NewMessage] = Field(min_length=1, max_length=1_000)


class ConversationOut(BaseModel):
    """A conversation."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    user_id: Id
    title: str | None
    metadata: dict[str, Any]
    created_at: AwareDatetime
    updated_at: AwareDatetime
    last_seq: Seq
    message_count: Seq
    expires_at: AwareDatetime | None = Field(None, description="Only where it is set.")


class MessageOut(MessageFields):
    """A stored message: what the service says of it, then the fields that were sent, in their order."""

    id: Id
    conversation_id: Id
    user_id: Id
    seq: Annotated[int, Field(ge=1)]
    created_at: AwareDatetime


class Reference(BaseModel):
    """What a key without the scope `read` is told of what it wrote: the id."""

    model_config = ConfigDict(extra="forbid")

    id: Id


class References(BaseModel):
    """What a key without the scope `read` is told of a batch that it wrote: the ids."""

    model_config = ConfigDict(extra="forbid")

    data: list[Reference]
    has_more: Literal[False]
    next: None


class ConversationPage(BaseModel):
    """A page of conversations; `next` is the cursor to go on with."""

    data: list[ConversationOut]
    has_more: bool
    next: str | None


class MessagePage(BaseModel):
    """A page of messages; `next` is the seq to go on from."""

    data: list[MessageOut]
    has_more: bool
    next: int | None


class Health(BaseModel):
    """How the service is."""

    status: Literal["live", "ready"]


class ListQuery(BaseModel):
    """The query of the list of conversations."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id
    limit: PageItems | None = None
    cursor: Annotated[str, Field(max_length=512)] | None = None


class OwnerQuery(BaseModel):
    """The query that every call on a conversation may carry."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id | None = Field(None, description="Then the conversation must be this user's.")


class CutQuery(OwnerQuery):
    """The query of cutting off the end of a conversation."""

    after: SeqParameter | None = Field(
        None, description="Keep the messages up to this seq; without it all are deleted."
    )


class EraseQuery(BaseModel):
    """The query of an erasure."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = Field(False, description="Count, and remove nothing.")


class EraseReceipt(BaseModel):
    """What an erasure removed, or would remove."""

    user_id: Id
    conversations: Seq
    messages: Seq
    dry_run: bool


class HistoryQuery(OwnerQuery):
    """The query of a history."""

    limit: PageItems | None = None
    after: SeqParameter | None = Field(None, description="Only seqs above this one.")
    before: SeqParameter | None = Field(None, description="Only seqs below this one.")
    last: PageItems | None = Field(
        None, description="The newest so many, oldest first; not with limit or order."
    )
    order: Literal["asc", "desc"] | None = None
    since: Time | None = Field(None, description="From this time on, it included.")
    until: Time | None = Field(None, description="Up to this time, it included.")
    role: Role | None = None


# -- answers ---------------------------------------------------------------------------------------


def timestamp(time: datetime) -> str:
    """Say a time, which is UTC wherever this service has one, as RFC 3339 in milliseconds."""
    return time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def dumps(value: Any) -> bytes:
    """Encode an answer as JSON; its only values that are not JSON are times.

    Raises MalformedDocument for a value that somebody stored by hand and that JSON does not have.
    """
    try:
        return orjson.dumps(value, default=timestamp, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError as error:
        raise MalformedDocument(
            "This call reads a value of a type that JSON does not have. Replace it in the database."
        ) from error


def lines(values: list[dict[str, Any]]) -> bytes:
    """Encode values as lines of JSON."""
    return b"".join(dumps(each) + b"\n" for each in values)


async def stream_lines(parts: AsyncIterator[list[dict[str, Any]]]) -> Response:
    """Answer with lines as they come; what can be refused is refused before the first byte of the answer."""
    first = await anext(parts)

    async def encoded() -> AsyncIterator[bytes]:
        yield lines(first)
        # An error in here ends the connection without the last chunk, so that no client takes what was cut
        # short for a whole.
        async for part in parts:
            yield lines(part)

    return StreamingResponse(encoded(), media_type=NDJSON)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with JSON, without a detour through models: what is stored was checked when it came."""
    return Response(dumps(value), status, dict(headers or {}), "application/json")


def conversation_out(conversation: Conversation) -> dict[str, Any]:
    """Shape a conversation as ConversationOut."""
    shaped = {name: getattr(conversation, name) for name in ConversationOut.model_fields}
    if shaped["expires_at"] is None:
        del shaped["expires_at"]
    return shaped


def conversation_page(page: ConversationList) -> dict[str, Any]:
    """Shape a page as ConversationPage."""
    return {
        "data": [conversation_out(each) for each in page.conversations],
        "has_more": page.has_more,
        "next": cursor(page.next) if page.next else None,
    }


def message_page(page: History) -> dict[str, Any]:
    """Shape a page as MessagePage."""
    return {"data": page.messages, "has_more": page.has_more, "next": page.next}


def cursor(position: ListPosition) -> str:
    """Write a position of the list as an opaque word for URLs."""
    ms = (position.updated_at - _EPOCH) // timedelta(milliseconds=1)
    return base64.urlsafe_b64encode(f"{ms}:{position.conversation_id}".encode()).decode().rstrip("=")


def position(word: str) -> ListPosition:
    """Read a cursor back. Raises InvalidRequest for any that this service did not write."""
    with contextlib.suppress(binascii.Error, ValueError, OverflowError):
        text = base64.b64decode(word + "=" * (-len(word) % 4), b"-_", validate=True).decode()
        ms, _, conversation_id = text.partition(":")
        found = ListPosition(_EPOCH + timedelta(milliseconds=int(ms)), conversation_id)
        # What is read is only a cursor of ours if it is written in the same way.
        # Its id may be any text that somebody gave a conversation by hand, or the list would end there.
        is_text = conversation_id != "" and conversation_id.isprintable() and "/" not in conversation_id
        if is_text and cursor(found) == word:
            return found
    why = "is not a cursor of this service"
    raise InvalidRequest(f"query.cursor {why}.", [Fault("query.cursor", why)])
