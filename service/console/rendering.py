"""Renders pages, keeps their forms from being sent by others, and shows errors as pages.

Every text is escaped by Jinja2, nothing inline runs or styles, and a page loads nothing from elsewhere: the
policy of each page says so to the browser (tests/browser/test_hostile_content.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files
from typing import Any, cast
from urllib.parse import quote

import orjson
from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.authentication import ANYBODY, Principal
from service.access.sessions import SESSION_S, Sessions
from service.api import bodies, problems
from service.api.dependencies import resources
from service.api.middleware.browsers import CONSOLE
from service.console import showing
from service.errors import DatabaseUnavailable, FormRefused
from service.formats.json_answers import timestamp

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: https:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# With `no-referrer`, as elsewhere, a browser would send the pages' own forms with `Origin: null`.
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
}
# The files of the pages by name: the type and the bytes.
_STATIC = files("service.console") / "static"
FILES = {
    name: (kind, (_STATIC / name).read_bytes())
    for name, kind in (("console.css", "text/css"), ("console.js", "text/javascript"))
}
# A new version of a file has a new address, so a browser may keep the file.
_FILES_VERSION = hashlib.sha256(b"".join(content for _, content in FILES.values())).hexdigest()[:12]
# As much of a page is rendered before its first byte is sent.
_HEAD_CHARACTERS = 1_000
# Where people may be sent after they have signed in: to a page of the console.
_NEXT = re.compile(r"[a-z-]{0,20}(\?[\x21-\x7e]*)?\Z")

_ENVIRONMENT = Environment(
    loader=PackageLoader("service.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_ENVIRONMENT.filters |= {
    "ago": showing.ago,
    "exact": timestamp,
    "shown": showing.shown,
    "size": showing.size,
}
_ENVIRONMENT.globals |= {"files_version": _FILES_VERSION, "version": version("chat-history-database")}


@dataclass(frozen=True)
class Session:
    """The cookie of a browser. It is made anew if the browser has none, so that forms can belong to it."""

    sessions: Sessions
    value: str
    is_new: bool
    secure: bool

    @property
    def form_token(self) -> str:
        """The token of the forms on this browser's pages."""
        return self.sessions.form_token(self.value)

    def give(self, response: Response) -> None:
        """Set the cookie. Its path is the whole host, because a proxy may serve the console below a path."""
        response.set_cookie(
            self.sessions.cookie_name(secure=self.secure),
            self.value,
            max_age=SESSION_S,
            httponly=True,
            samesite="strict",
            secure=self.secure,
        )


async def session_of(request: Request) -> Session:
    """Return the session of the browser that sent a request, or a new one."""
    sessions = await resources(request).sessions()
    secure = request.url.scheme == "https"
    value = request.cookies.get(sessions.cookie_name(secure=secure))
    if value is None or not sessions.is_valid(value):
        return Session(sessions, sessions.sign(None), is_new=True, secure=secure)
    return Session(sessions, value, is_new=False, secure=secure)


async def with_session(request: Request, caller: dict[str, Any] | None, address: str) -> Response:
    """Begin a session of this caller, or of nobody, and send the browser to a page."""
    old = await session_of(request)
    response = see_other(address)
    Session(old.sessions, old.sessions.sign(caller), is_new=True, secure=old.secure).give(response)
    return response


async def form(request: Request) -> dict[str, str]:
    """Read a form that a page of this session sent. Raises FormRefused for any other form."""
    fields = await bodies.read_form(request)
    session = await session_of(request)
    if session.is_new or not session.sessions.is_form_token(fields.pop("token", ""), session.value):
        raise FormRefused(
            "The form was not sent by a page of the console, or its session is over. Open the page again, "
            "and send the form from there."
        )
    return fields


async def page(request: Request, template: str, *, status: int = 200, **shown: Any) -> Response:
    """Render a page for the caller."""
    session = await session_of(request)
    shown = {**_of_caller(request), "form_token": session.form_token, **shown}
    response = _Page(_ENVIRONMENT.get_template(template).generate(shown), status)
    if session.is_new:
        session.give(response)
    return response


