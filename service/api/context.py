"""Routes of the context of a model call, and of checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import errors
from service.api import bodies, dependencies
from service.api.bodies import json_response
from service.api.dependencies import Chat, CheckpointId, ConversationId
from service.api.problems import error_responses
from service.api.schemas import (
    CheckpointList,
    CheckpointOut,
    ContextOut,
    ContextQuery,
    NewCheckpoint,
    OwnerQuery,
    Reference,
)
from service.chat_service import ContextRequest, ShortenedResults
from service.errors import InvalidRequest

router = APIRouter(prefix="/conversations/{conversation_id:id}", tags=["context"])
Owner = Annotated[OwnerQuery, dependencies.query(OwnerQuery)]
OWNER = dependencies.query_parameters(OwnerQuery)


@router.get(
    "/context",
    response_model=ContextOut,
    openapi_extra=dependencies.query_parameters(ContextQuery),
    responses=error_responses(errors.ConversationNotFound),
)
async def get_context(
    chat: Chat,
    conversation_id: ConversationId,
    query: Annotated[ContextQuery, dependencies.query(ContextQuery)],
) -> Response:
    """Read what a model is to be sent: the head, the newest summary, and as much of the end as fits."""
    return json_response(await chat.get_context(conversation_id, _wanted(query), query.user_id))


def _wanted(query: ContextQuery) -> ContextRequest:
    maxima = {"tokens": query.max_tokens, "messages": query.max_messages, "turns": query.max_turns}
    given = [(unit, most) for unit, most in maxima.items() if most is not None]
    if len(given) != 1:
        why = f"exactly one of max_tokens, max_messages and max_turns is needed, and {len(given)} are given"
        raise InvalidRequest.at("query.max_tokens", why)
    ((unit, most),) = given
    return ContextRequest(
        unit,  # type: ignore[arg-type]  # a key of `maxima`
        most,
        keep_ratio=query.keep_ratio,
        form=query.format,
        shortened=_shortened(query.tool_results),
        repair=(query.repair or ("none" if query.format == "native" else "placeholder")) == "placeholder",
    )


def _shortened(rule: str | None) -> ShortenedResults | None:
    if rule is None:
        return None
    values = {name: int(value) for name, value in (each.split(":") for each in rule.split(","))}
    return ShortenedResults(values.get("keep", 0), values.get("over", 0))


@router.post(
    "/checkpoints",
    status_code=201,
    response_model=CheckpointOut | Reference,
    openapi_extra={**OWNER, **bodies.request_body_schema(NewCheckpoint)},
    responses={
        200: {
            "model": CheckpointOut | Reference,
            "description": "An earlier request stored this very checkpoint already.",
        },
        **error_responses(
            errors.ConversationNotFound, errors.CheckpointNotForward, errors.StorageFull, *bodies.PROBLEMS
        ),
    },
)
async def create_checkpoint(
    request: Request, chat: Chat, conversation_id: ConversationId, owner: Owner
) -> Response:
    """Store a summary of the history up to a seq. Without the scope `read` the answer is the id."""
    body = await bodies.read_small(request, NewCheckpoint)
    stored, created = await chat.create_checkpoint(
        conversation_id, body.upto_seq, body.summary, owner.user_id, metadata=body.metadata
    )
    shown = stored if dependencies.may_read(request) else {"id": stored["id"]}
    return json_response(shown, 201 if created else 200)


@router.get(
    "/checkpoints",
    response_model=CheckpointList,
    openapi_extra=OWNER,
    responses=error_responses(errors.ConversationNotFound),
)
async def list_checkpoints(chat: Chat, conversation_id: ConversationId, owner: Owner) -> Response:
    """Read all checkpoints of a conversation, newest first."""
    return json_response({"data": await chat.list_checkpoints(conversation_id, owner.user_id)})


@router.delete(
    "/checkpoints/{checkpoint_id:id}",
    status_code=204,
    openapi_extra=OWNER,
    responses=error_responses(errors.ConversationNotFound, errors.CheckpointNotFound),
)
async def delete_checkpoint(
    chat: Chat, conversation_id: ConversationId, checkpoint_id: CheckpointId, owner: Owner
) -> Response:
    """Delete a checkpoint; if it was the newest, the one before it counts again."""
    await chat.delete_checkpoint(conversation_id, checkpoint_id, owner.user_id)
    return Response(status_code=204)
