"""The routes of what a user may ask of all that is kept of her."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from service import errors
from service.api import needs, schemas
from service.api.needs import Users
from service.api.problems import answers
from service.api.schemas import NDJSON, EraseQuery, EraseReceipt, json_response
from service.documents import Id

router = APIRouter(prefix="/users/{user_id}", tags=["users"])
UserId = Annotated[Id, Path(description="The user's id.")]


@router.delete(
    "",
    response_model=EraseReceipt,
    openapi_extra=needs.described(EraseQuery),
    responses=answers(errors.UserNotFound),
)
async def erase(
    users: Users, user_id: UserId, query: Annotated[EraseQuery, needs.query(EraseQuery)]
) -> Response:
    """Erase a user: every conversation, every message. Repeat it if it is interrupted; it goes on."""
    receipt = await users.count(user_id) if query.dry_run else await users.erase(user_id)
    said = {"conversations": receipt.conversations, "messages": receipt.messages}
    return json_response({"user_id": user_id, **said, "dry_run": query.dry_run})


@router.get(
    "/export",
    responses={
        200: {
            "description": "A line of JSON for each conversation and each message, and one that ends it.",
            "content": {NDJSON: {"schema": {"type": "string"}}},
        },
        **answers(errors.UserNotFound),
    },
    response_class=Response,
)
async def export(request: Request, users: Users, user_id: UserId) -> Response:
    """Export everything of a user, as `chat-history import` takes it back."""
    await needs.no_query(request)
    return await schemas.stream_lines(users.export(user_id))
