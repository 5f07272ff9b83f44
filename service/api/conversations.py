"""The routes of conversations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service import errors
from service.api import bodies, needs, schemas
from service.api.needs import Chat, ConversationId, no_query, page_items
from service.api.problems import answers
from service.api.schemas import (
    ConversationChanges,
    ConversationOut,
    ConversationPage,
    ListQuery,
    NewConversation,
    OwnerQuery,
    Reference,
    json_response,
)
from service.chat_service import UNSET

router = APIRouter(tags=["conversations"])
Owner = Annotated[OwnerQuery, needs.query(OwnerQuery)]
OWNER = needs.described(OwnerQuery)


@router.post(
    "/conversations",
    status_code=201,
    dependencies=[Depends(no_query)],
    response_model=ConversationOut,
    openapi_extra=bodies.described(NewConversation),
    responses={
        200: {
            "model": ConversationOut | Reference,
            "description": "The one that this user has under this id; its id alone without the scope `read`.",
        },
        201: {"headers": {"Location": {"schema": {"type": "string"}}}},
        **answers(errors.ConversationIdTaken, errors.StorageFull, *bodies.PROBLEMS),
    },
)
async def create_conversation(request: Request, chat: Chat) -> Response:
    """Get or create a conversation."""
    body = await bodies.read_small(request, NewConversation)
    conversation, created = await chat.get_or_create_conversation(
        body.user_id, body.id, title=body.title, metadata=body.metadata, expires_at=body.expires_at
    )
    request.state.audited = {"conversation_id": conversation.id, "user_id": conversation.user_id}
    headers = {"Location": f"/conversations/{conversation.id}"} if created else {}
    if not created and not needs.may_read(request):
        return json_response({"id": conversation.id})
    return json_response(schemas.conversation_out(conversation), 201 if created else 200, headers)


@router.get(
    "/conversations",
    response_model=ConversationPage,
    openapi_extra=needs.described(ListQuery),
    responses=answers(),
)
async def list_conversations(
    request: Request, chat: Chat, query: Annotated[ListQuery, needs.query(ListQuery)]
) -> Response:
    """List a user's conversations, latest activity first."""
    page_items(request, "limit", query.limit)
    after = schemas.position(query.cursor) if query.cursor is not None else None
    request.state.audited = {"user_id": query.user_id}
    page = await chat.list_conversations(query.user_id, limit=query.limit, after=after)
    return json_response(schemas.conversation_page(page))


@router.get(
    "/conversations/{conversation_id}",
    response_model=ConversationOut,
    openapi_extra=OWNER,
    responses=answers(errors.ConversationNotFound),
)
async def get_conversation(chat: Chat, conversation_id: ConversationId, owner: Owner) -> Response:
    """Read a conversation."""
    found = await chat.get_conversation(conversation_id, owner.user_id)
    return json_response(schemas.conversation_out(found))


@router.patch(
    "/conversations/{conversation_id}",
    response_model=ConversationOut | Reference,
    openapi_extra={**OWNER, **bodies.described(ConversationChanges)},
    responses=answers(errors.ConversationNotFound, errors.StorageFull, *bodies.PROBLEMS),
)
async def update_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, owner: Owner
) -> Response:
    """Change the title, or the metadata as a whole. Without the scope `read` the answer is the id alone."""
    body = await bodies.read_small(request, ConversationChanges)
    given = body.model_fields_set
    changed = await chat.update_conversation(
        conversation_id,
        owner.user_id,
        title=body.title if "title" in given else UNSET,
        metadata=body.metadata if "metadata" in given else UNSET,
        expires_at=body.expires_at if "expires_at" in given else UNSET,
    )
    shown = schemas.conversation_out(changed) if needs.may_read(request) else {"id": changed.id}
    return json_response(shown)


@router.delete(
    "/conversations/{conversation_id}",
    status_code=204,
    openapi_extra=OWNER,
    responses=answers(errors.ConversationNotFound),
)
async def delete_conversation(chat: Chat, conversation_id: ConversationId, owner: Owner) -> Response:
    """Delete a conversation with all its messages."""
    await chat.delete_conversation(conversation_id, owner.user_id)
    return Response(status_code=204)
