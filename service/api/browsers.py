"""Refuses what a browser can be made to send: requests under a foreign name, and requests of foreign pages.

Without authentication any page that is open on this machine could read and change everything. A page whose
name is made to mean 127.0.0.1 (DNS rebinding) would be of the service's own origin, so only known names are
served. A page of another origin needs no answer to do harm, so what a browser marks as such is refused.
Whatever is no browser sends none of these headers, and passes. With authentication none of it is needed,
because a page has no key: keys are never in cookies, which browsers add by themselves.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import Scope

from service.errors import CrossSiteRequest, HostNotServed
from service.settings import Settings, host_name

# Orchestrators ask these by address, and they say nothing of anybody.
_HEALTH = frozenset({"/health/live", "/health/ready"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_QUOTED_CHARACTERS = 100


class Browsers:
    """What is served to whom, by the headers `Host`, `Origin` and `Sec-Fetch-Site`."""

    def __init__(self, settings: Settings) -> None:
        self._open = settings.auth == "none"
        self._metrics_are_local = settings.metrics_token is None
        self._named = settings.host_names
        own = host_name(settings.host)
        self._names = self._named | _LOCAL | ({own} if own is not None else set())
        self._origins = frozenset(origin.lower() for origin in settings.cors_origins)

    def check(self, scope: Scope, public: frozenset[str]) -> None:
        """Raise HostNotServed or CrossSiteRequest for what a browser may have been made to send.

        A page may lead to a `public` path, where nothing is anybody's.
        """
        path = scope["path"]
        if path in _HEALTH or (path == "/metrics" and not self._metrics_are_local):
            return
        exposed = self._open or path == "/metrics"
        if not (exposed or self._named):
            return
        said: dict[bytes, list[bytes]] = {b"host": [], b"origin": [], b"sec-fetch-site": []}
        for name, value in scope["headers"]:
            if name in said:
                said[name].append(value)
        hosts = [value.decode("latin-1") for value in said[b"host"]]
        self._check_host(hosts)
        if exposed and path not in public and (said[b"origin"] or said[b"sec-fetch-site"]):
            self._check_origin(hosts[0], said[b"origin"], said[b"sec-fetch-site"])

    def _check_host(self, hosts: list[str]) -> None:
        if len(hosts) != 1 or host_name(hosts[0]) not in self._names:
            called = repr(hosts[0][:_QUOTED_CHARACTERS]) if hosts else "nothing"
            raise HostNotServed(
                f"This service does not answer to the name {called} in `Host`. If it is reached by that "
                "name, add the name to CHAT_HOSTS (commas between several)."
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


def _is_of(origin: str, host: str) -> bool:
    """Tell whether a page of this origin came from this host and port (`null` came from none)."""
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
