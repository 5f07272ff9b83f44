"""What browsers need: foreign pages are refused, configured origins are let in, and answers are protected.

Without authentication any page that is open in a browser on this machine could read and change everything:
- A page whose host name resolves to 127.0.0.1 (DNS rebinding) has the origin of the service, so only known
  names in `Host` are accepted.
- A page of another origin can do harm without reading the answer, so requests that a browser marks as such,
  by `Origin` or `Sec-Fetch-Site`, are refused.

Programs other than browsers do not send these two headers, so their requests pass. With authentication the
checks are not needed, because a page has no key. Browsers add cookies by themselves, so only the pages of the
console read a cookie, and each of their forms has a token.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import CrossSiteRequest, HostNotServed
from service.settings import Settings, host_name

# Orchestrators call these paths by address, and the answers have no data.
_HEALTH = frozenset({"/health/live", "/health/ready"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_QUOTED_CHARACTERS = 100
# The page for people and the files that it loads. They have no data, and their own policies.
PAGES = frozenset(
    {
        "/docs",
        "/redoc",
        "/docs/bar.css",
        "/docs/swagger-ui.css",
        "/docs/swagger-ui-bundle.js",
        "/docs/start.js",
    }
    | {"/", "/console", "/console/sign-in", "/console/console.css", "/console/console.js"}
)
# The pages of the console, which authenticate by a cookie, and answer errors as pages.
CONSOLE = "/console/"
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_NOTPAGES = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


# The headers of answers that a page of a configured origin may read, beside those that every page may.
EXPOSED = (
    "Allow",
    "Consistency-Token",
    "ETag",
    "Idempotent-Replayed",
    "Location",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-ID",
    "X-Should-Retry",
)


def for_browsers(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Put around an application what a browser needs in each of its answers, errors included.

    A page of a configured origin may use every method and every header, because clients have headers of
    their own (`x-stainless-*`), and because such a page is trusted with the whole API. It has its key or
    token itself; the service has no cookies, so credentials of the browser are not allowed.
    """
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=_origins(settings),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=EXPOSED,
        )
    return SecurityHeadersMiddleware(app, settings)


def _origins(settings: Settings) -> frozenset[str]:
    """Return the configured origins as browsers write them: in lower case, without a slash at the end."""
    return frozenset(origin.lower().rstrip("/") for origin in settings.cors_origins)


class HostAndOriginCheck:
    """Checks `Host`, `Origin` and `Sec-Fetch-Site` of a request."""

    def __init__(self, settings: Settings) -> None:
        self._open = settings.auth == "none"
        self._metrics_are_local = settings.metrics_token is None
        self._named = settings.host_names
        own = host_name(settings.host)
        self._names = self._named | _LOCAL | ({own} if own is not None else set())
        self._origins = _origins(settings)

    def require(self, scope: Scope, public: frozenset[str]) -> None:
        """Raise HostNotServed or CrossSiteRequest for a request that a foreign page may have caused.

        Pages of other origins may request `public` paths, because their answers have no data.
        """
        path = scope["path"]
        if path in _HEALTH or (path == "/metrics" and not self._metrics_are_local):
            return
        exposed = self._open or path == "/metrics"
        if not (exposed or self._named):
            return
        values: dict[bytes, list[bytes]] = {b"host": [], b"origin": [], b"sec-fetch-site": []}
        values |= {b"sec-fetch-mode": [], b"sec-fetch-dest": []}
        for name, value in scope["headers"]:
            if name in values:
                values[name].append(value)
        hosts = [value.decode("latin-1") for value in values[b"host"]]
        self._check_host(hosts)
        if _is_link(scope, values):
            return
        if exposed and path not in public and (values[b"origin"] or values[b"sec-fetch-site"]):
            self._check_origin(hosts[0], values[b"origin"], values[b"sec-fetch-site"])

    def _check_host(self, hosts: list[str]) -> None:
        if len(hosts) != 1:
            raise HostNotServed("A request must name this service in exactly one `Host` header.")
        if host_name(hosts[0]) not in self._names:
            raise HostNotServed(
                f"This service does not answer to the name {hosts[0][:_QUOTED_CHARACTERS]!r} in `Host`. If "
                "clients reach it by that name, add the name to CHAT_HOSTS (commas between several)."
            )

    def _check_origin(self, host: str, origins: list[bytes], sites: list[bytes]) -> None:
        if "*" in self._origins:
            return
        given = {value.decode("latin-1").lower() for value in origins}
        if given and given <= self._origins:
            return
        same_site = all(value in {b"same-origin", b"none"} for value in sites)
        if not (same_site and all(_is_of(origin, host) for origin in given)):
            raise CrossSiteRequest(
                "A page of another origin may not call this service while it runs without authentication. "
                "Add the page's origin to CHAT_CORS_ORIGINS, or set CHAT_AUTH."
            )


def _is_link(scope: Scope, values: dict[bytes, list[bytes]]) -> bool:
    """Tell whether a person follows a link to the console: the page that has the link cannot read it."""
    return (
        scope["method"] == "GET"
        and scope["path"].startswith(CONSOLE)
        and not values[b"origin"]
        and values[b"sec-fetch-mode"] == [b"navigate"]
        and values[b"sec-fetch-dest"] == [b"document"]
    )


def _is_of(origin: str, host: str) -> bool:
    """Tell whether an origin is this host and port; `null` never is."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = {"http": ":80", "https": ":443"}.get(parts.scheme)
    if default is None:
        return False
    return _plain(parts.netloc, default) == _plain(host, default)


def _plain(authority: str, default_port: str) -> tuple[str | None, str]:
    port = authority.rpartition("]")[2].partition(":")[2]
    return host_name(authority), f":{port}" if port else default_port


class SecurityHeadersMiddleware:
    """ASGI: adds headers to every answer that keep browsers from running, framing or caching it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        https = {"Strict-Transport-Security": "max-age=31536000"} if settings.tls_cert else {}
        self._on_pages = _raw(_ALWAYS | https)
        self._elsewhere = _raw(_ALWAYS | _NOTPAGES | https)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = self._on_pages if scope["path"] in PAGES else self._elsewhere

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                own = {name.lower() for name, _ in given}
                message["headers"] = given + [each for each in headers if each[0] not in own]
            await send(message)

        await self._app(scope, receive, send_with)


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
