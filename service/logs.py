"""Structured logs: one line a request, readable in a terminal, JSON elsewhere, never any content."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
import traceback
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.settings import Settings

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
log = structlog.get_logger("service.requests")


def configure(settings: Settings) -> None:
    """Send all logs of the process, uvicorn's and the driver's too, in one form to stderr."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exceptions_without_messages,
    ]
    # Our own lines take structlog's short way to stderr, a third of what the standard library's takes.
    factory = (
        structlog.WriteLoggerFactory(sys.stderr)
        if _in_a_console(settings)
        else structlog.BytesLoggerFactory(sys.stderr.buffer)
    )
    structlog.configure(
        processors=[*shared, _renderer(settings)],
        logger_factory=factory,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _renderer(settings),
                _text,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    # The driver says at DEBUG what it sends, which is content.
    for name in ("pymongo", "motor", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True


def _in_a_console(settings: Settings) -> bool:
    return settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())


def _renderer(settings: Settings) -> Any:
    if _in_a_console(settings):
        return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    return structlog.processors.JSONRenderer(serializer=_dumps)


def _dumps(event: Any, **_: Any) -> bytes:
    return orjson.dumps(event, default=str)


def _text(_logger: Any, _method: str, line: Any) -> str:
    return line if isinstance(line, str) else str(line, "utf-8")


def _exceptions_without_messages(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Log an exception as its type and the lines it went through: its text may quote content."""
    info = event.pop("exc_info", None)
    if str(event.get("event", "")).startswith("Traceback"):
        # Starlette hands uvicorn a start-up failure as text; its last line says what is wrong.
        event["event"] = event["event"].strip().splitlines()[-1]
    if not info:
        return event
    error = info if isinstance(info, BaseException) else (info if info is not True else sys.exc_info())
    if isinstance(error, tuple):
        error = error[1]
    if error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        event["error"] = type(error).__name__
        event["where"] = [f"{each.filename}:{each.lineno} {each.name}" for each in frames]
    return event


class RequestLog:
    """ASGI: names every request, logs one line when it ends, and answers what nothing else caught."""

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
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        state = scope.setdefault("state", {})
        state["request_id"], state["request_id_given"] = request_id, given is not None
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            log.error("request_failed", route=_route(scope), exc_info=error)
            if status:
                # The answer has begun. To end the connection here is the only way left to say so.
                raise
            await self._on_failure(scope, receive, send_named)
        finally:
            seconds = time.perf_counter() - began
            metrics.request(scope["method"], _route(scope), status, seconds)
            _log_request(scope, status, round(seconds * 1000, 1))
            structlog.contextvars.unbind_contextvars("request_id")


def _log_request(scope: Scope, status: int, ms: float) -> None:
    facts = {"method": scope["method"], "route": _route(scope), "status": status, "ms": ms}
    conversation_id = scope.get("path_params", {}).get("conversation_id")
    if conversation_id is not None:
        facts["conversation_id"] = conversation_id[:128]
    principal = scope.get("state", {}).get("principal")
    if principal is not None and principal.name != "anybody":
        facts["principal"] = principal.name
    problem = scope.get("state", {}).get("problem")
    if problem is not None:
        facts["problem"] = problem
    log.info("request", **facts)


def _route(scope: Scope) -> str:
    """Return the route's template, never the path, which anybody can fill with anything."""
    return str(getattr(scope.get("route"), "path", "(none)"))


def _request_id(scope: Scope) -> str | None:
    """Return the id that the caller gave the request, if it is a short word."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(given := value.decode("latin-1")):
            return str(given)
    return None
