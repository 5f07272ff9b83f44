"""Routes of conversations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service import errors
from service.api import bodies, conditional, dependencies, paths
from service.api.bodies import json_response
from service.api.dependencies import Chat, ConversationId, no_query, page_items
from service.api.problems import error_responses
from service.api.schemas import (
    ConversationChanges,
    ConversationOut,
    ConversationPage,
    ListQuery,
    NewConversation,
    OwnerQuery,
    Reference,
    WriteQuery,
)
from service.chat_service import UNSET

router = APIRouter(tags=["conversations"])
Owner = Annotated[OwnerQuery, dependencies.query(OwnerQuery)]
Write = Annotated[WriteQuery, dependencies.query(WriteQuery)]
WRITE = dependencies.query_parameters(WriteQuery, conditional.IF_MATCH_PARAMETER)


@router.post(
    "/conversations",
    status_code=201,
    dependencies=[Depends(no_query)],
    response_model=ConversationOut,
    openapi_extra=bodies.request_body_schema(NewConversation),
    responses={
        200: {
            "model": ConversationOut | Reference,
            "description": "The user's existing conversation with this id; without the scope `read` the id.",
        },
        201: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **error_responses(errors.ConversationIdTaken, errors.StorageFull, *bodies.PROBLEMS),
    },
)
async def create_conversation(request: Request, chat: Chat) -> Response:
    """Get or create a conversation."""
    body = await bodies.read_small(request, NewConversation)
    conversation, created = await chat.get_or_create_conversation(
        body.user_id, body.id, title=body.title, metadata=body.metadata, expires_at=body.expires_at
    )
    dependencies.audit(request, conversation.user_id, conversation.id)
    headers = {"Location": f"/conversations/{paths.encoded(conversation.id)}"} if created else {}
    if not created and not dependencies.may_read(request):
        return json_response({"id": conversation.id})
    return bodies.encoded_response(conversation.json, 201 if created else 200, headers)


@router.get(
    "/conversations",
    response_model=ConversationPage,
    openapi_extra=dependencies.query_parameters(ListQuery),
    responses=error_responses(),
)
async def list_conversations(
    request: Request, chat: Chat, query: Annotated[ListQuery, dependencies.query(ListQuery)]
) -> Response:
    """List a user's conversations, latest activity first; without `user_id` those of all users.

    The list of all users is for keys with the scope `admin`, and for everybody where there is no
    authentication. It costs as much as there are conversations.
    """
    if query.user_id is None:
        dependencies.require_admin(request)
    page_items(request, "limit", query.limit)
    after = bodies.position(query.cursor) if query.cursor is not None else None
    if query.user_id is not None:
        dependencies.audit(request, query.user_id)
    page = await chat.list_conversations(query.user_id, limit=query.limit, after=after)
    return bodies.encoded_response(bodies.conversation_page(page))


@router.get(
    "/conversations/{conversation_id:id}",
    response_model=ConversationOut,
    openapi_extra=dependencies.query_parameters(OwnerQuery, conditional.IF_NONE_MATCH_PARAMETER),
    responses={
        200: {"headers": conditional.ETAG_HEADER},
        **conditional.NOT_MODIFIED,
        **error_responses(errors.ConversationNotFound),
    },
)
async def get_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, owner: Owner
) -> Response:
    """Read a conversation."""
    conversation = await chat.get_conversation(conversation_id, owner.user_id)
    tag = conditional.conversation_tag(conversation)
    unchanged = conditional.not_modified(request, tag)
    return unchanged or bodies.encoded_response(conversation.json, headers={"ETag": tag})


@router.patch(
    "/conversations/{conversation_id:id}",
    response_model=ConversationOut | Reference,
    openapi_extra={**WRITE, **bodies.request_body_schema(ConversationChanges)},
    responses=error_responses(
        errors.ConversationNotFound, errors.Stale, errors.StorageFull, *bodies.PROBLEMS
    ),
)
async def update_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, query: Write
) -> Response:
    """Change the title, the expiry, or the whole metadata. Without the scope `read` the answer is the id."""
    body = await bodies.read_small(request, ConversationChanges)
    given = body.model_fields_set
    changed = await chat.update_conversation(
        conversation_id,
        query.user_id,
        title=body.title if "title" in given else UNSET,
        metadata=body.metadata if "metadata" in given else UNSET,
        expires_at=body.expires_at if "expires_at" in given else UNSET,
        condition=conditional.condition(request),
    )
    if not dependencies.may_read(request):
        return json_response({"id": changed.id})
    return bodies.encoded_response(changed.json)


@router.delete(
    "/conversations/{conversation_id:id}",
    status_code=204,
    openapi_extra=WRITE,
    responses=error_responses(errors.ConversationNotFound, errors.Stale),
)
async def delete_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, query: Write
) -> Response:
    """Delete a conversation with all its messages."""
    condition = conditional.condition(request)
    await chat.delete_conversation(conversation_id, query.user_id, condition=condition)
    return Response(status_code=204)
