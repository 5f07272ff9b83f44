"""Errors to problem documents (RFC 9457), or to OpenAI's errors below `/v1`, all through one envelope."""

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
from starlette.types import Scope

from service import errors
from service.errors import ChatHistoryError, Fault
from service.payloads import cut, json_path

MEDIA_TYPE = "application/problem+json"
# What lies below it answers errors in OpenAI's shape.
OPENAI_PATH = "/v1/"


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


class OpenAIFault(BaseModel):
    """What went wrong, in OpenAI's terms; `param` is the place in the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    error: OpenAIFault


_ALWAYS: tuple[type[ChatHistoryError], ...] = (
    errors.InvalidRequest,
    ChatHistoryError,
    errors.DatabaseUnavailable,
    errors.Unauthenticated,
    errors.ScopeMissing,
    errors.CrossSiteRequest,
    errors.HostNotServed,
    errors.TooManyRequests,
)


def answers(*problems: type[ChatHistoryError]) -> dict[int | str, dict[str, Any]]:
    """Declare for OpenAPI which of our errors a route can answer with; what any may, always."""
    titles: dict[int, list[str]] = {}
    for problem in (*problems, *_ALWAYS):
        titles.setdefault(problem.status, []).append(problem.title)
    return {
        status: _declared(status, " / ".join(said), MEDIA_TYPE, "Problem") for status, said in titles.items()
    }


def openai_answers(*problems: type[ChatHistoryError]) -> dict[int | str, dict[str, Any]]:
    """Declare the same for a route that answers in OpenAI's shape."""
    titles: dict[int, list[str]] = {}
    for problem in (*problems, *_ALWAYS):
        titles.setdefault(_openai_status(problem), []).append(problem.title)
    return {
        status: _declared(status, " / ".join(said), "application/json", "OpenAIError")
        for status, said in titles.items()
    }


def _declared(status: int, description: str, media_type: str, schema: str) -> dict[str, Any]:
    declared: dict[str, Any] = {
        "description": description,
        "content": {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}},
    }
    if status in {errors.DatabaseUnavailable.status, errors.TooManyRequests.status}:
        declared["headers"]["Retry-After"] = {
            "schema": {"type": "integer"},
            "description": "Seconds.",
        }
    return declared


def respond(error: ChatHistoryError, scope: Scope, retry_after_s: int = 1) -> Response:
    """Shape one of our errors as the caller of this path expects it."""
    if scope["path"].startswith(OPENAI_PATH):
        return _openai_error(error, retry_after_s)
    return problem(error, retry_after_s)


def problem(error: ChatHistoryError, retry_after_s: int = 1) -> Response:
    """Shape one of our errors as a problem document."""
    body: dict[str, Any] = {
        "type": f"urn:chat-history:problem:{error.slug()}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if error.faults:
        body["errors"] = [{"path": each.path, "message": each.message} for each in error.faults]
    return Response(_dumps(body), error.status, _headers(error, retry_after_s), MEDIA_TYPE)


def _headers(error: ChatHistoryError, retry_after_s: int) -> dict[str, str]:
    return {**error.headers, **({"Retry-After": str(retry_after_s)} if error.status == 503 else {})}


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    **dict.fromkeys((500, 503, 507), "server_error"),
}


def _openai_status(error: ChatHistoryError | type[ChatHistoryError]) -> int:
    return 400 if error.status == 422 else error.status


def _openai_error(error: ChatHistoryError, retry_after_s: int) -> Response:
    """Shape one of our errors as OpenAI does, and tell its client not to repeat what stays a conflict."""
    body = {
        "message": error.detail or error.title,
        "type": _OPENAI_TYPES.get(error.status, "invalid_request_error"),
        "param": _param(error.faults[0].path) if error.faults else None,
        "code": error.slug().replace("-", "_"),
    }
    headers = _headers(error, retry_after_s)
    if error.status == 409:
        headers["x-should-retry"] = "false"
    return Response(_dumps({"error": body}), _openai_status(error), headers, "application/json")


def _param(path: str) -> str:
    """Name a place as OpenAI does: `items[0].role`, `limit`."""
    for start in ("$.", "query.", "path.", "header."):
        path = path.removeprefix(start)
    return path


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
        return respond(error, request.scope, retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[: errors.FAULTS_MAX + 1]
        faults = [Fault(_place(each["loc"]), each["msg"]) for each in first]
        summary = "; ".join(f"{each.path}: {each.message}" for each in faults[:3])
        request.state.problem = errors.InvalidRequest.slug()
        return respond(errors.InvalidRequest(summary, faults), request.scope)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = respond(_of_status(error.status_code, str(error.detail)), request.scope)
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
    return ".".join(cut(str(each)) for each in loc)


def _of_status(status: int, detail: str) -> ChatHistoryError:
    """Make an error of ours of what the framework answers by itself (no such route or method)."""
    phrase = HTTPStatus(status).phrase
    named: type[ChatHistoryError] = type(
        phrase.replace(" ", ""), (ChatHistoryError,), {"status": status, "title": phrase}
    )
    return named(detail)
