"""Pydantic models of OpenAI's Conversations API: request bodies, queries and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from service.api import bodies, conditional, dependencies, paths, schemas
from service.api.schemas import digits
from service.chat_service import ConversationRecord
from service.errors import ConversationNotFound, InvalidRequest
from service.formats.strict_json import Json
from service.tenancy import ID_BYTES_MAX, ID_RULE, Id, is_valid_id

_MetadataKey = Annotated[str, StringConstraints(max_length=64)]
_MetadataValue = Annotated[str, StringConstraints(max_length=512)]
_METADATA_KEYS = 16


def _not_crowded(value: Any) -> Any:
    """Refuse too many keys with one fault, because Pydantic checks each key before it counts the keys."""
    if isinstance(value, dict) and len(value) > _METADATA_KEYS:
        raise ValueError(f"must have at most {_METADATA_KEYS} keys, and has {len(value):,}")
    return value


Metadata = Annotated[
    dict[_MetadataKey, _MetadataValue], Field(max_length=_METADATA_KEYS), BeforeValidator(_not_crowded)
]
_Limit = Annotated[int, Field(ge=0, le=100)]
Limit = Annotated[_Limit, digits(_Limit)]
# Room for a message's id and the number of one of its parts.
ItemIdParameter = Annotated[str, Field(min_length=1, max_length=ID_BYTES_MAX + 20)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _either_type_or_role(schema: dict[str, Any]) -> None:
    """Declare for OpenAPI that a message has a role, and that any other item has a type."""
    other = {"type": "string", "not": {"const": "message"}}
    schema["anyOf"] = [
        {"required": ["role"], "properties": {"type": {"const": "message"}, "role": {"type": "string"}}},
        {"required": ["type"], "properties": {"type": other}},
    ]


class NewOpenAIItem(BaseModel):
    """An item of any type to store. All fields are kept.

    `role` and `content` are checked only in a message; items of other types may have any value there.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_either_type_or_role)

    id: Id | None = Field(None, description="An id of your choice, unique in the conversation.")


# An item is accepted as it is; the model above only describes items for OpenAPI.
_NewItem = Annotated[dict[str, Any], WithJsonSchema(NewOpenAIItem.model_json_schema())]


class NewOpenAIConversation(_Closed):
    """A conversation to create, or with an `id` to get or create. OpenAI's API has no `id` here."""

    id: Id | None = Field(None, description="An id of your choice; without it the service makes one.")
    items: Annotated[list[_NewItem], Field(max_length=1_000)] | None = None
    metadata: Metadata | None = None


class OpenAIMetadata(_Closed):
    """Metadata that replaces the whole metadata of a conversation."""

    metadata: Metadata | None


class NewOpenAIItems(_Closed):
    """Items to append, all of them or none."""

    items: Annotated[list[_NewItem], Field(min_length=1, max_length=1_000)]


class OpenAIConversation(BaseModel):
    """A conversation; `created_at` is in seconds since 1970."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, Any]


class OpenAIReference(BaseModel):
    """The answer to a key without the scope `read`: the id of the conversation."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    object: Literal["conversation"]


class OpenAIConversationDeleted(BaseModel):
    """A deleted conversation."""

    id: Id
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


