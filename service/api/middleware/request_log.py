"""Logs one line for each request, and counts the request in the metrics."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.dependencies import COMMIT_HEADER, READING
from service.telemetry import metrics
from service.tenancy import ID_BYTES_MAX

log = structlog.get_logger("service.requests")
_REDIRECTIONS = 300
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")


class RequestLogMiddleware:
    """ASGI: gives every request an id, logs one line when it ends, and answers after an unexpected error."""

    def __init__(self, app: ASGIApp, on_failure: ASGIApp) -> None:
        self._app = app
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (or the lifespan, which passes through)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _request_id(scope)
        request_id = given or f"req_{secrets.token_hex(12)}"
        began = time.perf_counter()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if status < _REDIRECTIONS and scope["method"] not in READING:
                    _add_token(scope, headers)
            await send(message)

        state = scope.setdefault("state", {})
        state["request_id"], state["request_id_given"] = request_id, given is not None
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            log.error("request_failed", route=_route(scope), exc_info=error)
            if status:
                # The answer has begun, so ending the connection is the only way left to signal the error.
                raise
            await self._on_failure(scope, receive, send_named)
        finally:
            seconds = time.perf_counter() - began
            metrics.request(scope["method"], _route(scope), status, seconds)
            _log_request(scope, status, round(seconds * 1000, 1))
            structlog.contextvars.unbind_contextvars("request_id")


def _add_token(scope: Scope, headers: MutableHeaders) -> None:
    """Name what a write has stored, for reads that go to another process."""
    resources = getattr(scope["app"].state, "resources", None)  # None before the application has started
    token = resources and resources.commit_token
    if token:
        headers[COMMIT_HEADER] = token


def _log_request(scope: Scope, status: int, ms: float) -> None:
    facts = {"method": scope["method"], "route": _route(scope), "status": status, "ms": ms}
    conversation_id = scope.get("path_params", {}).get("conversation_id")
    if conversation_id is not None:
        facts["conversation_id"] = conversation_id[:ID_BYTES_MAX]
    principal = scope.get("state", {}).get("principal")
    if principal is not None and principal.name != "anybody":
        facts["principal"] = principal.name
    problem = scope.get("state", {}).get("problem")
    if problem is not None:
        facts["problem"] = problem
    # An orchestrator asks for the health every few seconds, so an answer that is as usual is noise.
    write = log.debug if str(facts["route"]).startswith("/health/") and status == 200 else log.info
    write("request", **facts)


def _route(scope: Scope) -> str:
    """Return the template of the route, not the path, which could contain any text."""
    return str(getattr(scope.get("route"), "path_format", "(none)"))


def _request_id(scope: Scope) -> str | None:
    """Return the `X-Request-ID` of the caller, if it is a short word of printable ASCII."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(given := value.decode("latin-1")):
            return str(given)
    return None
