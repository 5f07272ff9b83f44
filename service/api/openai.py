"""The OpenAI Conversations API, over the same conversations (docs/decisions/0005-openai-items.md).

What is served is what the `openai` package's `client.conversations` asks for; beyond OpenAI there are up to
1,000 items a request, `Idempotency-Key`, and the list of conversations.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service import errors, openai_items, payloads
from service.api import bodies, needs, schemas
from service.api.needs import Chat, IdempotencyKey
from service.api.openai_schemas import (
    ConversationsQuery,
    ItemQuery,
    ItemsQuery,
    NewOpenAIConversation,
    NewOpenAIItems,
    OpenAIConversation,
    OpenAIConversationDeleted,
    OpenAIConversationList,
    OpenAIItem,
    OpenAIItemList,
    OpenAIMetadata,
    OpenAIReference,
)
from service.api.problems import openai_answers
from service.api.schemas import json_response
from service.chat_service import Appended, Batch, ChatService, Json, ListPosition, is_id
from service.documents import Conversation
from service.errors import ConversationNotFound, Fault, InvalidRequest, MessageNotFound

PREFIX = "/v1"
_USER_HEADER = "X-User-Id"
_PART_BYTES = 64
_INCLUDED = frozenset({"include", "include[]"})  # all that is stored is always included
USER_PARAMETER = {
    "name": _USER_HEADER,
    "in": "header",
    "required": False,
    "description": "The owner: of a new conversation, and then of any that is asked for.",
    "schema": schemas.ID_SCHEMA,
}
router = APIRouter(prefix=PREFIX, tags=["openai"])


# -- what they need of a request -------------------------------------------------------------------


async def _conversation_id(conversation_id: str) -> str:
    """Take an id from the path; one that no conversation can have is one that there is not."""
    if not is_id(conversation_id):
        raise ConversationNotFound("There is no conversation with this id.")
    return conversation_id


async def _item_id(item_id: str) -> str:
    if not is_id(openai_items.message_id(item_id)):
        raise MessageNotFound("There is no item with this id in this conversation.")
    return item_id


async def _user(request: Request) -> str | None:
    given = request.headers.getlist(_USER_HEADER)
    if given and (len(given) > 1 or not is_id(given[0])):
        raise _invalid(_USER_HEADER, "must be one user id: 1 to 128 of letters, digits and . _ : @ ~ -")
    return given[0] if given else None


def _invalid(place: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{place} {why}.", [Fault(place, why)])


ConversationId = Annotated[str, Depends(_conversation_id)]
ItemId = Annotated[str, Depends(_item_id)]
User = Annotated[str | None, Depends(_user)]


def _described(*models: Any, body: Any = None, key: bool = False) -> dict[str, Any]:
    """Declare what FastAPI does not know of: the query, the headers, and the body."""
    parameters = [each for model in models for each in needs.described(model)["parameters"]]
    parameters += [USER_PARAMETER, *([needs.KEY_PARAMETER] if key else [])]
    return {"parameters": parameters, **(bodies.described(body) if body else {})}


# -- conversations ---------------------------------------------------------------------------------


@router.post(
    "/conversations",
    response_model=OpenAIConversation | OpenAIReference,
    openapi_extra=_described(body=NewOpenAIConversation, key=True),
    responses=openai_answers(errors.IdempotencyConflict, errors.StorageFull, *bodies.PROBLEMS),
)
async def create_conversation(request: Request, chat: Chat, user: User, key: IdempotencyKey) -> Response:
    """Create a conversation, with its first items if there are any: all of it, or nothing."""
    await needs.no_query(request)

    def made(value: Any) -> tuple[NewOpenAIConversation, Batch | None]:
        body = bodies.checked(value, NewOpenAIConversation)
        batch = _batch(chat, body.items, key) if body.items else None
        body.items = None
        return body, batch

    body, batch = await bodies.read(request, made)
    owner = user or _owner_in(body.metadata) or request.app.state.settings.default_user_id
    with needs.conflicts_for(request):
        conversation = await chat.start_conversation(
            owner, batch=batch, metadata=body.metadata, idempotency_key=key
        )
    request.state.audited = {"conversation_id": conversation.id, "user_id": conversation.user_id}
    return json_response(_written(request, conversation))


def _owner_in(metadata: dict[str, str] | None) -> str | None:
    owner = (metadata or {}).get("user")
    if owner is not None and not is_id(owner):
        raise _invalid(
            "$.metadata.user", "names the owner, and must be 1 to 128 of letters, digits and . _ : @ ~ -"
        )
    return owner


@router.get(
    "/conversations",
    response_model=OpenAIConversationList,
    openapi_extra=_described(ConversationsQuery),
    responses=openai_answers(errors.ConversationNotFound),
)
async def list_conversations(
    request: Request,
    chat: Chat,
    user: User,
    query: Annotated[ConversationsQuery, needs.query(ConversationsQuery)],
) -> Response:
    """List a user's conversations, latest activity first (OpenAI has no such call)."""
    owner = query.user or user or request.app.state.settings.default_user_id
    if user is not None and owner != user:
        raise ConversationNotFound("There are no conversations of another user.")
    request.state.audited = {"user_id": owner}
    after = await _position(chat, query.after, owner) if query.after is not None else None
    page = await chat.list_conversations(owner, limit=max(1, _page(request, query.limit)), after=after)
    shown = page.conversations[: query.limit]
    answer = _list(
        list(map(_conversation, shown)), has_more=page.has_more or len(page.conversations) > len(shown)
    )
    if query.limit and page.edge is not None:
        # Where the page ends, which may be behind a conversation that cannot be shown.
        answer["last_id"] = schemas.cursor(page.edge)
    return json_response(answer)


