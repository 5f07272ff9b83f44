"""Connections of a process: what the synchronous client has by nature (see `_async/connections.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from chat_history_client._requests import Call
from chat_history_client._retries import raise_unless_begun
from chat_history_client._settings import INHERITED, Settings

T = TypeVar("T")


class Connections(Settings[httpx.BaseTransport]):
    """The connections of this process, which all its threads share."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of this process."""
        http = self._open.get(None)
        if http is not None:
            http.close()

    def _http(self) -> httpx.Client:
        http: httpx.Client | None = self._open.get(None)
        if http is None:
            # Of two threads that come here at once, one has made a client in vain, and nothing else.
            http = self._open.setdefault(None, httpx.Client(**self._httpx_options()))
        return http

    def _chunks(self, call: Call) -> Generator[bytes, None, None]:
        """Yield the body of an answer as it comes; a child process goes on with a connection of its own."""
        http, opened = self._http(), self._open
        response = http.send(http.build_request(call.method, call.path, **self._request(call)), stream=True)
        chunks = response.iter_bytes()
        try:
            if not response.is_success:
                response.read()
            raise_unless_begun(call, response)
            for chunk in chunks:
                yield chunk
                if self._open is not opened:
                    raise httpx.ReadError("The connection belongs to the parent process.")
        finally:
            if self._open is opened:
                response.close()
            else:
                INHERITED.append((response, chunks))

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _settled(
        self,
        write: Callable[[], T],
        *,
        repeatable: bool = True,  # noqa: ARG002  (the asynchronous twin's)
        undo: Callable[[T], Any] | None = None,  # noqa: ARG002  (likewise)
    ) -> T:
        """Run a write to its outcome, which nothing cancels here."""
        return write()