class OpenAIItem(BaseModel):
    """A stored item as it was sent, with its id and the fields that OpenAI fills in."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: str


class _List(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OpenAIItemList(_List):
    """A page of items; if `has_more` is true, `last_id` is the `after` of the next page."""

    data: list[OpenAIItem]


class OpenAIConversationList(_List):
    """A page of conversations; if `has_more` is true, `last_id` is the `after` of the next page.

    `last_id` is not an id. It is the position of the last conversation when the page was made, because
    activity moves a conversation within the list, and a deletion removes it.
    """

    data: list[OpenAIConversation]


class NewItemsQuery(schemas.ExpectedQuery):
    """The query of appending items. `include` is accepted, and everything that is stored is included."""


class ItemQuery(_Closed):
    """The query of one item. `include` is accepted, and everything that is stored is always included."""


class ItemsQuery(BaseModel):
    """The query of the list of items."""

    model_config = ConfigDict(extra="forbid")

    limit: Limit = 20
    order: Literal["asc", "desc"] = "desc"
    after: ItemIdParameter | None = Field(None, description="The id of the item after which the page begins.")


class ConversationsQuery(BaseModel):
    """The query of the list of conversations."""

    model_config = ConfigDict(extra="forbid")

    user: Id | None = Field(
        None, description="The owner; without it the user in X-User-Id, or the default user."
    )
    limit: Limit = 20
    order: Literal["desc"] = Field("desc", description="Latest activity first is the only order.")
    after: Annotated[str, Field(min_length=1, max_length=schemas.CURSOR_CHARS_MAX)] | None = Field(
        None,
        description="The `last_id` of the previous page, or the id of a conversation, after whose present "
        "position the page begins.",
    )


PREFIX = "/v1"
_USER_HEADER = "X-User-Id"
USER_PARAMETER = {
    "name": _USER_HEADER,
    "in": "header",
    "required": False,
    "description": "The owner of a new conversation. An existing one must belong to this user. The id is "
    "percent-encoded, as in a URL; UTF-8 that is not encoded is taken, too.",
    "schema": schemas.ID_SCHEMA,
}


async def _conversation_id(conversation_id: str) -> str:
    """Return the id in the path. An id that no conversation can have is answered as a missing one."""
    if not is_valid_id(conversation_id):
        raise ConversationNotFound("There is no conversation with this id.")
    return conversation_id


async def _user(request: Request) -> str | None:
    given = request.headers.getlist(_USER_HEADER)
    if len(given) > 1:
        raise InvalidRequest.at(_USER_HEADER, "is given more than once")
    return _user_in(given[0]) if given else None


def _user_in(header: str) -> str:
    """Return the id in a header, whose bytes the framework reads as Latin-1."""
    try:
        user_id = paths.decoded(header.encode("latin-1"))
    except ValueError as error:
        why = "must be percent-encoded UTF-8; a percent sign itself is `%25`"
        raise InvalidRequest.at(_USER_HEADER, why) from error
    if not is_valid_id(user_id):
        raise InvalidRequest.at(_USER_HEADER, ID_RULE)
    return user_id


ConversationId = Annotated[str, Depends(_conversation_id)]
User = Annotated[str | None, Depends(_user)]


def request_description(
    *models: Any, body: Any = None, idempotency_key: bool = False, write: bool = False
) -> dict[str, Any]:
    """Declare for OpenAPI what FastAPI does not know: the query, the headers and the body."""
    parameters = [each for model in models for each in dependencies.query_parameters(model)["parameters"]]
    parameters += [USER_PARAMETER, *([dependencies.IDEMPOTENCY_KEY_PARAMETER] if idempotency_key else [])]
    parameters += [conditional.IF_MATCH_PARAMETER] if write else []
    return {"parameters": parameters, **(bodies.request_body_schema(body) if body else {})}


def page_size(request: Request, limit: int) -> int:
    """Return the size of a page: the requested limit, or the largest size that the setting allows."""
    return min(limit, dependencies.resources(request).settings.page_items_max)


def conversation_object(conversation: ConversationRecord) -> Json:
    """Return a conversation as OpenAI's API has it."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created_at.timestamp()),
        "metadata": conversation.metadata,
    }


def conversation_written(request: Request, conversation: ConversationRecord) -> Json:
    """Answer a write; a caller without the scope `read` gets only the id."""
    if dependencies.may_read(request):
        return conversation_object(conversation)
    return {"id": conversation.id, "object": "conversation"}


def item_list(data: list[Json], *, has_more: bool) -> Json:
    """Return a page as OpenAI's API has it."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
