"""The route that appends messages or items."""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from service import chat_service, errors
from service.api import bodies, conditional, dependencies
from service.api.bodies import json_response
from service.api.dependencies import Chat, ConversationId, IdempotencyKey
from service.api.messages import WRITE, Show, Write, as_items, as_stored
from service.api.problems import error_responses
from service.api.schemas import (
    AppendedConversation,
    MessageItemsPage,
    MessageOut,
    MessagePage,
    NewItems,
    NewMessage,
    NewMessages,
    Reference,
    References,
)
from service.chat_service import AppendResult, PreparedBatch
from service.errors import FAULTS_MAX, Fault, InvalidRequest, Path, faults_of, json_path
from service.formats import openai_items, strict_json
from service.formats.strict_json import Json

router = APIRouter(prefix="/conversations/{conversation_id:id}/messages", tags=["messages"])
_Stored = MessageOut | MessagePage | MessageItemsPage | Reference | References


@router.post(
    "",
    status_code=201,
    response_model=_Stored,
    openapi_extra={
        "parameters": [*WRITE["parameters"], dependencies.IDEMPOTENCY_KEY_PARAMETER],
        **bodies.request_body_schema(NewMessage, NewMessages, NewItems),
    },
    responses={
        200: {
            "model": _Stored,
            "description": "An earlier request stored these messages already.",
            "headers": {"Idempotent-Replayed": {"schema": {"const": "true"}}},
        },
        **error_responses(
            errors.ConversationNotFound,
            errors.ConversationIdTaken,
            errors.IdempotencyConflict,
            errors.Stale,
            errors.BatchTooLarge,
            errors.StorageFull,
            *bodies.PROBLEMS,
        ),
    },
)
async def add_messages(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    query: Write,
    idempotency_key: IdempotencyKey,
) -> Response:
    """Append one message (the object), a batch (`{"messages": [...]}`), or items (`{"items": [...]}`).

    Each item of OpenAI's APIs is stored as one message, and `as=items` returns the item exactly as sent.
    With `conversation` beside a batch the conversation is created first if it is not there. Without the scope
    `read` the answer has only the ids of the messages.
    """

    def made(body: Any) -> tuple[PreparedBatch, str | None, AppendedConversation | None]:
        field = _batch_field(body)
        if field is None:
            return (
                chat.prepare([chat_service.NewMessage(body)], idempotency_key=idempotency_key, field=None),
                field,
                None,
            )
        messages = _messages(body) if field == "messages" else _items_as_messages(body)
        return (
            chat.prepare(
                list(map(chat_service.NewMessage, messages)), idempotency_key=idempotency_key, field=field
            ),
            field,
            _conversation(body, query.user_id),
        )

    condition = conditional.condition(request)
    batch, field, new = await bodies.read(request, made)
    with dependencies.conflicts_for(request):
        if new is None:
            appended = await chat.add_messages(conversation_id, batch, query.user_id, condition=condition)
        else:
            appended = await chat.append_or_create(
                conversation_id,
                batch,
                new.user_id,
                title=new.title,
                metadata=new.metadata,
                condition=condition,
            )
    del batch  # frees its memory before the answer, which may be as large, is made
    show: Show = as_items if field == "items" else as_stored
    show = show if dependencies.may_read(request) else _as_reference
    return await strict_json.beside(appended.size, lambda: _answer(appended, show, one=field is None))


def _batch_field(body: Any) -> str | None:
    """Return the name of the list in a body, or None if the body is one message, which has a role."""
    if isinstance(body, dict) and "role" not in body:
        return "messages" if "messages" in body else "items" if "items" in body else None
    return None


def _conversation(body: Json, user_id: str | None) -> AppendedConversation | None:
    """Return the conversation that an append may create, if the body names one."""
    if "conversation" not in body:
        return None
    value = body["conversation"]
    bodies.refuse_crowded(value, AppendedConversation)
    strict_json.check(value, ("conversation",))
    try:
        wanted = AppendedConversation.model_validate(value)
    except ValidationError as error:
        raise InvalidRequest.of(faults_of(error, ("conversation",))) from error
    if user_id not in {None, wanted.user_id}:
        raise InvalidRequest.at("$.conversation.user_id", "is another user than `user_id` in the query")
    return wanted


def _messages(body: Json) -> list[Any]:
    _refuse_unknown(body, NewMessages)
    return _list(body, "messages")


def _refuse_unknown(body: Json, model: type[BaseModel]) -> None:
    """Refuse keys that the model does not have, by their names alone, because the list is read elsewhere."""
    bodies.refuse_crowded(body, model)
    if unknown := [key for key in body if key not in model.model_fields]:
        raise InvalidRequest.of([Fault(json_path((key,)), "is not known here") for key in unknown])


def _items_as_messages(body: Json) -> list[Any]:
    """Return the messages as which items are stored. Raises InvalidRequest, with the path in the item."""
    _refuse_unknown(body, NewItems)
    # Checked before the translation, so that the paths of faults are paths in the items.
    strict_json.check(body)
    items = _list(body, "items")
    faults = (fault for place, item in enumerate(items) for fault in _item_faults(item, ("items", place)))
    if first_faults := list(islice(faults, FAULTS_MAX + 1)):
        raise InvalidRequest.of(first_faults)
    return [openai_items.message_of(item, keep_id=True) for item in items]


def _item_faults(item: Any, at: Path) -> list[Fault]:
    if not isinstance(item, dict):
        return [Fault(json_path(at), "must be an object")]
    wrong = openai_items.message_faults(item)
    return [Fault(json_path((*at, name)), why) for name, why in wrong.items()]


def _list(body: Json, field: str) -> list[Any]:
    if not isinstance(body[field], list):
        raise InvalidRequest.at(f"$.{field}", f"must be a list of {field}")
    return list(body[field])


def _answer(appended: AppendResult, show: Show, *, one: bool) -> Response:
    stored = list(map(show, appended.messages))
    body = stored[0] if one else {"data": stored, "has_more": False, "next": None}
    if appended.replayed:
        return json_response(body, 200, {"Idempotent-Replayed": "true"})
    return json_response(body, 201)


def _as_reference(message: Json) -> Json:
    return {"id": message["id"]}