async def _position(chat: ChatService, after: str, owner: str) -> ListPosition:
    """Read the `last_id` of a page, or look up where the conversation with this id stands now."""
    try:
        return schemas.position(after)
    except InvalidRequest:
        if not is_id(after):
            raise _invalid(
                "query.after", "is neither the last_id of a page nor the id of a conversation"
            ) from None
    found = await chat.get_conversation(after, owner)
    return ListPosition(found.updated_at, found.id)


def _page(request: Request, limit: int) -> int:
    most: int = request.app.state.settings.page_items_max
    return min(limit, most)


@router.get(
    "/conversations/{conversation_id}",
    response_model=OpenAIConversation,
    openapi_extra=_described(),
    responses=openai_answers(errors.ConversationNotFound),
)
async def retrieve_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, user: User
) -> Response:
    """Retrieve a conversation."""
    await needs.no_query(request)
    return json_response(_conversation(await chat.get_conversation(conversation_id, user)))


@router.post(
    "/conversations/{conversation_id}",
    response_model=OpenAIConversation | OpenAIReference,
    openapi_extra=_described(body=OpenAIMetadata),
    responses=openai_answers(errors.ConversationNotFound, errors.StorageFull, *bodies.PROBLEMS),
)
async def update_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, user: User
) -> Response:
    """Replace the metadata as a whole."""
    await needs.no_query(request)
    body = await bodies.read_small(request, OpenAIMetadata)
    changed = await chat.update_conversation(conversation_id, user, metadata=body.metadata)
    return json_response(_written(request, changed))


