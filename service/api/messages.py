"""Routes of messages, but for appending and replacing them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import chat_service, errors
from service.api import bodies, conditional, dependencies, live, schemas
from service.api.bodies import NDJSON, json_response
from service.api.dependencies import Chat, ConversationId, MessageId, page_items
from service.api.problems import error_responses
from service.api.schemas import (
    DeleteMessagesQuery,
    HistoryQuery,
    MessageItems,
    MessageItemsPage,
    MessageOut,
    MessagePage,
    PoppedItems,
    PopQuery,
    ViewQuery,
    WriteQuery,
)
from service.errors import InvalidRequest
from service.formats import openai_items
from service.formats.json_answers import dumps
from service.formats.strict_json import Json

router = APIRouter(
    prefix="/conversations/{conversation_id:id}/messages",
    tags=["messages"],
)
Write = Annotated[WriteQuery, dependencies.query(WriteQuery)]
WRITE = dependencies.query_parameters(WriteQuery, conditional.IF_MATCH_PARAMETER)
View = Annotated[ViewQuery, dependencies.query(ViewQuery)]
VIEW = dependencies.query_parameters(ViewQuery)
Show = Callable[[Json], Json]


# -- the views of a message ------------------------------------------------------------------------


def as_stored(message: Json) -> Json:
    """Show a message as it is stored."""
    return message


def as_items(message: Json) -> Json:
    """Show a message as items: the service's own fields, and `items` in place of the caller's fields."""
    return {**schemas.service_fields(message), "items": openai_items.as_given(message)}


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
    show = as_items if query.view == "items" else as_stored
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
    encoded = await _encoded_page(chat, conversation_id, query, filters)
    if accepted == NDJSON:
        return Response(b"".join(each + b"\n" for each in encoded.messages), media_type=NDJSON)
    headers = {"ETag": conditional.history_tag(encoded.version)}
    return bodies.encoded_response(bodies.encoded_page(encoded), headers=headers)


async def _encoded_page(
    chat: Chat, conversation_id: str, query: HistoryQuery, filters: dict[str, Any]
) -> chat_service.MessagePage[bytes]:
    if query.view != "items":
        return await chat.get_encoded_history(conversation_id, query.user_id, last=query.last, **filters)
    found = await chat.get_chat_history(conversation_id, query.user_id, last=query.last, **filters)
    messages = [dumps(as_items(each)) for each in found.messages]
    return chat_service.MessagePage(messages, found.has_more, found.boundary_seq, found.version)


async def _shown(parts: AsyncIterator[list[Json]], show: Show) -> AsyncIterator[list[Json]]:
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
    return json_response(as_items(message) if view.view == "items" else message)


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
        return json_response({**as_items(message), "message": message})
    return json_response(message)
