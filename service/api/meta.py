"""The routes about the service itself: health, metrics, and the description of the API with its page.

Metrics are for the holder of their token, or, where there is none, for this machine only.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from importlib.resources import files as resources_of
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    Field,
)
from pydantic.json_schema import models_json_schema
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute

from service.api import problems
from service.api.bodies import json_response
from service.api.context import NewCheckpoint
from service.api.dependencies import COMMIT_HEADER, no_query, resources
from service.api.examples import EXAMPLES
from service.api.middleware import authentication
from service.api.openai import schemas as openai_schemas
from service.api.problems import error_responses
from service.api.replacements import History, Replacement
from service.api.schemas import (
    ConversationChanges,
    NewConversation,
    NewItems,
    NewMessage,
    NewMessages,
)
from service.errors import DatabaseUnavailable, Unauthenticated
from service.settings import Settings
from service.telemetry import metrics


class Health(BaseModel):
    """The state of the service."""

    status: Literal["live", "ready"]
    missing_indexes: list[str] = Field(
        [], description="The indexes that are being built, if there are any. Calls that use them are slower."
    )


router = APIRouter(prefix="/health", tags=["health"], dependencies=[Depends(no_query)])
metrics_router = APIRouter(tags=["metrics"], include_in_schema=False)
_LOCAL = frozenset({"127.0.0.1", "::1"})
# A request through a proxy on this machine comes from a local address, but has one of these headers.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


@router.get("/live", response_model=Health, responses=error_responses())
async def live() -> Response:
    """Report that the process runs."""
    return json_response({"status": "live"})


@router.get("/ready", response_model=Health, responses=error_responses())
async def ready(request: Request) -> Response:
    """Report whether the database answers and takes writes, and which indexes are not there yet."""
    process = resources(request)
    if not await process.is_ready():
        raise DatabaseUnavailable(process.why_not_ready)
    building = {"missing_indexes": process.missing_indexes} if process.missing_indexes else {}
    return json_response({"status": "ready", **building})


@metrics_router.get("/metrics")
async def expose(request: Request) -> Response:
    """Return every metric in the text format of Prometheus."""
    settings = resources(request).settings
    if not _allowed(request, settings):
        raise Unauthenticated(
            "Metrics need the token of CHAT_METRICS_TOKEN as `Authorization: Bearer …`. Without that setting "
            "only the machine of the service can read metrics."
        )
    return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _allowed(request: Request, settings: Settings) -> bool:
    if settings.metrics_token is None:
        local = request.client is not None and request.client.host in _LOCAL
        return local and not any(name in request.headers for name in _FORWARDED)
    expected = f"Bearer {settings.metrics_token.get_secret_value()}".encode()
    given = request.headers.get("authorization", "").encode("latin-1")
    return hmac.compare_digest(given, expected)


# Swagger UI, from a package that has its files, so that the page needs no other site and no internet.
_SWAGGER_UI = Path(str(resources_of("fastapi_standalone_docs"))) / "static" / "swagger"
# Swagger UI has a dark form, by a class.
_START = """const dark = matchMedia("(prefers-color-scheme: dark)");
const show = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", show);
show();
window.ui = SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null
});
"""
_STYLE = (resources_of("service.api") / "docs.css").read_bytes()
# All addresses are relative, so the page also works where a proxy puts a path before it.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>API · Chat History</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="stylesheet" href="docs/bar.css">
<a class="skip" href="#main">Skip to the content</a>
<header class="top"><div class="bar"><a class="brand" href="console/">\
<svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true"><path fill="currentColor" \
d="M5 3h14a3 3 0 0 1 3 3v8a3 3 0 0 1-3 3h-7l-5 4.2V17H5a3 3 0 0 1-3-3V6a3 3 0 0 1 3-3Z"/>\
<path class="lines" d="M7 8h10M7 12h6"/></svg>Chat History</a>
<nav aria-label="Console"><a href="console/">Conversations</a> <a href="console/state">State</a>
<a href="docs" aria-current="page">API</a></nav></div></header>
<main id="main" tabindex="-1">
<div id="swagger-ui">This page needs JavaScript. <a href="openapi.json">openapi.json</a> says the same.</div>
</main>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</html>
"""
# Nothing inline runs, and the page can reach nothing but this service, so a key that somebody types into it
# cannot be sent anywhere else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_JAVASCRIPT = "text/javascript; charset=utf-8"
_CACHED = {"Cache-Control": "max-age=3600"}

