"""The HTTP connections: uvicorn's protocol with limits of time and size, and one request at a time.

uvicorn with httptools has no time limit for a client that does not send the head of a request or does not
read its answer. It parses as many pipelined requests as arrive, takes trailers for headers, and takes the
body of a request that says `Upgrade` for the next request. Other servers have gaps of their own, or cost more
(docs/decisions/0008-http-server.md).

The invariants, each proved in tests/integration/test_connections.py:

- A connection has at most one request that waits for its answer, and no byte behind that request is parsed.
- Only the bytes of the head become headers.
- The bytes that are neither head nor body (trailers, and lines between chunks) are limited by
  `header_bytes_max`.
- A time limit runs whenever the client has to send or to read.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import ChatHistoryError, HeadersTooLarge, MalformedRequest
from service.settings import Settings
from service.telemetry import metrics

_EMPTY_LINE = b"\r\n\r\n"
# The bytes beside the content of a chunk, for its size and its line ends, that are not counted.
_CHUNK_FRAME_BYTES = 20
_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:\d*)?\Z", re.ASCII)

_NOWHERE: deque[tuple[bytes, bytes]] = deque(maxlen=0)
_NOT_HTTP = "The bytes that were sent are not a request of HTTP/1.1."

log = structlog.get_logger(__name__)


class TimeoutHttpProtocol(HttpToolsProtocol):
    """One connection. Its bytes are parsed up to the end of a request, and no further until that is answered.

    A connection that stands still holds its socket and the buffers of the kernel, of the transport and of
    this class, at most some 400 KiB. A history that the client does not read is not read from the database
    either.

    The state of the application's lifespan has the `settings`, the application that answers if there are too
    many connections (`overloaded`), the function that shapes an error as a response (`error_response`), and
    the function that ends the streams (`end_streams`).
    """

    _buffer = b""  # the bytes that came; parsed up to `_parsed`, of which the last three bytes stay
    _parsed = 0
    _in_body = False
    _body_left: int | None = None  # bytes of a body with a Content-Length; a chunked body has None
    _overhead = 0  # bytes of the head, and those bytes of the body that are not content
    _surplus = False  # there were too many connections when this one was made
    _read_clock: asyncio.TimerHandle | None = None
    _send_clock: asyncio.TimerHandle | None = None

    # -- the connection ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self._settings: Settings = self.app_state["settings"]
        self._surplus = len(self.connections) > self._settings.connections_max
        self._expect_bytes_within(self._settings.header_timeout_ms)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limits."""
        self._expect_nothing()
        self._stop_sending()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End the connection when its answer is complete, and end the answers that would go on for ever."""
        super().shutdown()
        self.app_state["end_streams"]()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that sends no further request, as soon as its last answer is read."""
        self._close()

    def data_received(self, data: bytes) -> None:
        """Keep the bytes that came, and parse them as far as they may be parsed now."""
        self._buffer += data
        self._parse()

    # -- parsing -------------------------------------------------------------------------------------

    def _parse(self) -> None:
        """Parse the buffer piece by piece; no piece has bytes of two requests."""
        while self._parsed < len(self._buffer) and not self.transport.is_closing():
            if self._is_answering() and not self._in_body:
                if len(self._buffer) - self._parsed > self._settings.header_bytes_max:
                    self.transport.pause_reading()
                break
            start, self._parsed = self._parsed, self._end_of_piece()
            self._feed(self._buffer[start : self._parsed])
        if self._overhead and not self._in_body and self._read_clock is None:
            self._expect_bytes_within(self._settings.header_timeout_ms)  # for the rest of a head
        kept = max(0, self._parsed - len(_EMPTY_LINE) + 1)
        self._buffer, self._parsed = self._buffer[kept:], self._parsed - kept

    def _end_of_piece(self) -> int:
        """Return the end of the piece that is parsed next.

        A head and a chunked body end with an empty line. A piece may also end at an empty line inside a body,
        which does no harm.
        """
        if self._in_body and self._body_left is not None:
            return min(len(self._buffer), self._parsed + self._body_left)
        found = self._buffer.find(_EMPTY_LINE, max(0, self._parsed - len(_EMPTY_LINE) + 1))
        return len(self._buffer) if found < 0 else found + len(_EMPTY_LINE)

    def _feed(self, piece: bytes) -> None:
        self._overhead += len(piece)
        if self._overhead > self._settings.header_bytes_max and not self._in_body:
            self._refuse(self._too_large("a request line and its headers"))
            return
        if self._in_body and self._body_left is not None:
            self._body_left -= len(piece)
        try:
            self._feed_without_upgrade(piece)
        except MalformedRequest as error:
            self._refuse(error)
            return
        except httptools.HttpParserError as error:
            # If one of the callbacks below raised, httptools keeps that error as the context of its own.
            cause = error.__context__
            self._refuse(cause if isinstance(cause, MalformedRequest) else MalformedRequest(_NOT_HTTP))
            return
        self._overhead = max(0, self._overhead)
        if self._overhead > self._settings.header_bytes_max:
            self._refuse(self._too_large("a body's trailers and the lines between its chunks"))

    def _too_large(self, part: str) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"This service reads at most {self._settings.header_bytes_max} bytes of {part}."
        )

    def _feed_without_upgrade(self, piece: bytes) -> None:
        """Parse a piece; if it is a head with `Upgrade`, parse the head again without `Upgrade`.

        httptools skips the body of a request that asks for another protocol. A server may ignore `Upgrade`
        (RFC 9110, section 7.8).
        """
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        else:
            return
        if method == b"CONNECT":
            raise MalformedRequest("The method CONNECT is for proxies, and this service is not a proxy.")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join(lines) + _EMPTY_LINE)

    def on_message_begin(self) -> None:
        """Stop the time limit of the wait for a request; `_parse` starts the one of an incomplete head."""
        if self._in_body or self._is_answering():
            raise MalformedRequest("A request began before the one in front of it had ended.")
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._expect_nothing()

    def on_headers_complete(self) -> None:
        """Start the application, which has its own time limit for the body.

        If there are too many connections, another application answers with a problem document, because
        uvicorn's own answer is none.
        """
        if self.parser.should_upgrade():
            return  # `_feed_without_upgrade` parses this head again
        self._expect_nothing()
        self._body_left = self._require_valid_head()
        if b"://" in self.url:
            self._take_host_of_target()
        crowded = self._surplus and len(self.connections) > self._settings.connections_max
        self.app = self.app_state["overloaded"] if crowded else self.config.loaded_app
        super().on_headers_complete()
        self._in_body, self._overhead = True, 0
        # Headers that httptools reports after this are trailers. They could name another user or address, so
        # they are dropped.
        self.headers = _NOWHERE  # type: ignore[assignment]
        if crowded:
            self.cycle.keep_alive = False

    def _require_valid_head(self) -> int | None:
        """Refuse heads that RFC 9112 (2.3, 3.2) forbids and httptools accepts; return the Content-Length."""
        version = self.parser.get_http_version()
        if version not in {"1.1", "1.0"}:
            raise MalformedRequest("This service speaks only HTTP/1.1 and HTTP/1.0.")
        hosts, length = [], None
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                length = int(value)
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            raise MalformedRequest("A request must have exactly one `Host` header.")
        if hosts and not _HOST.match(hosts[0]):
            raise MalformedRequest("The `Host` header is not the name or the address of a host.")
        return length

    def _take_host_of_target(self) -> None:
        """Replace `Host` by the host of the target, if the target is a whole URL (RFC 9112, 3.2.2)."""
        target = httptools.parse_url(self.url)
        if target.host is None:
            return
        host = b"[%b]" % target.host if b":" in target.host else target.host
        others = [header for header in self.headers if header[0] != b"host"]
        self.headers[:] = [*others, (b"host", b"%b:%d" % (host, target.port) if target.port else host)]

    def on_body(self, body: bytes) -> None:
        """Subtract the content from the overhead, and collect pieces that come faster than they are read."""
        self._overhead -= len(body) + _CHUNK_FRAME_BYTES
        self.expect_100_continue = False  # the client sends the body, so it does not wait for a 100
        if self.cycle.body and not isinstance(self.cycle.body, bytearray):
            # `bytes += bytes` copies everything each time, and a chunked body may come in pieces of one byte.
            self.cycle.body = bytearray(self.cycle.body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body; if the answer was complete before, start the time limit of the next request."""
        if not self._in_body:
            return  # the end of a head with `Upgrade`, which is parsed again
        self._in_body, self._overhead = False, 0
        self._expect_nothing()
        super().on_message_complete()
        if not self._is_answering():
            self._expect_bytes_within(self.timeout_keep_alive * 1000)

    # -- answering -----------------------------------------------------------------------------------

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Parse on: the rest of a body that the application did not read, or the next request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()
        elif not self._in_body:
            if self._parsed < len(self._buffer):
                self.transport.resume_reading()
                self._parse()
        elif self.expect_100_continue:
            # The client may send the body without a 100, or the next request; the two cannot be told apart.
            self._close()
        else:
            self._unset_keepalive_if_required()
            self._expect_bytes_within(self._settings.header_timeout_ms)

    def _refuse(self, error: ChatHistoryError) -> None:
        """Close the connection, with an answer unless one was begun, of which it would look like a part."""
        metrics.request("(none)", "(none)", error.status, 0)
        log.debug("request_refused", problem=error.slug(), detail=error.detail)
        if not self._in_body or not self.cycle.response_started:
            self.transport.write(self._answer(error))
        self._close()

    def _answer(self, error: ChatHistoryError) -> bytes:
        response = self.app_state["error_response"](error)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = (b"%s: %s\r\n" % header for header in headers)
        return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", response.body])

    # -- ending --------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Close the connection as soon as the client has read what was written."""
        self._abandon()
        self.transport.close()
        self._expect_reading()

    def _abort(self) -> None:
        self._abandon()
        self.transport.abort()

    def _abandon(self) -> None:
        """Tell the application that the client is gone; the rest of its answer is dropped."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        """Start the time limit for the client to read."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """Stop the time limit, unless the connection closes: the client must still read the rest."""
        if not self.transport.is_closing():
            self._stop_sending()
        super().resume_writing()

    def _expect_reading(self) -> None:
        self._stop_sending()
        self._send_clock = self.loop.call_later(self._settings.send_timeout_ms / 1000, self._not_read)

    def _not_read(self) -> None:
        if self._is_answering():
            self.cycle.scope["state"]["problem"] = "answer-not-read"
        self._abort()

    def _stop_sending(self) -> None:
        if self._send_clock is not None:
            self._send_clock.cancel()
            self._send_clock = None

    def _expect_bytes_within(self, milliseconds: int) -> None:
        self._expect_nothing()
        self._read_clock = self.loop.call_later(milliseconds / 1000, self._abort)

    def _expect_nothing(self) -> None:
        if self._read_clock is not None:
            self._read_clock.cancel()
            self._read_clock = None
