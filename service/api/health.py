"""The routes of health."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.api.needs import no_query
from service.api.problems import answers
from service.api.schemas import Health, json_response
from service.database import Database
from service.errors import DatabaseUnavailable

router = APIRouter(prefix="/health", tags=["health"], dependencies=[Depends(no_query)])


@router.get("/live", response_model=Health, responses=answers())
async def live() -> Response:
    """Say that the process is up."""
    return json_response({"status": "live"})


@router.get("/ready", response_model=Health, responses=answers())
async def ready(request: Request) -> Response:
    """Say whether the database answers."""
    database: Database = request.app.state.database
    if not await database.is_ready():
        raise DatabaseUnavailable(database.why_not_ready)
    return json_response({"status": "ready"})
