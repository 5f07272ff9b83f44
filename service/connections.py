"""Ends connections that stand still: uvicorn itself waits for ever for a request, and for a reader."""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import Settings

_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a clock for what a client owes: headers, a body's end, or reading on.

    Nothing is held for such a connection but its socket and what the kernel and the transport buffer (some
    64 KiB): a history that nobody reads is not read from the database either. The settings come with the
    state of the application's lifespan.
    """

    _clock: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    _head_end = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._start(self._settings.header_timeout_ms)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Give every further request of the connection its time, too."""
        self._in_head = True
        super().on_message_begin()
        if self._clock is None:
            self._start(self._settings.header_timeout_ms)

    def data_received(self, data: bytes) -> None:
        """Take in what came, unless it is more of a request's head than anybody needs."""
        if self._in_head and self._head_too_large(data):
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()
            return
        super().data_received(data)

    def _head_too_large(self, data: bytes) -> bool:
        """Tell whether the head, and not the body that comes with it, is more than the setting allows."""
        room = max(0, self._settings.header_bytes_max - self._head_bytes)
        self._head_bytes += len(data)
        # Its end may lie across two pieces.
        searched = self._head_end + data[:room]
        self._head_end = data[-3:]
        return len(data) > room and b"\r\n\r\n" not in searched

    def on_headers_complete(self) -> None:
        """From here on the application waits, for the body, with a time of its own.

        Where there are too many connections the answer is a problem document, which uvicorn's own is not.
        """
        self._in_head, self._head_bytes, self._head_end = False, 0, b""
        self._stop()
        if b"://" in self.url:
            self._take_host_of_target()
        crowded = len(self.connections) > self._settings.connections_max
        self.app = self.app_state["overloaded"] if crowded else self.config.loaded_app
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body. Where pieces come faster than they are read, they are gathered in place."""
        if self.cycle.body and not isinstance(self.cycle.body, bytearray):
            # `bytes += bytes` copies all before it, and a piece may be one byte of a chunked body.
            self.cycle.body = bytearray(self.cycle.body)
        super().on_body(body)

    def _take_host_of_target(self) -> None:
        """Let the host of a whole URL as target stand in the place of `Host` (RFC 9112, section 3.2.2)."""
        target = httptools.parse_url(self.url)
        if target.host is None:
            return
        host = b"[%b]" % target.host if b":" in target.host else target.host
        others = [header for header in self.headers if header[0] != b"host"]
        self.headers[:] = [*others, (b"host", b"%b:%d" % (host, target.port) if target.port else host)]

    def on_response_complete(self) -> None:
        """Give a body that is not read any more, the answer being sent, a last time to end."""
        unread = self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._start(self._settings.header_timeout_ms)

    def on_message_complete(self) -> None:
        """It has ended."""
        self._stop()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._start(self._settings.send_timeout_ms)

    def resume_writing(self) -> None:
        """It has read."""
        self._stop()
        super().resume_writing()

    @property
    def _settings(self) -> Settings:
        settings: Settings = self.app_state["settings"]
        return settings

    def _start(self, milliseconds: int) -> None:
        self._stop()
        self._clock = self.loop.call_later(milliseconds / 1000, self.transport.abort)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