@router.delete(
    "/conversations/{conversation_id}",
    response_model=OpenAIConversationDeleted,
    openapi_extra=_described(),
    responses=openai_answers(errors.ConversationNotFound),
)
async def delete_conversation(
    request: Request, chat: Chat, conversation_id: ConversationId, user: User
) -> Response:
    """Delete a conversation with all its items (which OpenAI says that it keeps)."""
    await needs.no_query(request)
    await chat.delete_conversation(conversation_id, user)
    return json_response({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


# -- items -----------------------------------------------------------------------------------------


@router.post(
    "/conversations/{conversation_id}/items",
    response_model=OpenAIItemList,
    openapi_extra=_described(ItemQuery, body=NewOpenAIItems, key=True),
    responses=openai_answers(
        errors.ConversationNotFound,
        errors.IdempotencyConflict,
        errors.BatchTooLarge,
        errors.StorageFull,
        *bodies.PROBLEMS,
    ),
)
async def create_items(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    user: User,
    _query: Annotated[ItemQuery, needs.query(ItemQuery, ignored=_INCLUDED)],
    key: IdempotencyKey,
) -> Response:
    """Append items, all of them or none, and return them as they are stored."""

    def made(value: Any) -> Batch:
        return _batch(chat, bodies.checked(value, NewOpenAIItems).items, key)

    batch = await bodies.read(request, made)
    with needs.conflicts_for(request):
        appended = await chat.append(conversation_id, batch, user)
    del batch  # it may be large, and so may the answer be
    shown = needs.may_read(request)
    return await payloads.beside(appended.size, lambda: _items(appended, shown=shown))


def _items(appended: Appended, *, shown: bool) -> Response:
    stored = [item for message in appended.messages for item in openai_items.items_of(message)]
    if not shown:
        stored = [{"id": item["id"], "type": item["type"]} for item in stored]
    headers = {"Idempotent-Replayed": "true"} if appended.replayed else {}
    return json_response(_list(stored, has_more=False), headers=headers)


def _batch(chat: ChatService, items: list[Json], key: str | None) -> Batch:
    prefixes = list(map(openai_items.id_prefix, items))
    return chat.batch_of(_messages(items), idempotency_key=key, prefixes=prefixes, field="items")


def _messages(items: list[Json]) -> list[Json]:
    """Turn items into messages. Raises InvalidRequest, with the place in the request, for what is none."""
    found = (fault for index, item in enumerate(items) for fault in _faults(item, ("items", index)))
    if faults := list(islice(found, errors.FAULTS_MAX + 1)):
        raise InvalidRequest(f"{faults[0].path} {faults[0].message}.", faults)
    messages = []
    for item in items:
        own_id = {} if item.get("id") is None else {"id": item["id"]}
        messages.append({**own_id, **openai_items.message_of(openai_items.completed(item))})
    return messages


def _faults(item: Any, at: payloads.Path) -> list[Fault]:
    kind = openai_items.kind(item)
    wrong: dict[str, str] = {}
    if not isinstance(kind, str):
        wrong["type"] = "must be a string (and may be left out of a message, which has a role)"
    if kind == "message":
        if not isinstance(item.get("role"), str):
            wrong["role"] = "must be a string"
        if not isinstance(item.get("content"), str | list | None):
            wrong["content"] = "must be a string or a list of parts"
    if item.get("id") is not None and not is_id(item["id"]):
        wrong["id"] = "must be 1 to 128 of letters, digits and . _ : @ ~ -"
    return [Fault(payloads.json_path((*at, name)), why) for name, why in wrong.items()]


@router.get(
    "/conversations/{conversation_id}/items",
    response_model=OpenAIItemList,
    openapi_extra=_described(ItemsQuery),
    responses=openai_answers(errors.ConversationNotFound, errors.MessageNotFound),
)
async def list_items(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    user: User,
    query: Annotated[ItemsQuery, needs.query(ItemsQuery, ignored=_INCLUDED)],
) -> Response:
    """List items, newest first unless `order=asc`. A page may end, and the next begin, inside a message."""
    backwards = query.order == "desc"
    behind: list[Json] = []
    edge: dict[str, Any] = {}
    if query.after is not None:
        behind = [await _message(chat, conversation_id, query.after, user)]
        edge = {"before" if backwards else "after": behind[0]["seq"]}
    # A message is at least one item, so one more than the limit is enough to know whether more follow.
    page = await chat.get_chat_history(
        conversation_id, user, limit=_page(request, query.limit + 1), order=query.order, **edge
    )

    def listed() -> Response:
        found: list[Json] = []
        if query.after is not None:
            found += _beyond(openai_items.items_of(behind[0]), query.after, backwards)
        for message in page.messages:
            items = openai_items.items_of(message)
            found += reversed(items) if backwards else items
        shown = found[: query.limit]
        return json_response(_list(shown, has_more=page.has_more or len(found) > len(shown)))

    return await payloads.beside(_size([*behind, *page.messages]), listed)


def _size(messages: list[Json]) -> int:
    """Return about how much work it is to read these messages as items: a part or a call is so many bytes."""
    lists = (message.get(name) for message in messages for name in ("content", "tool_calls"))
    return sum(len(each) * _PART_BYTES for each in lists if isinstance(each, list))


def _beyond(items: list[Json], item_id: str, backwards: bool) -> list[Json]:
    """Return the items of one message that come after one of them, in the order of the list."""
    ordered = items[::-1] if backwards else items
    places = [place for place, item in enumerate(ordered) if item["id"] == item_id]
    if not places:
        raise MessageNotFound("There is no item with this id in this conversation.")
    return ordered[places[0] + 1 :]


async def _message(chat: ChatService, conversation_id: str, item_id: str, user: str | None) -> Json:
    """Return the message that an item is, or is a part of."""
    return await chat.get_message(conversation_id, openai_items.message_id(item_id), user)


@router.get(
    "/conversations/{conversation_id}/items/{item_id}",
    response_model=OpenAIItem,
    openapi_extra=_described(ItemQuery),
    responses=openai_answers(errors.ConversationNotFound, errors.MessageNotFound),
)
async def retrieve_item(
    chat: Chat,
    conversation_id: ConversationId,
    item_id: ItemId,
    user: User,
    _query: Annotated[ItemQuery, needs.query(ItemQuery, ignored=_INCLUDED)],
) -> Response:
    """Retrieve an item."""
    message = await _message(chat, conversation_id, item_id, user)

    def retrieved() -> Response:
        found = next((each for each in openai_items.items_of(message) if each["id"] == item_id), None)
        if found is None:
            raise MessageNotFound("There is no item with this id in this conversation.")
        return json_response(found)

    return await payloads.beside(_size([message]), retrieved)


@router.delete(
    "/conversations/{conversation_id}/items/{item_id}",
    response_model=OpenAIConversation | OpenAIReference,
    openapi_extra=_described(),
    responses=openai_answers(errors.ConversationNotFound, errors.MessageNotFound),
)
async def delete_item(
    request: Request, chat: Chat, conversation_id: ConversationId, item_id: ItemId, user: User
) -> Response:
    """Delete an item, and return the conversation.

    An item that is one of several of a native message is not deleted: that would change the message, or
    delete more than was asked for.
    """
    await needs.no_query(request)
    message = await _message(chat, conversation_id, item_id, user)
    items = await payloads.beside(_size([message]), lambda: openai_items.items_of(message))
    if item_id not in {item["id"] for item in items}:
        raise MessageNotFound("There is no item with this id in this conversation.")
    if len(items) > 1:
        why = "is a part of a message of several items, which can only be deleted as a message"
        raise _invalid("path.item_id", why)
    await chat.delete_message(conversation_id, item_id, user)
    return json_response(_written(request, await chat.get_conversation(conversation_id, user)))


# -- answers ---------------------------------------------------------------------------------------


def _conversation(conversation: Conversation) -> Json:
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created_at.timestamp()),
        "metadata": conversation.metadata,
    }


def _written(request: Request, conversation: Conversation) -> Json:
    """Answer a write, with the id alone for a caller without the scope `read`."""
    if needs.may_read(request):
        return _conversation(conversation)
    return {"id": conversation.id, "object": "conversation"}


def _list(data: list[Json], *, has_more: bool) -> Json:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
