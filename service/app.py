"""Builds the application: resources, routes, middleware and error handlers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from service.access.api_keys import ApiKeys
from service.access.audit import Audit
from service.access.authentication import Authenticator
from service.api import appends, context, conversations, live, messages, meta, problems, replacements, users
from service.api.dependencies import Resources
from service.api.direct_calls import call_directly
from service.api.middleware import authentication, browsers, request_log
from service.api.openai import conversations as openai_conversations
from service.api.openai import items as openai_items
from service.chat_service import ConversationStore
from service.console import actions, pages
from service.console.rendering import ErrorPages
from service.database import Database
from service.errors import ChatHistoryError, Overloaded
from service.maintenance import sweep
from service.settings import Settings
from service.telemetry import logging, metrics

log = structlog.get_logger(__name__)

# A request is compared with the routes in this order.
_ROUTERS = (
    *(appends.router, messages.router, conversations.router, messages.pop_router, replacements.router),
    *(meta.router, live.router, context.router, users.router),
    *(openai_conversations.router, openai_items.router),
    *(meta.docs_router, pages.router, actions.router),
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application. Nothing connects before the lifespan begins."""
    settings = settings or Settings()
    logging.configure(settings)
    app = FastAPI(
        title="Chat History Database",
        version=version("chat-history-database"),
        description="Keeps the conversations of AI agents: natively, exactly, in order, exactly once.",
        lifespan=functools.partial(_lifespan, settings=settings),
        redirect_slashes=False,
        generate_unique_id_function=meta.operation_id,
        docs_url=None,
        redoc_url=None,
    )
    routers = [*_ROUTERS]
    if settings.metrics:
        metrics.enable()
        routers.append(meta.metrics_router)
    described = _include(app, routers)
    problems.install(app, settings.retry_after_s)
    app.add_middleware(authentication.AuthenticationMiddleware, settings=settings)
    app.add_middleware(ErrorPages)
    app.add_middleware(browsers.for_browsers, settings=settings)
    failed = browsers.for_browsers(ErrorPages(_failed), settings)
    app.add_middleware(request_log.RequestLogMiddleware, on_failure=failed)
    if settings.tracing:
        app.state.end_tracing = _enable_tracing(app)
    app.openapi = lambda: meta.describe(app, described)  # type: ignore[method-assign]
    return app


def _include(app: FastAPI, routers: Sequence[APIRouter]) -> list[BaseRoute]:
    """Add the routes of routers to the application, and return them as OpenAPI is to describe them.

    FastAPI's `include_router` names the operations. But it keeps each router as one route, and looks for the
    route of a request twice in each, which is a third of the cost of a small request. So requests go to the
    routers' own routes, which lack nothing that the application would add.
    """
    its_own = [*app.router.routes]  # `/openapi.json`
    for router in routers:
        app.include_router(router)
    described = [*app.router.routes]
    routes = [copy.copy(route) for router in routers for route in router.routes]
    app.router.routes[:] = [*routes, *its_own]
    for route in routes:
        if isinstance(route, APIRoute):
            call_directly(route)
    return described


def _enable_tracing(app: FastAPI) -> Callable[[], None]:
    """Trace this application and the driver; return what sends the remaining spans and ends.

    OpenTelemetry's own instrumentation makes a span of each request and of each database command. The content
    of a command is not part of its span; the path of a request, with its ids, is. `OTEL_*` variables
    configure where spans are sent, and how they are sampled.
    """
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor  # noqa: PLC0415
    from opentelemetry.instrumentation.pymongo import PymongoInstrumentor  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider(resource=Resource.create({"service.name": "chat-history"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="health,metrics")
    PymongoInstrumentor().instrument(tracer_provider=provider, capture_statement=False)
    return provider.shutdown


async def _failed(scope: Scope, receive: Receive, send: Send) -> None:
    error = ChatHistoryError(
        "An error happened that the service did not expect. The log has the error beside the `X-Request-ID`."
    )
    await problems.respond(error, scope)(scope, receive, send)


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    settings: Settings = scope["state"]["settings"]
    error = Overloaded(
        f"This process serves at most {settings.connections_max} connections at once. Try again later."
    )
    scope["state"]["problem"] = error.slug()
    await problems.respond(error, scope, settings.retry_after_s)(scope, receive, send)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI, settings: Settings) -> AsyncIterator[dict[str, Any]]:
    """Open the resources, and close them in reverse order."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.tracing:
            stack.callback(app.state.end_tracing)
        database = Database(settings)
        await database.open(indexes="build")
        stack.push_async_callback(database.close)
        store = ConversationStore(database, settings)
        stack.push_async_callback(store.close)
        authenticator = Authenticator(settings, ApiKeys(database, settings))
        stack.callback(authenticator.close)
        audit = Audit(database) if settings.audit_days else None
        if audit is not None:
            audit.start()
            stack.push_async_callback(audit.stop)
        app.state.resources = Resources(settings, authenticator, audit, store)
        maintenance = asyncio.create_task(sweep.run(store, audit))
        stack.push_async_callback(_cancel, maintenance)
        _stop_with_parent()
        yield {
            "settings": settings,
            "overloaded": request_log.RequestLogMiddleware(
                browsers.for_browsers(_overloaded, settings), on_failure=_failed
            ),
            "error_response": problems.problem,
            "end_streams": store.doorbell.close,
        }


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _stop_with_parent() -> None:
    """End a worker process when the process that started it has ended, for whatever reason."""
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform != "win32":  # the event loop of Windows cannot wait for a process
        asyncio.get_running_loop().add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)
