"""Pydantic models of the API: request bodies, queries and answers."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    WithJsonSchema,
)

from service.clock import EPOCH
from service.documents import REPLACED_FIELDS, MessageFields, Seq, Time, Title
from service.formats.openai_items import Role
from service.tenancy import Id


def _plain_digits(value: Any) -> Any:
    """Refuse signs, spaces, underscores and digits of other scripts, which `int` would accept."""
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        raise ValueError("must be digits only")
    return value


def digits(bounded: Any) -> BeforeValidator:
    """Accept only digits in a query parameter. The schema is still the one of the bounded integer."""
    return BeforeValidator(_plain_digits, json_schema_input_type=bounded)


_Items = Annotated[int, Field(ge=1, le=1_000)]
ID_SCHEMA = TypeAdapter(Id).json_schema()
# Room for a time and an id of ID_BYTES_MAX, in base64.
CURSOR_CHARS_MAX = 2_048
PageItems = Annotated[_Items, digits(_Items)]
_Wait = Annotated[int, Field(ge=0, le=60)]
WaitSeconds = Annotated[_Wait, digits(_Wait)]
SeqParameter = Annotated[Seq, digits(Seq)]
_DATE = re.compile(r"[0-9]{4}-")


def _text(value: Any) -> Any:
    """Refuse a number, also one in a text, which Pydantic would read as seconds since 1970."""
    if not isinstance(value, str) or not _DATE.match(value):
        raise ValueError("must be a time, as text like 2026-01-31T12:00:00Z")
    return value


# A body is validated strictly, but JSON has no type for times, so a time is text.
TextTime = Annotated[Time, Field(strict=False), BeforeValidator(_text, json_schema_input_type=AwareDatetime)]


class Closed(BaseModel):
    """A body, or a part of one, that has no other fields and no values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewConversation(Closed):
    """A conversation to get or create."""

    user_id: Id
    id: Id | None = Field(None, description="An id of your choice; without it the service makes one.")
    title: Title | None = None
    metadata: dict[str, Any] | None = None
    expires_at: TextTime | None = Field(
        None,
        description="The conversation is removed with its messages after this time; a past time means soon.",
    )


class ConversationChanges(Closed):
    """The fields to change. A field that is left out stays as it is; null clears it."""

    title: Title | None = None
    metadata: dict[str, Any] | None = Field(None, description="Replaces the whole metadata.")
    expires_at: TextTime | None = None


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


class NewMessage(MessageFields):
    """A message to append. Fields that are not listed here are kept as they are."""

    id: Id = Field(
        "",
        description="An id of your own, unique in the conversation. A repeated append is then stored once.",
        json_schema_extra=_without_default,
    )


class AppendedConversation(Closed):
    """The conversation that an append creates if it is not there; an existing one stays as it is."""

    user_id: Id
    title: Title | None = None
    metadata: dict[str, Any] | None = None


class _Append(Closed):
    conversation: AppendedConversation = Field(
        AppendedConversation.model_construct(user_id=""),
        description="Create the conversation first, if it is not there. It must belong to this user.",
        json_schema_extra=_without_default,
    )


class NewMessages(_Append):
    """A batch of messages, appended whole or not at all."""

    messages: list[NewMessage] = Field(min_length=1, max_length=1_000)


def _message_with_role(schema: dict[str, Any]) -> None:
    """Declare for OpenAPI that an item that is a message has a role, and that any other item has a type."""
    content = {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "null"}]}
    message = {"role": {"type": "string"}, "content": content}
    schema["anyOf"] = [
        {"required": ["role"], "properties": {"type": {"const": "message"}, **message}},
        {"required": ["type"], "properties": {"type": {"type": "string", "not": {"const": "message"}}}},
    ]


class Item(BaseModel):
    """An item of any type, as in OpenAI's Responses API and Agents SDK. The item is kept as it is.

    An item with a role and no type is a message.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_message_with_role)


# An item is accepted as it is; the model above only describes items for OpenAPI.
_Item = Annotated[dict[str, Any], WithJsonSchema(Item.model_json_schema())]


class NewItems(_Append):
    """A batch of items, appended whole or not at all, each as one message."""

    items: list[_Item] = Field(min_length=1, max_length=1_000)


class ConversationOut(BaseModel):
    """A conversation."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    user_id: Id
    title: str | None
    metadata: dict[str, Any]
    created_at: AwareDatetime
    updated_at: Annotated[AwareDatetime, Field(description="The latest change of any kind.")]
    active_at: Annotated[
        AwareDatetime,
        Field(description="The latest message, or the creation. It orders the list."),
    ]
    last_seq: Seq
    message_count: Seq
    version: Annotated[int, Field(ge=0, description="How often the history changed.")]
    expires_at: AwareDatetime | None = Field(None, description="Only present if it is set.")


