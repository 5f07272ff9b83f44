"""What both clients are made with, and how their connections survive a fork.

Every process has its own connections: a child of `os.fork()` opens new ones and leaves its parent's alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import httpx

from chat_history_client._requests import Call
from chat_history_client.types import Json

TransportT = TypeVar("TransportT")

URL_VARIABLE = "CHAT_HISTORY_URL"
KEY_VARIABLE = "CHAT_HISTORY_API_KEY"
_COMMIT_HEADER = "Consistency-Token"
DEFAULT_URL = "http://127.0.0.1:8000"

_CLIENTS: WeakSet[Settings[Any]] = WeakSet()
# Connections that belong to the parent of this process. They are kept, because to close one could end it for
# the parent, too: TLS says goodbye, and an event loop shares its selector with the loop it was copied from.
INHERITED: list[Any] = []


def _after_fork() -> None:
    for each in list(_CLIENTS):
        each.leave_connections_to_parent()


if hasattr(os, "register_at_fork"):
    # A child has one thread, and this runs in it before anything else, so no lock is needed, and none that
    # another thread of the parent held can be in the way.
    os.register_at_fork(after_in_child=_after_fork)


def _url(base_url: str | httpx.URL | None) -> httpx.URL:
    """Return the service's URL, or raise the ValueError that says what is wrong with it."""
    name = "`base_url`"
    if base_url is None:
        name, base_url = URL_VARIABLE, os.environ.get(URL_VARIABLE) or DEFAULT_URL
    try:
        url = httpx.URL(base_url)
        host = url.host
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{name} is not a URL: {error}. Give one like http://127.0.0.1:8000.") from error
    if url.scheme not in {"http", "https"}:
        why = f"has the scheme {url.scheme!r}" if url.scheme else "has no scheme"
    elif not host or "%" in host:
        why = f"has the host {host!r}"
    elif url.port is not None and not 0 < url.port < 65_536:
        why = f"has the port {url.port}"
    else:
        return url
    raise ValueError(f"{name} {why}. Give one like http://127.0.0.1:8000 or https://chat.example.com.")


def _headers(api_key: str | None, more: Mapping[str, str] | None) -> dict[str, str]:
    headers = dict(more or {})
    if not {"authorization", "x-api-key"} & {name.lower() for name in headers}:
        key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
    elif api_key:
        raise ValueError("Give either `api_key` or a header that authenticates, not both.")
    for name, value in headers.items():
        # The value may be secret, so it is not quoted.
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(
                f"The header {name} has a value that HTTP cannot carry (a line break, a space at an end, or "
                "a character that is not ASCII). If it is from a file, strip it."
            )
    return headers


class Settings(Generic[TransportT]):
    """What a client is made with, and the connections that it opened in this process.

    `base_url` is the service's, else `CHAT_HISTORY_URL`, else http://127.0.0.1:8000. `api_key` is an API key
    or a token, else `CHAT_HISTORY_API_KEY`; an empty one sends none. `timeout_s` is that of one attempt, and
    `retry_s` how long a call is repeated. `transport` is httpx's, or a function that makes one, which is
    needed where there are several event loops or processes.
    """

    def __init__(
        self,
        base_url: str | httpx.URL | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: TransportT | Callable[[], TransportT] | None = None,
    ) -> None:
        self._options: Json = {
            "base_url": _url(base_url),
            "timeout": timeout_s,
            "headers": _headers(api_key, headers),
            # To make one takes longer than a call, so all event loops and processes share it.
            "verify": httpx.create_ssl_context(),
        }
        self._transport = transport
        self._transport_is_inherited = False
        self._retry_s = retry_s
        # After a cancellation a write has as long as a call that begins now.
        self._outcome_s = retry_s + timeout_s
        self._open: dict[Any, Any] = {}
        # What the service has stored for this client, for a process of the service that may not know it yet.
        self._token = ""
        _CLIENTS.add(self)

    def leave_connections_to_parent(self) -> None:
        """Begin without connections, in a child process, and keep the parent's untouched."""
        INHERITED.append(self._open)
        self._open = {}
        self._transport_is_inherited = True

    def _request(self, call: Call) -> Json:
        """Return a call as httpx takes it: a read names the latest write that this client knows of."""
        options = call.options()
        if self._token and call.method == "GET":
            options["headers"][_COMMIT_HEADER] = self._token
        if call.silence_s:
            timeout_s = self._options["timeout"]
            options["timeout"] = httpx.Timeout(timeout_s, read=max(timeout_s, call.silence_s))
        return options

    def _note(self, response: httpx.Response) -> httpx.Response:
        """Remember what the service has stored. Of two tokens the later one is the greater text."""
        self._token = max(self._token, response.headers.get(_COMMIT_HEADER, ""))
        return response

    def _httpx_options(self) -> Json:
        if self._transport is None:
            return self._options
        if callable(self._transport):
            return {**self._options, "transport": self._transport()}
        if self._transport_is_inherited:
            raise RuntimeError(
                "This client's `transport` holds the connections of the parent process. Give the client a "
                "function that makes a transport, and each process has its own."
            )
        return {**self._options, "transport": self._transport}
