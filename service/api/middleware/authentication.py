"""Authenticates every request, limits its rate, and notes it in the audit trail.

The middleware runs before the routes, so no route can forget it: only the paths in PUBLIC need no credential.
"""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Sequence
from typing import Any

from cachetools import TTLCache
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.authentication import ANYBODY, Principal
from service.api import paths
from service.api.dependencies import Resources
from service.api.middleware.browsers import CONSOLE, PAGES, HostAndOriginCheck
from service.api.problems import respond
from service.errors import ChatHistoryError, TooManyRequests, Unauthenticated
from service.settings import Settings
from service.tenancy import is_valid_id

PUBLIC = frozenset({"/health/live", "/health/ready", "/openapi.json"}) | PAGES
# `/metrics` checks its own token.
_OWN_GATE = frozenset({"/metrics"})
_KNOWN_GOOD_S = 600


class AuthenticationMiddleware:
    """ASGI: puts the principal into the state of the request, or answers with a 401, 403, 421, 429 or 503.

    Rates are counted in this process.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._open = settings.auth == "none"
        self._settings = settings
        self._host_and_origin = HostAndOriginCheck(settings)
        self._rates = RateLimiter(settings)
        # Credentials that authenticated recently. They skip the limit of failures, so that guessing from one
        # address cannot lock out valid clients behind it.
        self._known_good: TTLCache[int, bool] = TTLCache(ADDRESSES_MOST, _KNOWN_GOOD_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        headers: dict[str, str] = {}
        try:
            paths.decode(scope)
            self._host_and_origin.require(scope, PUBLIC)
            if scope["path"] not in _OWN_GATE:
                await self._admit(scope, headers)
        except ChatHistoryError as error:
            state["problem"] = error.slug()
            self._note_refused(scope, error.status)
            await respond(error, scope, self._settings.retry_after_s)(scope, receive, send)
            return
        status, noted = 500, False  # the status if the application raises before it answers

        def note() -> None:
            # When the answer begins, because it may go on for hours.
            nonlocal noted
            signed_in = scope["state"].get("principal") not in {None, ANYBODY}
            if self._settings.audit_days and (signed_in or scope["path"] not in PUBLIC) and not noted:
                noted = True
                self._note(scope, status)

        async def send_with(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(headers)
                note()
            await send(message)

        if not headers and not self._settings.audit_days:
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send_with)
        finally:
            note()

    def _note(self, scope: Scope, status: int) -> None:
        """Add the request to the audit trail: the principal, the call, the conversation and the user."""
        principal: Principal | None = scope["state"].get("principal")
        if principal is None:  # a path that checks its own token
            if status == Unauthenticated.status:
                self._note_refused(scope, status)
            return
        audit = _resources(scope).audit
        if audit is None:
            return
        named = {**scope.get("path_params", {}), **scope["state"].get("audited", {})}
        audit.note(
            principal=principal.name,
            tenant=principal.scope.tenant,
            method=scope["method"],
            route=str(getattr(scope.get("route"), "path_format", "(none)")),
            status=status,
            conversation_id=_word(named.get("conversation_id")),
            # A caller that is one user reads only that user's data, whatever user the request names.
            user_id=principal.scope.user_id or _word(named.get("user_id")),
            **_origin(scope),
        )

    @staticmethod
    def _note_refused(scope: Scope, status: int) -> None:
        """Add a refused request to the audit trail, with the principal if it is known."""
        audit = _resources(scope).audit
        if audit is None:
            return
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

    async def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        """Put the principal into the state, and into `headers` what is left of the rates."""
        address = _counted(scope["client"][0]) if scope.get("client") else ""
        if self._rates.per_address:
            headers |= await self._rates.hit(self._rates.per_address, "address", address)
        if scope["path"] in PUBLIC:
            scope["state"] |= {
                "principal": ANYBODY,
                "sign_in": functools.partial(self._sign_in, scope, address),
            }
            return
        principal = ANYBODY if self._open else await self._authenticated(scope, address)
        scope["state"]["principal"] = principal
        if self._rates.per_key:
            # A tenant's name has no newline, so different callers have different keys.
            who = f"{principal.scope.tenant}\n{principal.name}"
            headers |= await self._rates.hit(self._rates.per_key, "key", who)

    async def _sign_in(self, scope: Scope, address: str, credential: str) -> None:
        """Put the principal of a credential into the state, for the page on which people sign in."""
        try:
            scope["state"]["principal"] = await self._principal_of(credential, scope, address)
        except ChatHistoryError as error:
            self._note_refused(scope, error.status)
            raise

    async def _authenticated(self, scope: Scope, address: str) -> Principal:
        headers = Headers(scope=scope)
        credential = _credential(headers)
        if credential is None:
            if scope["path"].startswith(CONSOLE) and (of_session := await _of_session(scope, headers)):
                again = functools.partial(_still_of_session, scope, headers)
                scope["state"]["authenticate_again"] = again
                return of_session
            # Not counted as a failure, because no credential was tried.
            raise Unauthenticated(
                "This request has no API key or token, or two that differ. Send one, as `Authorization: "
                "Bearer …` or as `X-API-Key`."
            )
        return await self._principal_of(credential, scope, address)

    async def _principal_of(self, credential: str, scope: Scope, address: str) -> Principal:
        known = hash(credential)

        async def before_look_up() -> None:
            if known not in self._known_good:
                await self._rates.require(self._rates.failures, "failures", address)

        try:
            principal = await _resources(scope).authenticator.authenticate(credential, before_look_up)
        except Unauthenticated:
            self._known_good.pop(known, None)
            await self._rates.hit(self._rates.failures, "failures", address)
            raise
        self._known_good[known] = True
        # For calls that take long. The state has no credential, because somebody might log it.
        again = functools.partial(_resources(scope).authenticator.authenticate, credential, _nothing)
        scope["state"]["authenticate_again"] = again
        return principal


async def _nothing() -> None:
    """Do nothing before a key is looked up again, because it was good when the call began."""


def _resources(scope: Scope) -> Resources:
    process_resources: Resources = scope["app"].state.resources
    return process_resources


def _origin(scope: Scope) -> dict[str, str | None]:
    """Return the address of a request, its id, and whether the caller or the service chose the id."""
    state = scope["state"]
    return {
        "address": scope["client"][0] if scope.get("client") else None,
        "request_id": state.get("request_id", ""),
        "request_id_by": "caller" if state.get("request_id_given") else "service",
    }


@functools.lru_cache(maxsize=4096)
def _counted(address: str) -> str:
    """Return what an address is counted as: for IPv6 the /64, because one caller has a whole /64."""
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
    """Return the text if it is a valid id, or None, because a path may contain any text."""
    return text if text is not None and is_valid_id(text) else None


def _credential(headers: Headers) -> str | None:
    """Return the key or token of a request, or None if it is missing or empty, or if two of them differ."""
    given = {value.strip() for value in headers.getlist("x-api-key")}
    for value in headers.getlist("authorization"):
        scheme, _, credential = value.partition(" ")
        given.add(credential.strip() if scheme.lower() == "bearer" else "")
    return (given.pop() or None) if len(given) == 1 else None


async def _of_session(scope: Scope, headers: Headers) -> Principal | None:
    """Return the principal of the console's cookie, or None where nobody has signed in."""
    cookies = cookie_parser(headers.get("cookie", ""))
    if not cookies:
        return None
    process = _resources(scope)
    sessions = await process.sessions()
    caller = sessions.caller(cookies.get(sessions.cookie_name(secure=scope["scheme"] == "https")))
    return None if caller is None else await process.authenticator.of_session(caller, sessions)


