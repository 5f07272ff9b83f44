"""Routes of messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from service import chat_service, errors
from service.api import bodies, conditional, dependencies, live, schemas
from service.api.bodies import NDJSON, json_response
from service.api.dependencies import Chat, ConversationId, IdempotencyKey, MessageId, page_items
from service.api.problems import error_responses
from service.api.schemas import (
    AppendedConversation,
    DeleteMessagesQuery,
    HistoryQuery,
    MessageItems,
    MessageItemsPage,
    MessageOut,
    MessagePage,
    NewItems,
    NewMessage,
    NewMessages,
    PoppedItems,
    PopQuery,
    Reference,
    References,
    ViewQuery,
    WriteQuery,
)
from service.chat_service import AppendResult, PreparedBatch
from service.errors import FAULTS_MAX, Fault, InvalidRequest, Path, faults_of, json_path
from service.formats import openai_items, strict_json
from service.formats.strict_json import Json

router = APIRouter(
    prefix="/conversations/{conversation_id:id}/messages",
    tags=["messages"],
)
Write = Annotated[WriteQuery, dependencies.query(WriteQuery)]
WRITE = dependencies.query_parameters(WriteQuery, conditional.IF_MATCH_PARAMETER)
View = Annotated[ViewQuery, dependencies.query(ViewQuery)]
VIEW = dependencies.query_parameters(ViewQuery)
_Stored = MessageOut | MessagePage | MessageItemsPage | Reference | References
_Show = Callable[[Json], Json]


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
    show: _Show = _as_items if field == "items" else _as_stored
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


def _answer(appended: AppendResult, show: _Show, *, one: bool) -> Response:
    stored = list(map(show, appended.messages))
    body = stored[0] if one else {"data": stored, "has_more": False, "next": None}
    if appended.replayed:
        return json_response(body, 200, {"Idempotent-Replayed": "true"})
    return json_response(body, 201)


# -- the views of a message ------------------------------------------------------------------------


def _as_stored(message: Json) -> Json:
    return message


def _as_items(message: Json) -> Json:
    """Show a message as items: the service's own fields, and `items` in place of the caller's fields."""
    return {**schemas.service_fields(message), "items": openai_items.as_given(message)}


def _as_reference(message: Json) -> Json:
    return {"id": message["id"]}


@router.get(
    "",
    response_model=MessagePage | MessageItemsPage,
    openapi_extra=dependencies.query_parameters(
        HistoryQuery, conditional.IF_NONE_MATCH_PARAMETER, live.LAST_EVENT_ID_PARAMETER
    ),
    responses={
        200: {
            "description": "A page; with `Accept: application/x-ndjson` every message, one in each line; "
            "with `Accept: text/event-stream` what happens, as server-sent events.",
            "content": {
                NDJSON: {"schema": {"type": "string"}},
                **live.declared("message", "updated", "deleted", "head", "gone"),
            },
            "headers": conditional.ETAG_HEADER,
        },
        **conditional.NOT_MODIFIED,
        **error_responses(errors.ConversationNotFound),
    },
)
async def get_chat_history(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    query: Annotated[HistoryQuery, dependencies.query(HistoryQuery)],
) -> Response:
    """Read the history, oldest first, or follow it."""
    show = _as_items if query.view == "items" else _as_stored
    accepted = live.accepted(request)
    if accepted == live.EVENTS:
        return await live.follow_history(request, chat, conversation_id, query, show)
    _refuse_contradictions(query, accepted)
    filters = query.model_dump(exclude={"user_id", "last", "order", "view", "wait"})
    if query.wait is not None:
        page_items(request, "limit", query.limit)
        page = await chat.wait_for_messages(conversation_id, query.user_id, seconds=query.wait, **filters)
        await dependencies.require_still_admitted(request)
        return json_response(bodies.message_page(page, list(map(show, page.messages))))
    filters["order"] = query.order or "asc"
    if query.last is None and accepted == NDJSON:
        parts = chat.stream_chat_history(conversation_id, query.user_id, **filters)
        return await bodies.stream_lines(_shown(parts, show))
    page_items(request, "limit", query.limit)
    page_items(request, "last", query.last)
    if conditional.asks_if_changed(request) and accepted != NDJSON:
        version = await chat.get_version(conversation_id, query.user_id)
        if unchanged := conditional.not_modified(request, conditional.history_tag(version)):
            return unchanged
    page = await chat.get_chat_history(conversation_id, query.user_id, last=query.last, **filters)
    messages = list(map(show, page.messages))
    if accepted == NDJSON:
        return Response(bodies.lines(messages), media_type=NDJSON)
    tag = conditional.history_tag(page.version)
    return json_response(bodies.message_page(page, messages), headers={"ETag": tag})


async def _shown(parts: AsyncIterator[list[Json]], show: _Show) -> AsyncIterator[list[Json]]:
    async for part in parts:
        yield list(map(show, part))


def _refuse_contradictions(query: HistoryQuery, accepted: str) -> None:
    if query.last is not None and (query.limit is not None or query.order is not None):
        why = "asks for the newest messages, oldest first; not with limit or order"
        raise InvalidRequest.at("query.last", why)
    if query.wait is None:
        return
    if query.after is None or accepted == NDJSON:
        raise InvalidRequest.at("query.wait", "waits for messages after a seq; give `after`, and accept JSON")
    for name in ("before", "last", "order", "until"):
        if getattr(query, name) is not None:
            raise InvalidRequest.at(f"query.{name}", "cannot be combined with wait")


@router.delete(
    "",
    status_code=204,
    openapi_extra=dependencies.query_parameters(DeleteMessagesQuery, conditional.IF_MATCH_PARAMETER),
    responses=error_responses(errors.ConversationNotFound, errors.Stale),
)
async def delete_messages(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    query: Annotated[DeleteMessagesQuery, dependencies.query(DeleteMessagesQuery)],
) -> Response:
    """Delete the messages after a seq, or all messages of a conversation."""
    condition = conditional.condition(request)
    after = query.after or 0
    await chat.delete_messages(conversation_id, query.user_id, after=after, condition=condition)
    return Response(status_code=204)


@router.get(
    "/{message_id:id}",
    response_model=MessageOut | MessageItems,
    openapi_extra=VIEW,
    responses=error_responses(errors.ConversationNotFound, errors.MessageNotFound),
)
async def get_message(
    chat: Chat, conversation_id: ConversationId, message_id: MessageId, view: View
) -> Response:
    """Read one message."""
    message = await chat.get_message(conversation_id, message_id, view.user_id)
    return json_response(_as_items(message) if view.view == "items" else message)


@router.delete(
    "/{message_id:id}",
    status_code=204,
    openapi_extra=WRITE,
    responses=error_responses(errors.ConversationNotFound, errors.MessageNotFound, errors.Stale),
)
async def delete_message(
    request: Request, chat: Chat, conversation_id: ConversationId, message_id: MessageId, query: Write
) -> Response:
    """Delete one message."""
    condition = conditional.condition(request)
    await chat.delete_message(conversation_id, message_id, query.user_id, condition=condition)
    return Response(status_code=204)


pop_router = APIRouter(tags=["messages"])


@pop_router.post(
    "/conversations/{conversation_id:id}/pop",
    response_model=MessageOut | PoppedItems,
    openapi_extra=dependencies.query_parameters(PopQuery, conditional.IF_MATCH_PARAMETER),
    responses={
        204: {
            "description": "The conversation has no message, or the caller does not have the scope `read`."
        },
        **error_responses(errors.ConversationNotFound, errors.Stale),
    },
)
async def pop_message(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    view: Annotated[PopQuery, dependencies.query(PopQuery)],
) -> Response:
    """Delete the newest message and return it. Do not repeat this call: it would delete another message.

    With `as=items` the answer has the message beside its items, so that the message can be appended again.
    """
    condition = conditional.condition(request)
    message = await chat.pop_message(conversation_id, view.user_id, condition=condition)
    if message is None or not dependencies.may_read(request):
        return Response(status_code=204)
    if view.view == "items":
        return json_response({**_as_items(message), "message": message})
    return json_response(message)
