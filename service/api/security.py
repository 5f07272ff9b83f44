"""The gate that every request passes: who is calling, how often, and what every answer must say.

It stands before the routes, so that no route can forget it: what is not listed here as public is not.
"""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Sequence
from typing import Any

from cachetools import TTLCache
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.browsers import Browsers
from service.api.problems import respond
from service.audit import Audit
from service.auth import ANYBODY, Authenticator, Principal
from service.chat_service import is_id
from service.errors import ChatHistoryError, TooManyRequests, Unauthenticated
from service.settings import Settings

PUBLIC = frozenset({"/health/live", "/health/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
# `/metrics` has a gate of its own.
_OWN_GATE = frozenset({"/metrics"})
_PAGES = frozenset({"/docs", "/docs/oauth2-redirect"})
_KNOWN_GOOD_S = 600
_ADDRESSES_MOST = 100_000

_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_NOT_PAGES = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class SecurityHeaders:
    """ASGI: puts into every answer what keeps browsers from doing something with it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        https = {"Strict-Transport-Security": "max-age=31536000"} if settings.tls_cert else {}
        self._on_pages = _raw(_ALWAYS | https)
        self._elsewhere = _raw(_ALWAYS | _NOT_PAGES | https)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = self._on_pages if scope["path"] in _PAGES else self._elsewhere

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *said]
            await send(message)

        await self._app(scope, receive, send_with)


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


class Gate:
    """ASGI: lets a request pass as its principal, or answers it with a 401, 403, 421, 429 or 503.

    The principal is in the request's state. Limits are counted in this process.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._open = settings.auth == "none"
        self._settings = settings
        self._browsers = Browsers(settings)
        self._rates = Rates(settings)
        # Credentials that were good a while ago, so that those who only guess cost nobody else.
        self._known_good: TTLCache[int, bool] = TTLCache(_ADDRESSES_MOST, _KNOWN_GOOD_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        said: dict[str, str] = {}
        try:
            self._browsers.check(scope, PUBLIC)
            if scope["path"] not in _OWN_GATE:
                await self._admit(scope, said)
        except ChatHistoryError as error:
            state["problem"] = error.slug()
            if self._settings.audit_days:
                self._note_refused(scope, error.status)
            await respond(error, scope, self._settings.retry_after_s)(scope, receive, send)
            return
        status = 500  # what it becomes where nothing else was answered

        async def send_with(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(said)
            await send(message)

        if not said and not self._settings.audit_days:
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send_with)
        finally:
            if self._settings.audit_days and scope["path"] not in PUBLIC:
                self._note(scope, status)

    def _note(self, scope: Scope, status: int) -> None:
        """Note who did what to which conversation, in the audit trail."""
        principal: Principal | None = scope["state"].get("principal")
        if principal is None:  # at a gate of its own
            if status == Unauthenticated.status:
                self._note_refused(scope, status)
            return
        audit: Audit = scope["app"].state.audit
        named = {**scope.get("path_params", {}), **scope["state"].get("audited", {})}
        audit.note(
            principal=principal.name,
            tenant=principal.scope.tenant,
            method=scope["method"],
            route=str(getattr(scope.get("route"), "path", "(none)")),
            status=status,
            conversation_id=_word(named.get("conversation_id")),
            # Whoever is one user reads that user's, whatever user was asked for.
            user_id=principal.scope.user_id or _word(named.get("user_id")),
            **_origin(scope),
        )

    @staticmethod
    def _note_refused(scope: Scope, status: int) -> None:
        """Note a call that came no further, by whom if that is known."""
        audit: Audit = scope["app"].state.audit
        principal: Principal | None = scope["state"].get("principal")
        origin = _origin(scope)
        audit.note_refused(
            (status, principal, _counted(origin["address"] or "")),
            principal=principal.name if principal is not None else "(unknown)",
            tenant=principal.scope.tenant if principal is not None else "",
            method=scope["method"],
            route="(refused)",
            status=status,
            **origin,
        )

    async def _admit(self, scope: Scope, said: dict[str, str]) -> None:
        """Put into the state who is calling, and into `said` what is left of the rates."""
        address = _counted(scope["client"][0]) if scope.get("client") else ""
        if self._rates.per_address:
            said |= await self._rates.hit(self._rates.per_address, "address", address)
        if scope["path"] in PUBLIC:
            scope["state"]["principal"] = ANYBODY
            return
        principal = ANYBODY if self._open else await self._authenticated(scope, address)
        scope["state"]["principal"] = principal
        if self._rates.per_key:
            # No tenant's name has a newline, so no two callers are one.
            who = f"{principal.scope.tenant}\n{principal.name}"
            said |= await self._rates.hit(self._rates.per_key, "key", who)

    async def _authenticated(self, scope: Scope, address: str) -> Principal:
        credential = _credential(Headers(scope=scope))
        if credential is None:
            # Nothing was tried, so there is nothing to count.
            raise Unauthenticated(
                "This request has no API key or token, or two that differ. Send one, as `Authorization: "
                "Bearer …` or as `X-API-Key`."
            )
        known = hash(credential)

        async def before_look_up() -> None:
            if known not in self._known_good:
                await self._rates.require(self._rates.failures, "failures", address)

        authenticator: Authenticator = scope["app"].state.authenticator
        try:
            principal = await authenticator.authenticate(credential, before_look_up)
        except Unauthenticated:
            self._known_good.pop(known, None)
            await self._rates.hit(self._rates.failures, "failures", address)
            raise
        self._known_good[known] = True
        return principal


def _origin(scope: Scope) -> dict[str, str | None]:
    """Return where a request came from, and its id, which is the caller's own word where he gave one."""
    state = scope["state"]
    return {
        "address": scope["client"][0] if scope.get("client") else None,
        "request_id": state.get("request_id", ""),
        "request_id_by": "caller" if state.get("request_id_given") else "service",
    }


@functools.lru_cache(maxsize=4096)
def _counted(address: str) -> str:
    """Return as what an address is counted: of IPv6 the /64, of which one caller has all."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))


def _word(text: str | None) -> str | None:
    """Return what is an id, or nothing: a path may hold anything."""
    return text if text is not None and is_id(text) else None


def _credential(headers: Headers) -> str | None:
    """Return the one key or token of a request; two that differ are none, nor is an empty one."""
    given = {value.strip() for value in headers.getlist("x-api-key")}
    for value in headers.getlist("authorization"):
        scheme, _, credential = value.partition(" ")
        given.add(credential.strip() if scheme.lower() == "bearer" else "")
    return (given.pop() or None) if len(given) == 1 else None


class Rates:
    """The limits of requests, through `limits`: counted in a sliding window, in this process."""

    def __init__(self, settings: Settings) -> None:
        self.per_key = _parsed(settings.rate_per_key)
        self.per_address = _parsed(settings.rate_per_address)
        self.failures = _parsed(settings.failures_per_address if settings.auth != "none" else None)
        self._limiter: Any = None
        if self.per_key or self.per_address or self.failures:
            from limits.aio.storage import MemoryStorage  # noqa: PLC0415  (slow to import, and seldom needed)
            from limits.aio.strategies import SlidingWindowCounterRateLimiter  # noqa: PLC0415

            self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def hit(self, limits: Sequence[Any], kind: str, who: str) -> dict[str, str]:
        """Count a request, and return the headers that say what is left. Raises TooManyRequests."""
        said: dict[str, str] = {}
        for limit in limits:
            passed = await self._limiter.hit(limit, kind, who)
            left = await self._limiter.get_window_stats(limit, kind, who)
            seconds = max(1, round(left.reset_time - time.time()))
            window = f'"{kind}";q={limit.amount};w={limit.get_expiry()}'
            said = {
                "RateLimit-Policy": window,
                "RateLimit": f'"{kind}";r={max(0, left.remaining)};t={seconds}',
            }
            if not passed:
                raise _too_many(limit, kind, {**said, "Retry-After": str(seconds)})
        return said

    async def require(self, limits: Sequence[Any], kind: str, who: str) -> None:
        """Raise TooManyRequests if the rate is used up, without counting."""
        for limit in limits:
            if not await self._limiter.test(limit, kind, who):
                left = await self._limiter.get_window_stats(limit, kind, who)
                seconds = max(1, round(left.reset_time - time.time()))
                raise _too_many(limit, kind, {"Retry-After": str(seconds)})


def _parsed(rates: str | None) -> list[Any]:
    if rates is None:
        return []
    from limits import parse_many  # noqa: PLC0415  (slow to import, and seldom needed)

    return list(parse_many(rates))


def _too_many(limit: Any, kind: str, headers: dict[str, str]) -> TooManyRequests:
    named = {"failures": "failed authentications of one address", "key": "requests of one key"}
    what = named.get(kind, "requests of one address")
    return TooManyRequests(f"At most {limit.amount} {what} in {limit.get_expiry()} s.", headers)
