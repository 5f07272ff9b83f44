"""Puts the service together: its resources, its routes, its errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from service import logs, metrics, tracing
from service.api import (
    conversations,
    docs,
    health,
    messages,
    openai,
    openai_schemas,
    problems,
    security,
    users,
)
from service.api import metrics as metrics_route
from service.api.schemas import ConversationChanges, NewConversation, NewMessage, NewMessages
from service.audit import Audit
from service.auth import Authenticator
from service.chat_service import ChatService
from service.database import Database
from service.errors import ChatHistoryError, DatabaseUnavailable, Overloaded
from service.keys import Keys
from service.lifecycle import Lifecycle
from service.settings import Settings

_TIDY_EVERY_S = 60.0
log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; it connects to nothing before its lifespan begins."""
    settings = settings or Settings()
    logs.configure(settings)
    app = FastAPI(
        title="Chat History Database",
        version=version("chat-history-database"),
        description="Keeps the conversations of AI agents: natively, exactly, in order, exactly once.",
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,
    )
    app.state.settings = settings
    if settings.auth == "none":
        # With authentication there is none: who types a key into a page gives it to the page's script.
        app.add_api_route("/docs", docs.page, include_in_schema=False)
    app.include_router(conversations.router)
    app.include_router(messages.router)
    app.include_router(messages.pop_router)
    app.include_router(openai.router)
    app.include_router(users.router)
    app.include_router(health.router)
    if settings.metrics:
        metrics.enable()
        app.include_router(metrics_route.router)
    problems.install(app, settings.retry_after_s)
    app.add_middleware(security.Gate, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key", "X-Request-ID"],
            expose_headers=["Idempotent-Replayed", "Location", "RateLimit", "Retry-After", "X-Request-ID"],
        )
    app.add_middleware(security.SecurityHeaders, settings=settings)
    app.add_middleware(logs.RequestLog, on_failure=_failed)
    if settings.tracing:
        app.state.end_tracing = tracing.enable(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _failed(scope: Scope, receive: Receive, send: Send) -> None:
    error = ChatHistoryError("An error that the service did not expect; its log has the place.")
    await problems.respond(error, scope)(scope, receive, send)


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    settings: Settings = scope["state"]["settings"]
    error = Overloaded(f"This process serves {settings.connections_max} connections at once.")
    scope["state"]["problem"] = error.slug()
    await problems.respond(error, scope, settings.retry_after_s)(scope, receive, send)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Open the resources, and close them in reverse."""
    settings: Settings = app.state.settings
    async with contextlib.AsyncExitStack() as stack:
        if settings.tracing:
            stack.callback(app.state.end_tracing)
        app.state.database = Database(settings)
        await app.state.database.open()
        stack.push_async_callback(app.state.database.close)
        app.state.chat = ChatService(app.state.database, settings)
        app.state.lifecycle = Lifecycle(app.state.database, app.state.chat, settings)
        app.state.keys = Keys(app.state.database, settings)
        app.state.authenticator = Authenticator(settings, app.state.keys)
        stack.callback(app.state.authenticator.close)
        if settings.audit_days:
            app.state.audit = Audit(app.state.database)
            app.state.audit.start()
            stack.push_async_callback(app.state.audit.stop)
        stack.push_async_callback(_cancel, asyncio.create_task(_tidy(app, settings)))
        _stop_with_parent()
        yield {"settings": settings, "overloaded": logs.RequestLog(_overloaded, on_failure=_failed)}


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _tidy(app: FastAPI, settings: Settings) -> None:
    """Take up interrupted deletions and erasures, and remove what has expired, now and every minute."""
    steps: dict[str, Callable[[], Awaitable[None]]] = {
        "deletions": functools.partial(_finish_deletions, app.state.chat),
        "erasures": functools.partial(_finish_erasures, app.state.lifecycle),
        "expiry": functools.partial(
            _expire, app.state.lifecycle, app.state.audit if settings.audit_days else None
        ),
    }
    while True:
        for name, step in steps.items():
            try:
                await step()
            except DatabaseUnavailable as error:
                log.warning("tidying_postponed", step=name, problem=error.slug())
            except Exception as error:  # no step may end the others, nor this task
                log.error("tidying_failed", step=name, exc_info=error)
        await asyncio.sleep(_TIDY_EVERY_S)


async def _finish_deletions(chat: ChatService) -> None:
    if count := await chat.finish_deletions():
        log.info("deletions_finished", conversations=count)


async def _finish_erasures(lifecycle: Lifecycle) -> None:
    if count := await lifecycle.resume():
        log.info("erasures_finished", users=count)


async def _expire(lifecycle: Lifecycle, audit: Audit | None) -> None:
    if (expired := await lifecycle.expire()).conversations:
        log.info("expired", conversations=expired.conversations, messages=expired.messages)
        if audit is not None:
            audit.note(
                principal="service",
                tenant="",
                method="TASK",
                route="expire",
                status=0,
                what=f"{expired.conversations} conversations, {expired.messages} messages",
            )


def _stop_with_parent() -> None:
    """Let a worker process end when the process that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        asyncio.get_running_loop().add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Describe the API, with the schemas of the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        models = (
            NewConversation,
            ConversationChanges,
            NewMessage,
            NewMessages,
            problems.Problem,
            openai_schemas.NewOpenAIConversation,
            openai_schemas.NewOpenAIItems,
            openai_schemas.OpenAIMetadata,
            problems.OpenAIError,
        )
        _, definitions = models_json_schema(
            [(model, "validation") for model in models],
            ref_template="#/components/schemas/{model}",
        )
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components.update(definitions["$defs"])
        components_of_security = schema["components"].setdefault("securitySchemes", {})
        components_of_security |= {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a JWT."},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, calls in schema["paths"].items():
            if path not in security.PUBLIC:
                for call in calls.values():
                    # The empty one: by default the service listens on this machine, and trusts its caller.
                    call["security"] = [{"bearer": []}, {"key": []}, {}]
        for unused in ("HTTPValidationError", "ValidationError"):
            components.pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema
