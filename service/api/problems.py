"""Turns every error into a problem document (RFC 9457), or below `/v1` into an error as OpenAI has it."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from service import errors
from service.api import dependencies
from service.errors import ChatHistoryError, Fault, cut, json_path
from service.formats.json_answers import timestamp

MEDIA_TYPE = "application/problem+json"
# Paths below this one answer with errors in OpenAI's shape.
OPENAI_PATH = "/v1/"


class FaultSchema(BaseModel):
    """A fault in the request: its place and what is wrong there."""

    path: str
    message: str


class Problem(BaseModel):
    """A problem document (RFC 9457); for bad input `errors` has the JSON path of each fault."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FaultSchema] | None = None
    version: int | None = Field(None, description="Of a conversation that has changed.")
    last_seq: int | None = Field(None, description="Of a conversation that has changed.")
    missed: list[dict[str, Any]] | None = Field(
        None,
        description="The first messages after `expected_last_seq`, up to 100, for callers that may read.",
    )


class OpenAIFault(BaseModel):
    """The error in OpenAI's terms; `param` is the place in the request."""

    message: str
    type: str
    param: str | None
    code: str | None
    version: int | None = Field(None, description="Of a conversation that has changed.")
    last_seq: int | None = Field(None, description="Of a conversation that has changed.")


class OpenAIError(BaseModel):
    """An error in the shape that OpenAI's clients read."""

    error: OpenAIFault


_ALWAYS: tuple[type[ChatHistoryError], ...] = (
    errors.InvalidRequest,
    errors.MalformedUrl,
    ChatHistoryError,
    errors.DatabaseUnavailable,
    errors.Unauthenticated,
    errors.InsufficientScope,
    errors.CrossSiteRequest,
    errors.HostNotServed,
    errors.TooManyRequests,
)


def error_responses(*problems: type[ChatHistoryError]) -> dict[int | str, dict[str, Any]]:
    """Declare for OpenAPI the errors of a route, and the errors that every route can answer with."""
    titles: dict[int, list[str]] = {}
    for problem in (*problems, *_ALWAYS):
        titles.setdefault(problem.status, []).append(problem.title)
    return {
        status: _declared(status, " / ".join(texts), MEDIA_TYPE, "Problem")
        for status, texts in titles.items()
    }


def openai_error_responses(*problems: type[ChatHistoryError]) -> dict[int | str, dict[str, Any]]:
    """Declare the errors of a route that answers in OpenAI's shape."""
    titles: dict[int, list[str]] = {}
    for problem in (*problems, *_ALWAYS):
        titles.setdefault(_openai_status(problem), []).append(problem.title)
    return {
        status: _declared(status, " / ".join(texts), "application/json", "OpenAIError")
        for status, texts in titles.items()
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
    """Shape an error as the callers of this path expect it."""
    if scope["path"].startswith(OPENAI_PATH):
        return _openai_error(error, retry_after_s)
    misdirected = error.status in _WRONG_API and _is_of_openai_client(scope)
    return problem(error, retry_after_s, for_openai_client=misdirected)


# How an OpenAI client fails whose URL lacks the `/v1`: it then asks the native API.
_WRONG_API = frozenset({404, 405, 422})
_OPENAI_HINT = "For OpenAI's clients this service has another API: give them a base URL that ends in `/v1`."


def _is_of_openai_client(scope: Scope) -> bool:
    return any(name == b"x-stainless-lang" for name, _ in scope["headers"])


def problem(error: ChatHistoryError, retry_after_s: int = 1, *, for_openai_client: bool = False) -> Response:
    """Shape an error as a problem document.

    An OpenAI client shows only an error's `error.message`, so for such a client the document has it, too.
    """
    body: dict[str, Any] = {
        "type": f"urn:chat-history:problem:{error.slug()}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if for_openai_client:
        body["detail"] = f"{error.detail} {_OPENAI_HINT}"
        body["error"] = {"message": body["detail"]}
    if error.faults:
        body["errors"] = [{"path": each.path, "message": each.message} for each in error.faults]
    body |= error.facts
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
    """Shape an error as OpenAI does. OpenAI's client repeats a 409 unless a header forbids it."""
    body = {
        "message": error.detail or error.title,
        "type": _OPENAI_TYPES.get(error.status, "invalid_request_error"),
        "param": _param(error.faults[0].path) if error.faults else None,
        "code": error.slug().replace("-", "_"),
        **{name: value for name, value in error.facts.items() if name != "missed"},
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
    # A fault may quote a lone surrogate of the request, which cannot be encoded as UTF-8.
    try:
        return orjson.dumps(body, default=timestamp, option=orjson.OPT_PASSTHROUGH_DATETIME)
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
        if isinstance(error, errors.Stale) and not dependencies.may_read(request):
            error.hide_messages()
        return respond(error, request.scope, retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[: errors.FAULTS_MAX + 1]
        faults = [Fault(_place(each["loc"]), each["msg"]) for each in first]
        request.state.problem = errors.InvalidRequest.slug()
        return respond(errors.InvalidRequest.of(faults), request.scope)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = respond(_of_status(error, request.scope["path"]), request.scope)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            # The framework names only the methods of the first route with this path.
            # The pages of the console are not in the description of the API.
            response.headers["Allow"] = ", ".join(_methods(request)) or response.headers["Allow"]
        return response


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes that have this path."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    for route, methods in paths.items():
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(route))
        if re.fullmatch(pattern, request.scope["path"]):
            return sorted(method.upper() for method in methods)
    return []


def _place(loc: tuple[str | int, ...]) -> str:
    """Return the place of a fault: `query.limit`, `path.conversation_id`, or a JSON path in the body."""
    kind, *steps = loc
    if kind == "body":
        return json_path(tuple(steps))
    return ".".join(cut(str(each)) for each in loc)


# The framework's own details are titles: "Not Found".
_DETAILS = {
    404: "This service has no such path. `/openapi.json` has every path.",
    405: "This path does not have this method. The header `Allow` has the methods of this path.",
}


_OPENAI_404 = (
    "OpenAI's API has no such path here. The native API has no `/v1`: give its clients a base URL without it."
)


def _of_status(error: HTTPException, path: str) -> ChatHistoryError:
    """Turn an error of the framework (no such path, no such method) into one of this service."""
    status = error.status_code
    phrase = HTTPStatus(status).phrase
    named: type[ChatHistoryError] = type(
        phrase.replace(" ", ""), (ChatHistoryError,), {"status": status, "title": phrase}
    )
    if status == 404 and path.startswith(OPENAI_PATH):
        return named(_OPENAI_404)
    return named(_DETAILS.get(status, f"The request could not be served: {error.detail}."))