class _Page(HTMLResponse):
    """A page whose head is sent first: the browser loads what it names while a thread renders the rest."""

    def __init__(self, parts: Iterator[str], status: int) -> None:
        super().__init__("".join(_head(parts)), status, HEADERS)
        del self.headers["content-length"]
        self._rest = parts

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        rest = await asyncio.to_thread("".join, self._rest)
        await send({"type": "http.response.body", "body": rest.encode()})


def _head(parts: Iterator[str]) -> Iterator[str]:
    """Take the parts of a page up to its title and what it loads, which is quickly rendered."""
    taken = 0
    while taken < _HEAD_CHARACTERS and (part := next(parts, None)) is not None:
        taken += len(part)
        yield part


def _of_caller(request: Request) -> dict[str, Any]:
    principal: Principal = request.state.principal
    settings = resources(request).settings
    return {
        "authenticates": settings.auth != "none",
        "caller": None if principal == ANYBODY else principal,
        "own_user": principal.scope.user_id,
        "may_write": "write" in principal.permissions,
        "may_erase": "admin" in principal.permissions or principal.scope.user_id is not None,
        "base_url": str(request.base_url),
    }


async def rendered(template: str, **shown: Any) -> str:
    """Render a template in a thread, because large messages take a while."""
    return await asyncio.to_thread(_ENVIRONMENT.get_template(template).render, shown)


def see_other(address: str) -> Response:
    """Send the browser to another page, relative to this one, by GET."""
    return RedirectResponse(address, 303, {"Cache-Control": "no-store"})


def next_page(given: str) -> str:
    """Return the page that a browser wants after it has signed in, if it is a page of the console."""
    return given if _NEXT.match(given) and not given.startswith("sign-") else ""


class ErrorPages:
    """ASGI: shows the problem documents of paths below the console as pages; a 401 leads to the sign-in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith(CONSOLE):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        problem = bytearray()

        async def collect(message: Message) -> None:
            nonlocal start, problem
            if message["type"] == "http.response.start" and _is_problem(message):
                start = message
            elif start is None:
                await send(message)
            else:
                problem += message.get("body", b"")
                if not message.get("more_body"):
                    await _answer(scope, start, orjson.loads(problem), receive, send)

        await self._app(scope, receive, collect)


def _is_problem(message: Message) -> bool:
    return Headers(raw=message["headers"]).get("content-type") == problems.MEDIA_TYPE


async def _answer(
    scope: Scope, start: Message, problem: dict[str, Any], receive: Receive, send: Send
) -> None:
    if start["status"] == HTTPStatus.UNAUTHORIZED and scope["path"] != f"{CONSOLE}sign-in":
        response: Response = see_other(f"sign-in?next={quote(_address(scope), safe='')}")
    else:
        response = await _error_page(Request(scope, receive), start["status"], problem)
    own = {"content-type", "content-length"}
    headers = MutableHeaders(raw=[*response.raw_headers])
    for name, value in cast("list[tuple[bytes, bytes]]", start["headers"]):
        if name.decode("latin-1").lower() not in own:
            headers.append(name.decode("latin-1"), value.decode("latin-1"))
    response.raw_headers = headers.raw
    await response(scope, receive, send)


async def _error_page(request: Request, status: int, problem: dict[str, Any]) -> Response:
    """Show a problem, and who is signed in, unless the request ended before that was known."""
    if hasattr(request.state, "principal"):
        # Without the secret of the sessions nobody is signed in by one.
        with suppress(DatabaseUnavailable):
            return await page(request, "error.html", status=status, problem=problem)
    body = await rendered("error.html", problem=problem, caller=None, authenticates=False, form_token="")
    return HTMLResponse(body, status, HEADERS)


def _address(scope: Scope) -> str:
    """Return the page that was asked for, if a browser may be sent back to it."""
    query = scope["query_string"].decode("latin-1")
    address = scope["path"].removeprefix(CONSOLE) + (f"?{query}" if query else "")
    return next_page(address) if scope["method"] == "GET" else ""
