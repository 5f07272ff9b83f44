"""Errors to problem documents (RFC 9457), all of them through one envelope."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import errors
from service.errors import ChatHistoryError, Fault
from service.payloads import json_path

MEDIA_TYPE = "application/problem+json"


class FaultSchema(BaseModel):
    """One place in the request and what is wrong with it."""

    path: str
    message: str


class Problem(BaseModel):
    """A problem document; `errors` is there for bad input, with the JSON path of each fault."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FaultSchema] | None = None


def answers(*problems: type[ChatHistoryError]) -> dict[int | str, dict[str, Any]]:
    """Declare for OpenAPI which of our errors a route can answer with; 422, 500 and 503 always."""
    always: list[type[ChatHistoryError]] = [
        errors.InvalidRequest,
        ChatHistoryError,
        errors.DatabaseUnavailable,
    ]
    titles: dict[int, list[str]] = {}
    for problem in (*problems, *always):
        titles.setdefault(problem.status, []).append(problem.title)
    return {status: _declared(status, " / ".join(said)) for status, said in titles.items()}


def _declared(status: int, description: str) -> dict[str, Any]:
    declared: dict[str, Any] = {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
    }
    if status == errors.DatabaseUnavailable.status:
        declared["headers"]["Retry-After"] = {
            "schema": {"type": "integer"},
            "description": "Seconds.",
        }
    return declared


def problem(error: ChatHistoryError, retry_after_s: int = 1) -> Response:
    """Shape one of our errors as a response."""
    body: dict[str, Any] = {
        "type": f"urn:chat-history:problem:{error.slug()}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if error.faults:
        body["errors"] = [{"path": each.path, "message": each.message} for each in error.faults]
    headers = {"Retry-After": str(retry_after_s)} if error.status == 503 else {}
    return Response(_dumps(body), error.status, headers, MEDIA_TYPE)


def _dumps(body: dict[str, Any]) -> bytes:
    # What a fault quotes of the request may hold a lone surrogate, which UTF-8 cannot carry.
    try:
        return orjson.dumps(body)
    except TypeError:
        return orjson.dumps(_representable(body))


def _representable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _representable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_representable(item) for item in value]
    return value


def install(app: FastAPI, retry_after_s: int) -> None:
    """Answer every error of the application with a problem document."""

    @app.exception_handler(ChatHistoryError)
    async def ours(request: Request, error: ChatHistoryError) -> Response:
        request.state.problem = error.slug()
        return problem(error, retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        faults = [Fault(_place(each["loc"]), each["msg"]) for each in error.errors()]
        summary = "; ".join(f"{each.path}: {each.message}" for each in faults[:3])
        request.state.problem = errors.InvalidRequest.slug()
        return problem(errors.InvalidRequest(summary, faults))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = problem(_of_status(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            # The framework names the methods of the first route of this path only.
            response.headers["Allow"] = ", ".join(_methods(request))
        return response


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes that have this path."""
    described: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    for route, methods in described.items():
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(route))
        if re.fullmatch(pattern, request.scope["path"]):
            return sorted(method.upper() for method in methods)
    return []


def _place(loc: tuple[str | int, ...]) -> str:
    """Name the place of a fault: `query.limit`, `path.conversation_id`, or a JSON path in the body."""
    kind, *steps = loc
    if kind == "body":
        return json_path(tuple(steps))
    return ".".join(map(str, loc))


def _of_status(status: int, detail: str) -> ChatHistoryError:
    """Make an error of ours of what the framework answers by itself (no such route or method)."""
    phrase = HTTPStatus(status).phrase
    named: type[ChatHistoryError] = type(
        phrase.replace(" ", ""), (ChatHistoryError,), {"status": status, "title": phrase}
    )
    return named(detail)
