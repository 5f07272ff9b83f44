"""Routes of items below `/v1`. A stored message is one item, or several."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service import errors
from service.api import bodies, conditional, dependencies
from service.api.bodies import json_response
from service.api.dependencies import Chat, IdempotencyKey
from service.api.openai.schemas import (
    PREFIX,
    ConversationId,
    ItemQuery,
    ItemsQuery,
    NewItemsQuery,
    NewOpenAIItems,
    OpenAIConversation,
    OpenAIItem,
    OpenAIItemList,
    OpenAIReference,
    User,
    conversation_written,
    item_list,
    page_size,
    request_description,
)
from service.api.problems import openai_error_responses
from service.api.schemas import ExpectedQuery
from service.chat_service import AppendResult, ChatService, NewMessage, PreparedBatch
from service.errors import Fault, InvalidRequest, MessageNotFound, Path, json_path
from service.formats import openai_items, strict_json
from service.formats.strict_json import Json
from service.tenancy import ID_RULE, is_valid_id

router = APIRouter(prefix=PREFIX, tags=["openai"])
# The work for one part of a message, in bytes, roughly.
_PART_BYTES = 64
_INCLUDED = frozenset(
    {"include", "include[]"}
)  # accepted and ignored, because everything that is stored is always included


async def _item_id(item_id: str) -> str:
    if not is_valid_id(openai_items.message_id(item_id)):
        raise MessageNotFound("There is no item with this id in this conversation.")
    return item_id


ItemId = Annotated[str, Depends(_item_id)]


@router.post(
    "/conversations/{conversation_id:id}/items",
    response_model=OpenAIItemList,
    openapi_extra=request_description(NewItemsQuery, body=NewOpenAIItems, idempotency_key=True, write=True),
    responses=openai_error_responses(
        errors.ConversationNotFound,
        errors.IdempotencyConflict,
        errors.Stale,
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
    _query: Annotated[NewItemsQuery, dependencies.query(NewItemsQuery, ignored=_INCLUDED)],
    idempotency_key: IdempotencyKey,
) -> Response:
    """Append items, all of them or none, and return them as they are stored."""

    def made(value: Any) -> PreparedBatch:
        return batch_of_items(chat, bodies.checked(value, NewOpenAIItems).items, idempotency_key)

    condition = conditional.condition(request)
    batch = await bodies.read(request, made)
    with dependencies.conflicts_for(request):
        appended = await chat.add_messages(conversation_id, batch, user, condition=condition)
    del batch  # frees its memory before the answer, which may be as large, is made
    shown = dependencies.may_read(request)
    return await strict_json.beside(appended.size, lambda: _items(appended, shown=shown))


def _items(appended: AppendResult, *, shown: bool) -> Response:
    stored = [item for message in appended.messages for item in openai_items.items_of(message)]
    if not shown:
        stored = [{"id": item["id"], "type": item["type"]} for item in stored]
    headers = {"Idempotent-Replayed": "true"} if appended.replayed else {}
    return json_response(item_list(stored, has_more=False), headers=headers)


def batch_of_items(chat: ChatService, items: list[Json], idempotency_key: str | None) -> PreparedBatch:
    """Check items and encode them as messages. Raises InvalidRequest with the places of faults."""
    return chat.prepare(_messages(items), idempotency_key=idempotency_key, field="items")


def _messages(items: list[Json]) -> list[NewMessage]:
    """Turn items into messages. Raises InvalidRequest with the places of faults."""
    faults = (fault for index, item in enumerate(items) for fault in _faults(item, ("items", index)))
    if first_faults := list(islice(faults, errors.FAULTS_MAX + 1)):
        raise InvalidRequest.of(first_faults)
    messages = []
    for item in items:
        own_id = {} if item.get("id") is None else {"id": item["id"]}
        fields = {**own_id, **openai_items.message_of(openai_items.completed(item))}
        messages.append(NewMessage(fields, openai_items.id_prefix(item)))
    return messages


def _faults(item: Any, at: Path) -> list[Fault]:
    kind = openai_items.kind(item)
    wrong: dict[str, str] = {}
    if not isinstance(kind, str):
        wrong["type"] = "must be a string (and may be left out of a message, which has a role)"
    wrong |= openai_items.message_faults(item)
    if item.get("id") is not None and not is_valid_id(item["id"]):
        wrong["id"] = ID_RULE
    elif item.get("id") is not None and openai_items.looks_like_part(item["id"]):
        wrong["id"] = "must not end in two commas and a number, which is how a part of a message is named"
    return [Fault(json_path((*at, name)), why) for name, why in wrong.items()]


@router.get(
    "/conversations/{conversation_id:id}/items",
    response_model=OpenAIItemList,
    openapi_extra=request_description(ItemsQuery),
    responses=openai_error_responses(errors.ConversationNotFound, errors.MessageNotFound),
)
async def list_items(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    user: User,
    query: Annotated[ItemsQuery, dependencies.query(ItemsQuery, ignored=_INCLUDED)],
) -> Response:
    """List items, newest first unless `order=asc`. A page may end, and the next begin, inside a message."""
    backwards = query.order == "desc"
    behind: list[Json] = []
    edge: dict[str, Any] = {}
    if query.after is not None:
        behind = [await _message(chat, conversation_id, query.after, user)]
        edge = {"before" if backwards else "after": behind[0]["seq"]}
    # A message is at least one item, so one message more than the limit tells whether more items follow.
    page = await chat.get_chat_history(
        conversation_id, user, limit=page_size(request, query.limit + 1), order=query.order, **edge
    )

    def listed() -> Response:
        listed_items: list[Json] = []
        if query.after is not None:
            listed_items += _beyond(openai_items.items_of(behind[0]), query.after, backwards)
        for message in page.messages:
            items = openai_items.items_of(message)
            listed_items += reversed(items) if backwards else items
        shown = listed_items[: query.limit]
        return json_response(item_list(shown, has_more=page.has_more or len(listed_items) > len(shown)))

    return await strict_json.beside(_size([*behind, *page.messages]), listed)


def _size(messages: list[Json]) -> int:
    """Estimate the work of reading these messages as items, in bytes: each part or call is `_PART_BYTES`."""
    lists = (message.get(name) for message in messages for name in ("content", "tool_calls"))
    return sum(len(each) * _PART_BYTES for each in lists if isinstance(each, list))


def _beyond(items: list[Json], item_id: str, backwards: bool) -> list[Json]:
    """Return the items of a message that follow the item with this id, in the order of the list."""
    ordered = items[::-1] if backwards else items
    places = [place for place, item in enumerate(ordered) if item["id"] == item_id]
    if not places:
        raise MessageNotFound("There is no item with this id in this conversation.")
    return ordered[places[0] + 1 :]


async def _message(chat: ChatService, conversation_id: str, item_id: str, user: str | None) -> Json:
    """Return the message that has this item."""
    return await chat.get_message(conversation_id, openai_items.message_id(item_id), user)


@router.get(
    "/conversations/{conversation_id:id}/items/{item_id:id}",
    response_model=OpenAIItem,
    openapi_extra=request_description(ItemQuery),
    responses=openai_error_responses(errors.ConversationNotFound, errors.MessageNotFound),
)
async def retrieve_item(
    chat: Chat,
    conversation_id: ConversationId,
    item_id: ItemId,
    user: User,
    _query: Annotated[ItemQuery, dependencies.query(ItemQuery, ignored=_INCLUDED)],
) -> Response:
    """Retrieve an item."""
    message = await _message(chat, conversation_id, item_id, user)

    def retrieved() -> Response:
        retrieved_item = next(
            (each for each in openai_items.items_of(message) if each["id"] == item_id), None
        )
        if retrieved_item is None:
            raise MessageNotFound("There is no item with this id in this conversation.")
        return json_response(retrieved_item)

    return await strict_json.beside(_size([message]), retrieved)


@router.delete(
    "/conversations/{conversation_id:id}/items/{item_id:id}",
    response_model=OpenAIConversation | OpenAIReference,
    openapi_extra=request_description(ExpectedQuery, write=True),
    responses=openai_error_responses(errors.ConversationNotFound, errors.MessageNotFound, errors.Stale),
)
async def delete_item(
    request: Request,
    chat: Chat,
    conversation_id: ConversationId,
    item_id: ItemId,
    user: User,
    _query: Annotated[ExpectedQuery, dependencies.query(ExpectedQuery)],
) -> Response:
    """Delete an item, and return the conversation.

    An item that shares a native message with other items is not deleted, because that would change the
    message or delete the other items, too.
    """
    condition = conditional.condition(request)
    message = await _message(chat, conversation_id, item_id, user)
    items = await strict_json.beside(_size([message]), lambda: openai_items.items_of(message))
    if item_id not in {item["id"] for item in items}:
        raise MessageNotFound("There is no item with this id in this conversation.")
    if len(items) > 1:
        why = "is a part of a message of several items, which can only be deleted as a message"
        raise InvalidRequest.at("path.item_id", why)
    await chat.delete_message(conversation_id, openai_items.message_id(item_id), user, condition=condition)
    return json_response(conversation_written(request, await chat.get_conversation(conversation_id, user)))
