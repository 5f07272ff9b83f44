"""Bodies, queries and answers of the OpenAI Conversations API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from service.api.schemas import digits
from service.documents import Id

_MetadataKey = Annotated[str, StringConstraints(max_length=64)]
_MetadataValue = Annotated[str, StringConstraints(max_length=512)]
_METADATA_KEYS = 16


def _not_crowded(value: Any) -> Any:
    """Refuse too many keys by one fault: Pydantic looks at each key before it counts them."""
    if isinstance(value, dict) and len(value) > _METADATA_KEYS:
        raise ValueError(f"must have at most {_METADATA_KEYS} keys, and has {len(value):,}")
    return value


Metadata = Annotated[
    dict[_MetadataKey, _MetadataValue], Field(max_length=_METADATA_KEYS), BeforeValidator(_not_crowded)
]
_Limit = Annotated[int, Field(ge=0, le=100)]
Limit = Annotated[_Limit, digits(_Limit)]
ItemIdParameter = Annotated[str, Field(min_length=1, max_length=160)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _either_type_or_role(schema: dict[str, Any]) -> None:
    """Say to OpenAPI that a message has a role, and that anything else has a type."""
    other = {"type": "string", "not": {"const": "message"}}
    schema["anyOf"] = [
        {"required": ["role"], "properties": {"type": {"const": "message"}, "role": {"type": "string"}}},
        {"required": ["type"], "properties": {"type": other}},
    ]


class NewOpenAIItem(BaseModel):
    """An item to store, of any type: whatever it has is kept.

    `role` and `content` are those of a message; in items of other types they are whatever they are.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_either_type_or_role)

    id: Id | None = Field(None, description="An id of your own, unique in its conversation.")


# An item is taken as it is; the model above only describes it.
_NewItem = Annotated[dict[str, Any], WithJsonSchema(NewOpenAIItem.model_json_schema())]


class NewOpenAIConversation(_Closed):
    """A conversation to create."""

    items: Annotated[list[_NewItem], Field(max_length=1_000)] | None = None
    metadata: Metadata | None = None


class OpenAIMetadata(_Closed):
    """Metadata to put in the place of what is there."""

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
    """What a key without the scope `read` is told of a conversation: the id."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    object: Literal["conversation"]


class OpenAIConversationDeleted(BaseModel):
    """A conversation that is no more."""

    id: Id
    object: Literal["conversation.deleted"]
    deleted: Literal[True]


class OpenAIItem(BaseModel):
    """An item, as it came, with its id, and what OpenAI fills in."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: str


class _List(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OpenAIItemList(_List):
    """A page of items; while `has_more`, `last_id` is the `after` of the next."""

    data: list[OpenAIItem]


class OpenAIConversationList(_List):
    """A page of conversations; while `has_more`, `last_id` is the `after` of the next.

    `last_id` is no id, but the position of the last conversation as it stood when the page was made: activity
    moves a conversation within this list, and a deletion takes it out.
    """

    data: list[OpenAIConversation]


class ItemQuery(_Closed):
    """The query of one item, of which `include` is accepted: all that is stored is always included."""


class ItemsQuery(BaseModel):
    """The query of the list of items."""

    model_config = ConfigDict(extra="forbid")

    limit: Limit = 20
    order: Literal["asc", "desc"] = "desc"
    after: ItemIdParameter | None = Field(None, description="The id of the item to go on behind.")


class ConversationsQuery(BaseModel):
    """The query of the list of conversations."""

    model_config = ConfigDict(extra="forbid")

    user: Id | None = Field(None, description="Whose; without it those of X-User-Id, or the default user's.")
    limit: Limit = 20
    order: Literal["desc"] = Field("desc", description="Latest activity first is the only order.")
    after: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        None,
        description="The `last_id` of the page before; or the id of a conversation, to go on behind it as it "
        "stands now.",
    )