class MessageOut(MessageFields):
    """A stored message: the service's own fields, then the fields that were sent, in their order."""

    id: Id
    conversation_id: Id
    user_id: Id
    seq: Annotated[int, Field(ge=1)]
    created_at: AwareDatetime
    revision: int = Field(
        0, description="How often it was replaced, if it was.", json_schema_extra=_without_default
    )
    updated_at: AwareDatetime = Field(
        EPOCH, description="When it was replaced last, if it was.", json_schema_extra=_without_default
    )


class MessageItems(BaseModel):
    """A stored message as items: the service's own fields, then the items."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    conversation_id: Id
    user_id: Id
    seq: Annotated[int, Field(ge=1)]
    created_at: AwareDatetime
    revision: int = Field(0, json_schema_extra=_without_default)
    updated_at: AwareDatetime = Field(EPOCH, json_schema_extra=_without_default)
    items: list[Item] = Field(
        min_length=1,
        description="The item exactly as it was appended. A message that was not appended as an item reads "
        "as a model takes it: the message, if it has content, and a `function_call` for each tool call.",
    )


class PoppedItems(MessageItems):
    """The deleted message, as items and as it was stored."""

    message: MessageOut


class Reference(BaseModel):
    """The answer to a key without the scope `read`: the id of what the key wrote."""

    model_config = ConfigDict(extra="forbid")

    id: Id


class References(BaseModel):
    """The answer to a key without the scope `read`: the ids of the batch that the key wrote."""

    model_config = ConfigDict(extra="forbid")

    data: list[Reference]
    has_more: Literal[False]
    next: None


class ConversationPage(BaseModel):
    """A page of conversations; `next` is the cursor of the next page."""

    data: list[ConversationOut]
    has_more: bool
    next: str | None


class MessagePage(BaseModel):
    """A page of messages; `next` is the seq from which the next page goes on."""

    data: list[MessageOut]
    has_more: bool
    next: int | None


class MessageItemsPage(BaseModel):
    """A page of messages as items; `next` is the seq from which the next page goes on."""

    data: list[MessageItems]
    has_more: bool
    next: int | None


class ListQuery(BaseModel):
    """The query of a list of conversations."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id | None = Field(None, description="The owner; without it the conversations of all users.")
    limit: PageItems | None = None
    cursor: Annotated[str, Field(max_length=CURSOR_CHARS_MAX)] | None = None


class OwnerQuery(BaseModel):
    """The query that every call on a conversation accepts."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id | None = Field(None, description="If given, the conversation must belong to this user.")


_EXPECTED = Field(
    None,
    description="Write only if no message was appended after this seq (0: only if there is none), else "
    "answer 409 (`stale`), with the messages that were missed.",
)


class ExpectedQuery(BaseModel):
    """The query of a write that has no other parameter."""

    model_config = ConfigDict(extra="forbid")

    expected_last_seq: SeqParameter | None = _EXPECTED


class WriteQuery(OwnerQuery):
    """The query of a call that writes to a conversation."""

    expected_last_seq: SeqParameter | None = _EXPECTED


class ViewQuery(OwnerQuery):
    """The query of a call that returns messages."""

    view: Literal["messages", "items"] = Field(
        "messages", alias="as", description="Messages as they are stored, or as items of OpenAI's APIs."
    )


class PopQuery(ViewQuery, WriteQuery):
    """The query of taking the newest message."""


class DeleteMessagesQuery(WriteQuery):
    """The query of deleting the newest messages."""

    after: SeqParameter | None = Field(
        None, description="Keep the messages up to this seq; without it all messages are deleted."
    )


class HistoryQuery(ViewQuery):
    """The query of a conversation's history."""

    limit: PageItems | None = None
    after: SeqParameter | None = Field(None, description="Only messages with a seq above this one.")
    before: SeqParameter | None = Field(None, description="Only messages with a seq below this one.")
    last: PageItems | None = Field(
        None, description="This many of the newest messages, oldest first; not with limit or order."
    )
    order: Literal["asc", "desc"] | None = None
    since: TextTime | None = Field(None, description="Only messages at or after this time.")
    until: TextTime | None = Field(None, description="Only messages at or before this time.")
    role: Role | None = None
    wait: WaitSeconds | None = Field(
        None, description="With `after`: if nothing is there yet, wait for so many seconds for a message."
    )


class EventsQuery(BaseModel):
    """The query of the events of a list."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id | None = Field(None, description="Only this user's. Without it, `admin` is needed.")


def service_fields(message: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that the service sets."""
    own = ["id", "conversation_id", "user_id", "seq", "created_at"]
    own += REPLACED_FIELDS if isinstance(message.get("updated_at"), datetime) else ()
    return {name: message[name] for name in own}
