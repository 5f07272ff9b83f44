"""Routes of conversations in OpenAI's Conversations API (docs/decisions/0005-openai-items.md).

They serve every call of `client.conversations` in the `openai` package, over the same conversations as the
native API. Beyond OpenAI's API there are up to 1,000 items in a request, `Idempotency-Key`, and a list of
conversations.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import errors
from service.api import bodies, conditional, dependencies
from service.api.bodies import json_response
from service.api.dependencies import Chat, IdempotencyKey
from service.api.openai.items import batch_of_items
from service.api.openai.schemas import (
    PREFIX,
    ConversationId,
    ConversationsQuery,
    NewOpenAIConversation,
    OpenAIConversation,
    OpenAIConversationDeleted,
    OpenAIConversationList,
    OpenAIMetadata,
    OpenAIReference,
    User,
    conversation_object,
    conversation_written,
    item_list,
    page_size,
    request_description,
)
from service.api.problems import openai_error_responses
from service.api.schemas import ExpectedQuery
from service.chat_service import ChatService, ListPosition, PreparedBatch
from service.errors import ConversationNotFound, InvalidRequest
from service.tenancy import ID_RULE, is_valid_id

router = APIRouter(prefix=PREFIX, tags=["openai"])
Expected = Annotated[ExpectedQuery, dependencies.query(ExpectedQuery)]


@router.post(
    "/conversations",
    response_model=OpenAIConversation | OpenAIReference,
    openapi_extra=request_description(body=NewOpenAIConversation, idempotency_key=True),
    responses=openai_error_responses(
        errors.IdempotencyConflict, errors.ConversationIdTaken, errors.StorageFull, *bodies.PROBLEMS
    ),
)
async def create_conversation(
    request: Request, chat: Chat, user: User, idempotency_key: IdempotencyKey
) -> Response:
    """Create a conversation with its first items, if there are any: all of it or nothing.

    With an `id` of your choice, get the owner's conversation with this id, or create it.
    """
    await dependencies.no_query(request)

    def made(value: Any) -> tuple[NewOpenAIConversation, PreparedBatch | None]:
        _refuse_native(value)
        body = bodies.checked(value, NewOpenAIConversation)
        if body.id is not None and body.items:
            raise InvalidRequest.at("$.items", _NO_ITEMS_WITH_ID)
        batch = batch_of_items(chat, body.items, idempotency_key) if body.items else None
        body.items = None
        return body, batch

    body, batch = await bodies.read(request, made)
    owner = user or _owner_in(body.metadata) or dependencies.resources(request).settings.default_user_id
    if body.id is not None:
        conversation, _ = await chat.get_or_create_conversation(owner, body.id, metadata=body.metadata)
    else:
        with dependencies.conflicts_for(request):
            conversation = await chat.start_conversation(
                owner, batch or (), metadata=body.metadata, idempotency_key=idempotency_key
            )
    dependencies.audit(request, conversation.user_id, conversation.id)
    return json_response(conversation_written(request, conversation))


# They would be appended again by a repetition, because the conversation is there then.
_NO_ITEMS_WITH_ID = "cannot be created together with an id of your own; append them in a call of their own"


def _refuse_native(value: Any) -> None:
    """Refuse the body of the native API with a fault that says where the native API is."""
    if isinstance(value, dict) and "user_id" in value:
        why = "is of the native API, whose base URL has no `/v1`; here the header X-User-Id has the owner"
        raise InvalidRequest.at("$.user_id", why)


def _owner_in(metadata: dict[str, str] | None) -> str | None:
    owner = (metadata or {}).get("user")
    if owner is not None and not is_valid_id(owner):
        raise InvalidRequest.at("$.metadata.user", f"names the owner, and {ID_RULE}")
    return owner


@router.get(
    "/conversations",
    response_model=OpenAIConversationList,
    openapi_extra=request_description(ConversationsQuery),
    responses=openai_error_responses(errors.ConversationNotFound),
)
async def list_conversations(
    request: Request,
    chat: Chat,
    user: User,
    query: Annotated[ConversationsQuery, dependencies.query(ConversationsQuery)],
) -> Response:
    """List a user's conversations, latest activity first (OpenAI has no such call)."""
    owner = query.user or user or dependencies.resources(request).settings.default_user_id
    if user is not None and owner != user:
        raise ConversationNotFound(
            "The parameter `user` names another user than the header `X-User-Id`. Send one of the two."
        )
    dependencies.audit(request, owner)
    after = await _position(chat, query.after, owner) if query.after is not None else None
    page = await chat.list_conversations(owner, limit=max(1, page_size(request, query.limit)), after=after)
    shown = page.conversations[: query.limit]
    answer = item_list(
        list(map(conversation_object, shown)), has_more=page.has_more or len(page.conversations) > len(shown)
    )
    if query.limit and page.boundary is not None:
        # The end of the page, which may lie behind a malformed conversation that is left out.
        answer["last_id"] = bodies.cursor(page.boundary)
    return json_response(answer)


async def _position(chat: ChatService, after: str, owner: str) -> ListPosition:
    """Decode the `last_id` of a page, or return the present position of the conversation with this id."""
    try:
        return bodies.position(after)
    except InvalidRequest:
        if not is_valid_id(after):
            raise InvalidRequest.at(
                "query.after", "is neither the last_id of a page nor the id of a conversation"
            ) from None
    return await chat.get_list_position(after, owner)


@router.get(
    "/conversations/{conversation_id:id}",
    response_model=OpenAIConversation,
    openapi_extra=request_description(),
    responses={
        200: {"headers": conditional.ETAG_HEADER},
        **openai_error_responses(errors.ConversationNotFound),
    },
)
async def retrieve_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, user: User
) -> Response:
    """Retrieve a conversation. `If-Match` of a later write takes the `ETag` of the answer."""
    await dependencies.no_query(request)
    conversation = await chat.get_conversation(conversation_id, user)
    tag = conditional.conversation_tag(conversation)
    return json_response(conversation_object(conversation), headers={"ETag": tag})


@router.post(
    "/conversations/{conversation_id:id}",
    response_model=OpenAIConversation | OpenAIReference,
    openapi_extra=request_description(ExpectedQuery, body=OpenAIMetadata, write=True),
    responses=openai_error_responses(
        errors.ConversationNotFound, errors.Stale, errors.StorageFull, *bodies.PROBLEMS
    ),
)
async def update_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, user: User, _query: Expected
) -> Response:
    """Replace the whole metadata."""
    condition = conditional.condition(request)
    body = await bodies.read_small(request, OpenAIMetadata)
    changed = await chat.update_conversation(
        conversation_id, user, metadata=body.metadata, condition=condition
    )
    return json_response(conversation_written(request, changed))


@router.delete(
    "/conversations/{conversation_id:id}",
    response_model=OpenAIConversationDeleted,
    openapi_extra=request_description(ExpectedQuery, write=True),
    responses=openai_error_responses(errors.ConversationNotFound, errors.Stale),
)
async def delete_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, user: User, _query: Expected
) -> Response:
    """Delete a conversation with all its items. OpenAI's own service keeps the items."""
    condition = conditional.condition(request)
    await chat.delete_conversation(conversation_id, user, condition=condition)
    return json_response({"id": conversation_id, "object": "conversation.deleted", "deleted": True})
