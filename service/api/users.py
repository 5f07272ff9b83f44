"""Routes for a user's own data: erase and export."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)
from starlette.responses import Response

from service import errors
from service.api import bodies, dependencies, paths
from service.api.bodies import NDJSON, json_response
from service.api.dependencies import UserDataOf
from service.api.problems import error_responses
from service.documents import Seq
from service.tenancy import Id
from service.user_data.erasure import ErasureState


class EraseQuery(BaseModel):
    """The query of an erasure."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = Field(False, description="Count conversations and messages, and remove nothing.")


class EraseReceipt(BaseModel):
    """The counts that an erasure removed, or would remove."""

    user_id: Id
    conversations: Seq
    messages: Seq
    dry_run: bool


class ErasureProgress(BaseModel):
    """An erasure: the counts of what is gone so far or, when it is done, of all that was removed."""

    id: Id
    user_id: Id
    state: Literal["running", "done"]
    conversations: Seq
    messages: Seq


router = APIRouter(prefix="/users/{user_id:id}", tags=["users"])
UserId = Annotated[Id, Path(description="The user's id.")]
ErasureId = Annotated[Id, Path(description="The erasure's id, from the answer to erasing the user.")]


# While an erasure goes on, the call that began it and the call that asks for it have the same answer.
_GOES_ON: dict[str, Any] = {
    "model": ErasureProgress,
    "description": "The erasure goes on. Ask for it at `Location` after `Retry-After` seconds.",
    "headers": {
        "Location": {"description": "The erasure.", "schema": {"type": "string"}},
        "Retry-After": {"description": "Seconds.", "schema": {"type": "string"}},
    },
}


@router.delete(
    "",
    response_model=EraseReceipt,
    openapi_extra=dependencies.query_parameters(EraseQuery),
    responses={202: _GOES_ON, **error_responses(errors.UserNotFound)},
)
async def erase_user(
    request: Request,
    user_data: UserDataOf,
    user_id: UserId,
    query: Annotated[EraseQuery, dependencies.query(EraseQuery)],
) -> Response:
    """Erase a user: every conversation and every message. Repeat an interrupted call; the erasure goes on."""
    if query.dry_run:
        removed = await user_data.count(user_id)
    else:
        state = await user_data.erase(user_id)
        if not state.done:
            return _progress(request, user_id, state)
        removed = state.removed
    return json_response({"user_id": user_id, **asdict(removed), "dry_run": query.dry_run})


@router.get(
    "/erasures/{erasure_id:id}",
    dependencies=[Depends(dependencies.no_query)],
    response_model=ErasureProgress,
    responses={202: _GOES_ON, **error_responses(errors.UserNotFound, errors.ErasureNotFound)},
)
async def get_erasure(
    request: Request, user_data: UserDataOf, user_id: UserId, erasure_id: ErasureId
) -> Response:
    """Ask how far an erasure is. Its receipt is kept for seven days after its end."""
    return _progress(request, user_id, await user_data.erasure(user_id, erasure_id))


def _progress(request: Request, user_id: str, state: ErasureState) -> Response:
    shown = {
        "id": state.id,
        "user_id": user_id,
        "state": "done" if state.done else "running",
        **asdict(state.removed),
    }
    if state.done:
        return json_response(shown)
    headers = {
        "Location": f"/users/{paths.encoded(user_id)}/erasures/{state.id}",
        "Retry-After": str(dependencies.resources(request).settings.retry_after_s),
    }
    return json_response(shown, 202, headers)


@router.get(
    "/export",
    responses={
        200: {
            "description": "A line of JSON for each conversation and message, and a last line that ends it.",
            "content": {NDJSON: {"schema": {"type": "string"}}},
        },
        **error_responses(errors.UserNotFound),
    },
    response_class=Response,
)
async def export_user(request: Request, user_data: UserDataOf, user_id: UserId) -> Response:
    """Export all conversations of a user, in the form that `chat-history import` reads."""
    await dependencies.no_query(request)
    return await bodies.stream_lines(user_data.export(user_id))