async def _still_of_session(scope: Scope, headers: Headers) -> Principal:
    """Return the principal of the cookie, as long as its session lasts. Raises Unauthenticated."""
    principal = await _of_session(scope, headers)
    if principal is None:
        raise Unauthenticated("The session of the console is over.")
    return principal


ADDRESSES_MOST = 100_000


class RateLimiter:
    """Limits the rate of requests with the package `limits`, in a sliding window, in this process."""

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
        """Count a request, and return the headers with what is left of the rate. Raises TooManyRequests."""
        headers: dict[str, str] = {}
        for limit in limits:
            passed = await self._limiter.hit(limit, kind, who)
            left = await self._limiter.get_window_stats(limit, kind, who)
            seconds = max(1, round(left.reset_time - time.time()))
            window = f'"{kind}";q={limit.amount};w={limit.get_expiry()}'
            headers = {
                "RateLimit-Policy": window,
                "RateLimit": f'"{kind}";r={max(0, left.remaining)};t={seconds}',
            }
            if not passed:
                raise _too_many(limit, kind, {**headers, "Retry-After": str(seconds)})
        return headers

    async def require(self, limits: Sequence[Any], kind: str, who: str) -> None:
        """Raise TooManyRequests if the rate is used up. The request is not counted."""
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
    return TooManyRequests(
        f"At most {limit.amount} {what} are allowed in {limit.get_expiry()} s. Try again after as many "
        "seconds as `Retry-After` says.",
        headers,
    )
