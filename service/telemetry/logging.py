"""Structured logs: one line a request, readable in a terminal, JSON elsewhere, never any content."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog

from service.settings import Settings

log = structlog.get_logger("service.requests")


def configure(settings: Settings) -> None:
    """Send all logs of the process, uvicorn's and the driver's too, in one form to stderr."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exceptions_without_messages,
    ]
    # Our own lines are written by structlog itself, which takes a third of the time of the standard library.
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
    # At DEBUG the driver logs the commands that it sends, which contain message content.
    for name in ("pymongo", "motor", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True


def _in_a_console(settings: Settings) -> bool:
    return settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())


def _renderer(settings: Settings) -> Any:
    if _in_a_console(settings):
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
        return structlog.dev.ConsoleRenderer(colors=colors)
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
