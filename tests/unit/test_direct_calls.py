"""Routes that are called without FastAPI's solver answer as they do with it."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Request
from fastapi.routing import APIRoute
from pydantic import StringConstraints
from starlette.responses import JSONResponse, Response

from service.api.direct_calls import call_directly

calls: list[str] = []


async def first(request: Request) -> None:
    calls.append("first")
    if "stop" in request.query_params:
        raise HTTPException(418, "stopped")


async def _word(request: Request) -> str:
    calls.append("word")
    return request.query_params.get("word", "")


Word = Annotated[str, Depends(_word)]
Step = Annotated[str, Path(), StringConstraints(pattern="^[a-z]+$")]
router = APIRouter(dependencies=[Depends(first)])


@router.get("/steps/{step}")
async def of_step(request: Request, step: Step, word: Word) -> Response:
    calls.append("route")
    return JSONResponse([request.url.path, step, word])


@router.get("/plain")
async def plain() -> Response:
    return JSONResponse("plain")


async def _with_end() -> AsyncIterator[str]:
    yield "until the end"


@router.get("/queried")
async def queried(word: str) -> Response:
    return JSONResponse(word)


@router.get("/with-end")
async def with_end(word: Annotated[str, Depends(_with_end)]) -> Response:
    return JSONResponse(word)


@router.get("/returned")
async def returned() -> list[int]:
    return [1, 2]


def application(*, directly: bool) -> FastAPI:
    app = FastAPI()
    app.router.routes[:] = [copy.copy(route) for route in router.routes]
    for route in app.router.routes:
        if directly and isinstance(route, APIRoute):
            call_directly(route)
    return app


async def asked(app: FastAPI, path: str) -> tuple[int, bytes, list[str]]:
    calls.clear()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get(path)
    return answer.status_code, answer.content, [*calls]


@pytest.mark.parametrize(
    "path",
    [
        *("/steps/abc?word=x", "/steps/abc", "/steps/ABC", "/steps/abc?stop=1", "/steps/ABC?stop=1"),
        *("/plain", "/plain?stop=1", "/queried?word=y", "/queried", "/with-end", "/returned", "/none"),
    ],
)
async def test_an_answer_is_the_same_with_and_without_the_solver(path: str) -> None:
    assert await asked(application(directly=True), path) == await asked(application(directly=False), path)


def test_only_routes_with_other_needs_are_left_to_the_solver() -> None:
    solved = {route.name: route.app for route in router.routes if isinstance(route, APIRoute)}
    routes = [route for route in application(directly=True).routes if isinstance(route, APIRoute)]
    left = {route.name for route in routes if route.app is solved[route.name]}
    assert left == {"queried", "with_end", "returned"}