docs_router = APIRouter(include_in_schema=False, dependencies=[Depends(no_query)])


@docs_router.get("/docs")
async def docs_page() -> Response:
    """Return the page that shows the description of the API."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@docs_router.get("/redoc")
async def other_docs_page() -> Response:
    """Send people who know this address from other services to the one page."""
    return RedirectResponse("docs")


@docs_router.get("/docs/swagger-ui.css")
async def docs_style() -> Response:
    """Return the style of the page."""
    return FileResponse(_SWAGGER_UI / "swagger-ui.css", headers=_CACHED)


@docs_router.get("/docs/bar.css")
async def docs_bar() -> Response:
    """Return the style that makes the page look like those of the console."""
    return Response(_STYLE, media_type="text/css", headers=_CACHED)


@docs_router.get("/docs/swagger-ui-bundle.js")
async def docs_program() -> Response:
    """Return Swagger UI, the program of the page."""
    return FileResponse(_SWAGGER_UI / "swagger-ui-bundle.js", media_type=_JAVASCRIPT, headers=_CACHED)


@docs_router.get("/docs/start.js")
async def docs_start() -> Response:
    """Return the script that starts Swagger UI. It is a file, because the policy runs no inline script."""
    return Response(_START, media_type=_JAVASCRIPT, headers=_CACHED)


def operation_id(route: APIRoute) -> str:
    """Return the operation id, which names a call in generated clients: the function's name.

    Calls of OpenAI's API have a prefix, because some of their functions have the names of other routes.
    """
    return f"openai_{route.name}" if "openai" in route.tags else route.name


_TOKEN = {
    "description": "On MongoDB: a read that carries this token of a write sees what it stored.",
    "schema": {"type": "string"},
}


def _declare_token(method: str, call: dict[str, Any]) -> None:
    """Declare the token by which a read sees a write of another process."""
    if method == "get":
        parameter = {"name": COMMIT_HEADER, "in": "header", "required": False, **_TOKEN}
        call.setdefault("parameters", []).append(parameter)
        return
    for status, answer in call["responses"].items():
        if status.startswith("2"):
            answer.setdefault("headers", {})[COMMIT_HEADER] = _TOKEN


def describe(app: FastAPI, routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Return the OpenAPI document, with the schemas of the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=routes)
        models = (
            NewCheckpoint,
            NewConversation,
            ConversationChanges,
            NewMessage,
            NewItems,
            NewMessages,
            History,
            Replacement,
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
        security_schemes = schema["components"].setdefault("securitySchemes", {})
        security_schemes |= {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a JWT."},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, calls in schema["paths"].items():
            for call in calls.values():
                # FastAPI adds its own 422 to every route that declares none. Routes below `/v1` declare none,
                # because their faults are 400s. The model of this 422 is removed below.
                if "HTTPValidationError" in str(call["responses"].get("422")):
                    del call["responses"]["422"]
                if call["operationId"] in EXAMPLES:
                    EXAMPLES[call["operationId"]].add_to(call)
            if path not in authentication.PUBLIC:
                for method, call in calls.items():
                    _declare_token(method, call)
                    # The empty object stands for no authentication, which is the default on this machine.
                    call["security"] = [{"bearer": []}, {"key": []}, {}]
        for unused in ("HTTPValidationError", "ValidationError"):
            components.pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema
