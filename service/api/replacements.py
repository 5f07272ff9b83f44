"""Routes that replace messages: one, or a history by a list."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import (
    ConfigDict,
    Field,
)
from starlette.responses import Response

from service import errors
from service.api import bodies, conditional, dependencies
from service.api.bodies import json_response
from service.api.dependencies import Chat, ConversationId, MessageId
from service.api.problems import error_responses
from service.api.schemas import (
    Closed,
    MessageOut,
    MessagePage,
    NewMessage,
    Reference,
    References,
    SeqParameter,
    WriteQuery,
)
from service.chat_service import NewMessage as Message
from service.chat_service import PreparedBatch
from service.documents import MessageFields
from service.errors import InvalidRequest
from service.formats import strict_json
from service.formats.strict_json import Json
from service.tenancy import Id


class NamedMessage(NewMessage):
    """A message with an id, by which it is found again."""

    id: Id


def _without_id(schema: dict[str, Any]) -> None:
    """Declare for OpenAPI that the id is in the path; a body may repeat it."""
    schema["not"] = {"required": ["id"]}


class Replacement(MessageFields):
    """What a message is replaced with. Fields that are not listed here are kept as they are."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_without_id)


class History(Closed):
    """The messages that the history is to have, in order."""

    messages: list[NamedMessage] = Field(max_length=1_000)


class PutQuery(WriteQuery):
    """The query of replacing a message."""

    upsert: bool = Field(False, description="Append the message if there is none with this id.")


class PutHistoryQuery(WriteQuery):
    """The query of replacing a history."""

    after: SeqParameter | None = Field(
        None, description="Keep the messages up to this seq, and replace what follows; 0 if it is left out."
    )


router = APIRouter(prefix="/conversations/{conversation_id:id}/messages", tags=["messages"])
_ERRORS = (
    errors.ConversationNotFound,
    errors.IdempotencyConflict,
    errors.Stale,
    errors.BatchTooLarge,
    errors.StorageFull,
    *bodies.PROBLEMS,
)


@router.put(
    "",
    response_model=MessagePage | References,
    openapi_extra={
        **dependencies.query_parameters(PutHistoryQuery, conditional.IF_MATCH_PARAMETER),
        **bodies.request_body_schema(History),
    },
    responses=error_responses(*_ERRORS),
)
async def put_messages(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    query: Annotated[PutHistoryQuery, dependencies.query(PutHistoryQuery)],
) -> Response:
    """Make the history, or what follows a seq, exactly this list, all of it or nothing.

    Messages in front that are equal stay as they are, one that is changed is replaced in its place, and from
    the first that has another id on the history is cut off and goes on as the list does.
    """

    def made(body: Any) -> PreparedBatch:
        bodies.refuse_crowded(body, History)
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise InvalidRequest.at("$.messages", "must be a list of messages")
        return chat.prepare_named(list(map(Message, body["messages"])), field="messages")

    condition = conditional.condition(request)
    batch = await bodies.read(request, made)
    with dependencies.conflicts_for(request):
        put = await chat.put_messages(
            conversation_id, batch, query.user_id, after=query.after or 0, condition=condition
        )
    del batch  # frees its memory before the answer, which may be as large, is made
    may_read = dependencies.may_read(request)
    return await strict_json.beside(
        put.size,
        lambda: json_response(
            {"data": [_shown(each, may_read) for each in put.messages], "has_more": False, "next": None}
        ),
    )


@router.put(
    "/{message_id:id}",
    response_model=MessageOut | Reference,
    openapi_extra={
        **dependencies.query_parameters(PutQuery, conditional.IF_MATCH_PARAMETER),
        **bodies.request_body_schema(Replacement),
    },
    responses={
        201: {"model": MessageOut | Reference, "description": "There was none, and it was appended."},
        **error_responses(errors.MessageNotFound, *_ERRORS),
    },
)
async def replace_message(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    message_id: MessageId,
    query: Annotated[PutQuery, dependencies.query(PutQuery)],
) -> Response:
    """Replace a message, which keeps its place and time; with `upsert=true` append it if it is missing."""

    def made(body: Any) -> PreparedBatch:
        if isinstance(body, dict) and body.setdefault("id", message_id) != message_id:
            raise InvalidRequest.at("$.id", "is another id than the one in the path")
        return chat.prepare_named([Message(body)], field=None)

    condition = conditional.condition(request)
    message = await bodies.read(request, made)
    with dependencies.conflicts_for(request):
        put = await chat.replace_message(
            conversation_id, message, query.user_id, upsert=query.upsert, condition=condition
        )
    shown = _shown(put.message, dependencies.may_read(request))
    return json_response(shown, 201 if put.created else 200)


def _shown(message: Json, may_read: bool) -> Json:
    return message if may_read else {"id": message["id"]}
