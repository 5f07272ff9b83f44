"""The HTTP connections: uvicorn's protocol, held to one request at a time, a size and a time.

uvicorn with httptools takes a request's body for the next request where it says `Upgrade`, takes trailers for
headers, parses as many pipelined requests as come, and waits for ever for a head and for a reader. Each other
server leaves something open, too, or costs more (docs/decisions/0008-http-server.md).

The invariants, each proved in tests/integration/test_connections.py: a connection has at most one request
that waits for its answer, and nothing behind it is parsed; only the head's bytes become headers; what is
neither head nor body is at most `header_bytes_max` long; a client that owes something has a clock.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import metrics
from service.api import problems
from service.errors import ChatHistoryError, HeadersTooLarge, MalformedRequest
from service.settings import Settings

_EMPTY_LINE = b"\r\n\r\n"
# What the size of a chunk and its line ends may take beside the chunk without being counted.
_CHUNK_FRAME_BYTES = 20
_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:\d*)?\Z", re.ASCII)

_NOWHERE: deque[tuple[bytes, bytes]] = deque(maxlen=0)
_NOT_HTTP = "This is not a request of HTTP/1.1."

log = structlog.get_logger(__name__)


class PatientProtocol(HttpToolsProtocol):
    """One connection: its bytes are parsed up to the end of a request, and no further until that is answered.

    For a connection that stands still nothing is held but its socket and what the kernel, the transport and
    `_buffer` hold (some 400 KiB at the most): a history that nobody reads is not read from the database
    either. The settings come with the state of the application's lifespan.
    """

    _buffer = b""  # what came; parsed up to `_parsed`, of which the last three bytes stay
    _parsed = 0
    _in_body = False
    _body_left: int | None = None  # of a body whose length was said; else it ends with an empty line
    _overhead = 0  # bytes of the head; of the body only those that are not content
    _surplus = False  # this connection was one too many when it was made
    _read_clock: asyncio.TimerHandle | None = None
    _send_clock: asyncio.TimerHandle | None = None

    # -- the connection ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._settings: Settings = self.app_state["settings"]
        self._surplus = len(self.connections) > self._settings.connections_max
        self._expect_bytes_within(self._settings.header_timeout_ms)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clocks."""
        self._expect_nothing()
        self._stop_sending()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that sends no further request, once its last answer was read."""
        self._close()

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        self._buffer += data
        self._parse()

    # -- parsing -------------------------------------------------------------------------------------

    def _parse(self) -> None:
        """Parse what came, piece by piece; a piece has no bytes of two requests."""
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
        """Return where what is parsed next ends.

        A head and a chunked body end with an empty line. (So may other pieces of a body, which does no harm.)
        """
        if self._in_body and self._body_left is not None:
            return min(len(self._buffer), self._parsed + self._body_left)
        found = self._buffer.find(_EMPTY_LINE, max(0, self._parsed - len(_EMPTY_LINE) + 1))
        return len(self._buffer) if found < 0 else found + len(_EMPTY_LINE)

    def _feed(self, piece: bytes) -> None:
        self._overhead += len(piece)
        if self._overhead > self._settings.header_bytes_max and not self._in_body:
            self._refuse(HeadersTooLarge(f"At most {self._settings.header_bytes_max} bytes are read."))
            return
        if self._in_body and self._body_left is not None:
            self._body_left -= len(piece)
        try:
            self._feed_without_upgrade(piece)
        except MalformedRequest as error:
            self._refuse(error)
            return
        except httptools.HttpParserError as error:
            # Where one of our methods raised, httptools tells it as the context.
            said = error.__context__
            self._refuse(said if isinstance(said, MalformedRequest) else MalformedRequest(_NOT_HTTP))
            return
        self._overhead = max(0, self._overhead)
        if self._overhead > self._settings.header_bytes_max:
            self._refuse(HeadersTooLarge("The trailers or the lines between chunks are too long."))

    def _feed_without_upgrade(self, piece: bytes) -> None:
        """Parse; and parse a head that asks for another protocol again, as if it did not.

        httptools skips the body of such a request. RFC 9110, 7.8: a server may ignore what is asked.
        """
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        else:
            return
        if method == b"CONNECT":
            raise MalformedRequest("CONNECT is for proxies, and this service is none.")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join(lines) + _EMPTY_LINE)

    def on_message_begin(self) -> None:
        """End the wait for a request; what is not there of it when all was parsed has a time of its own."""
        if self._in_body or self._is_answering():
            raise MalformedRequest("A request began inside another.")
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._expect_nothing()

    def on_headers_complete(self) -> None:
        """From here on the application waits, for the body, with a time of its own.

        Where there are too many connections the answer is a problem document, which uvicorn's own is not.
        """
        if self.parser.should_upgrade():
            return  # it is parsed again
        self._expect_nothing()
        self._body_left = self._require_valid_head()
        if b"://" in self.url:
            self._take_host_of_target()
        crowded = self._surplus and len(self.connections) > self._settings.connections_max
        self.app = self.app_state["overloaded"] if crowded else self.config.loaded_app
        super().on_headers_complete()
        self._in_body, self._overhead = True, 0
        # What httptools still tells of as headers are trailers. They could name another user or address.
        self.headers = _NOWHERE  # type: ignore[assignment]
        if crowded:
            self.cycle.keep_alive = False

    def _require_valid_head(self) -> int | None:
        """Refuse what RFC 9112 (2.3, 3.2) refuses and httptools does not; return the length of the body."""
        version = self.parser.get_http_version()
        if version not in {"1.1", "1.0"}:
            raise MalformedRequest("Only HTTP/1.1 and HTTP/1.0 are spoken.")
        hosts, length = [], None
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                length = int(value)
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            raise MalformedRequest("A request has just one Host.")
        if hosts and not _HOST.match(hosts[0]):
            raise MalformedRequest("The Host is not a name or an address.")
        return length

    def _take_host_of_target(self) -> None:
        """Let the host of a whole URL as target stand in the place of `Host` (RFC 9112, section 3.2.2)."""
        target = httptools.parse_url(self.url)
        if target.host is None:
            return
        host = b"[%b]" % target.host if b":" in target.host else target.host
        others = [header for header in self.headers if header[0] != b"host"]
        self.headers[:] = [*others, (b"host", b"%b:%d" % (host, target.port) if target.port else host)]

    def on_body(self, body: bytes) -> None:
        """Count what is content, and so what is not; gather pieces that come faster than they are read."""
        self._overhead -= len(body) + _CHUNK_FRAME_BYTES
        self.expect_100_continue = False  # it is not waited for, or was given: the rest of the body follows
        if self.cycle.body and not isinstance(self.cycle.body, bytearray):
            # `bytes += bytes` copies all before it, and a piece may be one byte of a chunked body.
            self.cycle.body = bytearray(self.cycle.body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Go on to the answer; if that was given before, wait for the next request."""
        if not self._in_body:
            return  # of a head that asked for another protocol, and is parsed again
        self._in_body, self._overhead = False, 0
        self._expect_nothing()
        super().on_message_complete()
        if not self._is_answering():
            self._expect_bytes_within(self.timeout_keep_alive * 1000)

    # -- answering -----------------------------------------------------------------------------------

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Read on: the rest of a body that nobody wants, or the next request, which may have come."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()
        elif not self._in_body:
            if self._parsed < len(self._buffer):
                self.transport.resume_reading()
                self._parse()
        elif self.expect_100_continue:
            # Whether the body comes all the same, or the next request, nobody can tell.
            self._close()
        else:
            self._unset_keepalive_if_required()
            self._expect_bytes_within(self._settings.header_timeout_ms)

    def _refuse(self, error: ChatHistoryError) -> None:
        """End the connection; with an answer, unless one was begun, which it would be taken for a part of."""
        metrics.request("(none)", "(none)", error.status, 0)
        log.debug("request_refused", problem=error.slug(), detail=error.detail)
        if not self._in_body or not self.cycle.response_started:
            self.transport.write(self._answer(error))
        self._close()

    def _answer(self, error: ChatHistoryError) -> bytes:
        response = problems.problem(error)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = (b"%s: %s\r\n" % header for header in headers)
        return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", response.body])

    # -- ending --------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Close as soon as what was answered is read."""
        self._abandon()
        self.transport.close()
        self._expect_reading()

    def _abort(self) -> None:
        self._abandon()
        self.transport.abort()

    def _abandon(self) -> None:
        """Let the application stop: what it still sends of an answer is dropped."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """Go on: it has read. Of a connection that is closed it must read the rest."""
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
