"""The routes of messages."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import errors, payloads
from service.api import bodies, needs, schemas
from service.api.needs import Chat, ConversationId, IdempotencyKey, MessageId, page_items
from service.api.problems import answers
from service.api.schemas import (
    NDJSON,
    CutQuery,
    HistoryQuery,
    MessageOut,
    MessagePage,
    NewMessage,
    NewMessages,
    OwnerQuery,
    Reference,
    References,
    json_response,
)
from service.chat_service import Appended, Batch, Json
from service.errors import Fault, InvalidRequest

router = APIRouter(
    prefix="/conversations/{conversation_id}/messages",
    tags=["messages"],
)
Owner = Annotated[OwnerQuery, needs.query(OwnerQuery)]
OWNER = needs.described(OwnerQuery)


@router.post(
    "",
    status_code=201,
    response_model=MessageOut | MessagePage | Reference | References,
    openapi_extra={
        "parameters": [*OWNER["parameters"], needs.KEY_PARAMETER],
        **bodies.described(NewMessage, NewMessages),
    },
    responses={
        200: {
            "model": MessageOut | MessagePage | Reference | References,
            "description": "An earlier request had stored this.",
            "headers": {"Idempotent-Replayed": {"schema": {"const": "true"}}},
        },
        **answers(
            errors.ConversationNotFound,
            errors.IdempotencyConflict,
            errors.BatchTooLarge,
            errors.StorageFull,
            *bodies.PROBLEMS,
        ),
    },
)
async def append(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    owner: Owner,
    key: IdempotencyKey,
) -> Response:
    """Append one message (the object), or a batch (`{"messages": [...]}`).

    Without the scope `read` the answer has the ids alone.
    """

    def made(body: Any) -> tuple[Batch, bool]:
        one = not (isinstance(body, dict) and "messages" in body and "role" not in body)
        if one:
            return chat.batch_of([body], idempotency_key=key, field=None), one
        return chat.batch_of(_batch(body), idempotency_key=key), one

    batch, one = await bodies.read(request, made)
    with needs.conflicts_for(request):
        appended = await chat.append(conversation_id, batch, owner.user_id)
    del batch  # it may be large, and so may the answer be
    shown = needs.may_read(request)
    return await payloads.beside(appended.size, lambda: _answer(appended, one=one, shown=shown))


def _batch(body: Json) -> list[Any]:
    bodies.refuse_crowded(body, NewMessages)
    if not isinstance(body["messages"], list):
        why = "must be a list of messages"
        raise InvalidRequest(f"$.messages {why}.", [Fault("$.messages", why)])
    return body["messages"]


def _answer(appended: Appended, *, one: bool, shown: bool) -> Response:
    stored = appended.messages
    if not shown:
        stored = [{"id": message["id"]} for message in stored]
    body = stored[0] if one else {"data": stored, "has_more": False, "next": None}
    if appended.replayed:
        return json_response(body, 200, {"Idempotent-Replayed": "true"})
    return json_response(body, 201)


@router.get(
    "",
    response_model=MessagePage,
    openapi_extra=needs.described(HistoryQuery),
    responses={
        200: {
            "description": "A page; with `Accept: application/x-ndjson`, every message, one a line.",
            "content": {NDJSON: {"schema": {"type": "string"}}},
        },
        **answers(errors.ConversationNotFound),
    },
)
async def history(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    query: Annotated[HistoryQuery, needs.query(HistoryQuery)],
) -> Response:
    """Read the history, oldest first."""
    _refuse_contradictions(query)
    filters = query.model_dump(exclude={"user_id", "last", "order"})
    filters["order"] = query.order or "asc"
    if query.last is None and _wants_lines(request):
        parts = chat.stream_chat_history(conversation_id, query.user_id, **filters)
        return await schemas.stream_lines(parts)
    page_items(request, "limit", query.limit)
    page_items(request, "last", query.last)
    page = await chat.get_chat_history(conversation_id, query.user_id, last=query.last, **filters)
    if _wants_lines(request):
        return Response(schemas.lines(page.messages), media_type=NDJSON)
    return json_response(schemas.message_page(page))


def _refuse_contradictions(query: HistoryQuery) -> None:
    if query.last is not None and (query.limit is not None or query.order is not None):
        why = "asks for the newest messages, oldest first; not with limit or order"
        raise InvalidRequest(f"query.last {why}.", [Fault("query.last", why)])


def _wants_lines(request: Request) -> bool:
    accepted = request.headers.get("accept", "").lower()
    return any(each.split(";")[0].strip() == NDJSON for each in accepted.split(","))


@router.delete(
    "",
    status_code=204,
    openapi_extra=needs.described(CutQuery),
    responses=answers(errors.ConversationNotFound),
)
async def cut_off(
    chat: Chat, conversation_id: ConversationId, query: Annotated[CutQuery, needs.query(CutQuery)]
) -> Response:
    """Cut off the end of a conversation after a seq, or clear it."""
    await chat.delete_messages(conversation_id, query.user_id, after=query.after or 0)
    return Response(status_code=204)


@router.get(
    "/{message_id}",
    response_model=MessageOut,
    openapi_extra=OWNER,
    responses=answers(errors.ConversationNotFound, errors.MessageNotFound),
)
async def get_message(
    chat: Chat, conversation_id: ConversationId, message_id: MessageId, owner: Owner
) -> Response:
    """Read one message."""
    return json_response(await chat.get_message(conversation_id, message_id, owner.user_id))


@router.delete(
    "/{message_id}",
    status_code=204,
    openapi_extra=OWNER,
    responses=answers(errors.ConversationNotFound, errors.MessageNotFound),
)
async def delete_message(
    chat: Chat, conversation_id: ConversationId, message_id: MessageId, owner: Owner
) -> Response:
    """Delete one message."""
    await chat.delete_message(conversation_id, message_id, owner.user_id)
    return Response(status_code=204)


pop_router = APIRouter(tags=["messages"])


@pop_router.post(
    "/conversations/{conversation_id}/pop",
    response_model=MessageOut,
    openapi_extra=OWNER,
    responses={
        204: {"description": "There is no message, or the caller has no scope `read` to be told of it."},
        **answers(errors.ConversationNotFound),
    },
)
async def pop(request: Request, chat: Chat, conversation_id: ConversationId, owner: Owner) -> Response:
    """Delete the newest message and return it. Not to be repeated: it would delete another."""
    message = await chat.pop_message(conversation_id, owner.user_id)
    if message is None or not needs.may_read(request):
        return Response(status_code=204)
    return json_response(message)
