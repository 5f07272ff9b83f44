"""The connection itself, over raw sockets: what belongs to a request, what has an end, and when."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import pytest

from tests.harness import Service, append, create, new_id, running
from tests.integration.test_bad_days import MEGABYTE, ends, resident_bytes

# After an answer uvicorn waits 5 s for the next request; the rest is for a slow machine.
IDLE_ENDS_WITHIN_S = 14.0
HOST = b"Host: localhost\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = {"header_timeout_ms": 2_000, "body_timeout_ms": 3_000, "send_timeout_ms": 2_000, "hosts": "x"}
    with running(tmp_path_factory.mktemp("connections"), **limits) as service:
        yield service


@pytest.fixture(scope="module")
def long_history(impatient: Service) -> str:
    """The path of 20 MB, more than the kernel takes of an answer that nobody reads."""
    with impatient.client() as client:
        conversation = create(client, new_id())
        for _ in range(10):
            append(client, conversation, *({"role": "user", "content": "x" * 100_000} for _ in range(20)))
    return f"/conversations/{conversation}/messages"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def mark(self) -> str:
        """The id that the request was given: it says whose answer this is."""
        return self.headers.get("x-request-id", "")


class Answers:
    """Reads answers as a strict client does; what is no answer is an error."""

    def __init__(self) -> None:
        self.whole: list[Answer] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._now = Answer()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._now.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self._now.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._now.body += body

    def on_message_complete(self) -> None:
        self.whole.append(self._now)


class Wire:
    """One connection, and the answers that came on it."""

    def __init__(self, service: Service, *pieces: bytes, pause_s: float = 0.1) -> None:
        self.socket = socket.create_connection(("127.0.0.1", service.port), 10)
        self.answers = Answers()
        self.ended = False
        self.send(*pieces, pause_s=pause_s)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes, pause_s: float = 0.1) -> None:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(pause_s)
            try:
                self.socket.sendall(piece)
            except OSError:
                return

    def read(self, count: int = 1 << 30, within_s: float = 10.0) -> list[Answer]:
        """Return the answers so far: `count` of them, or all until the connection ends or time is up."""
        deadline = time.monotonic() + within_s
        while not self.ended and len(self.answers.whole) < count and time.monotonic() < deadline:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self.socket.recv(1 << 20)
            except TimeoutError:
                break
            except OSError:
                data = b""
            self.ended = not data
            self.answers.feed(data)
        return self.answers.whole

    def statuses(self, count: int = 1 << 30, within_s: float = 10.0) -> list[int]:
        return [each.status for each in self.read(count, within_s)]

    def is_quiet(self) -> bool:
        """Tell whether no further answer comes for a while."""
        before = len(self.answers.whole)
        return len(self.read(within_s=0.5)) == before


def post(path: str, body: bytes, *lines: str, chunked: bool = False) -> bytes:
    head = "".join(f"{each}\r\n" for each in (f"POST {path} HTTP/1.1", "Host: localhost", *lines))
    head += "Content-Type: application/json\r\n"
    if chunked:
        half = len(body) // 2
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part)
        return head.encode() + CHUNKED + chunks + b"0\r\n\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def marked(mark: str, path: str = "/health/live") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {mark}\r\n\r\n".encode()


def stream(mark: str, path: str) -> bytes:
    return marked(mark, path).replace(b"\r\n\r\n", b"\r\nAccept: application/x-ndjson\r\n\r\n")


# -- Upgrade -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["h2c", "websocket", "foo", "TLS/1.0, h2c"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_asks_for_another_protocol_is_served_as_it_is(
    impatient: Service, asked: str, chunked: bool
) -> None:
    # As curl --http2 and Java's HttpClient send it.
    lines = (
        "Connection: Upgrade, HTTP2-Settings",
        f"upgrade: {asked}",
        "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    )
    user = new_id("user")
    request = post("/conversations", b'{"user_id": "%s"}' % user.encode(), *lines, chunked=chunked)
    head = request.index(b"\r\n\r\n") + 4
    for pieces in (
        [request],
        [request[:head], request[head:]],
        [request[:30], request[30 : head - 1], request[head - 1 : head + 3], request[head + 3 :]],
        [request[at : at + 1] for at in range(len(request))],
        [request + marked("behind")],
    ):
        with Wire(impatient, *pieces, pause_s=0.05 if len(pieces) < 9 else 0) as wire:
            assert wire.statuses(1)[:1] == [201]
            assert f'"{user}"'.encode() in wire.answers.whole[0].body
            if len(pieces[0]) <= len(request):
                wire.send(marked("behind"))
            assert wire.statuses(2) == [201, 200]
            assert wire.answers.whole[1].mark == "behind"
            assert wire.is_quiet()


def test_the_body_of_a_request_that_asks_to_upgrade_is_never_another_request(impatient: Service) -> None:
    for asked in ("foo", "h2c", "websocket"):
        for chunked in (False, True):
            lines = ("Connection: Upgrade", f"Upgrade: {asked}")
            request = post("/conversations", LIVE, *lines, chunked=chunked)
            head = request.index(b"\r\n\r\n") + 4
            for pieces in ([request], [request[:head], request[head:]]):
                with Wire(impatient, *pieces) as wire:
                    assert wire.statuses(1) == [400]
                    assert wire.is_quiet()
                    assert wire.answers.whole[0].body.count(b"malformed-body") == 1


def test_a_get_that_asks_for_a_websocket_is_a_get(impatient: Service) -> None:
    lines = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\n"
    with Wire(impatient, LIVE.replace(b"\r\n\r\n", b"\r\n" + lines + b"\r\n") * 2 + marked("last")) as wire:
        assert wire.statuses(3) == [200, 200, 200]
        assert wire.answers.whole[2].mark == "last"


class SmallProxy:
    """A reverse proxy that keeps one connection to the service, and passes `Upgrade` on."""

    def __init__(self, service: Service) -> None:
        self._there = Wire(service)

    def pass_on(self, request: bytes, body: bytes = b"") -> Answer:
        self._there.send(*filter(None, [request, body]), pause_s=0.3)
        return self._there.read(1).pop(0)

    def close(self) -> None:
        self._there.socket.close()


def test_callers_behind_one_proxy_never_get_each_others_answers(impatient: Service) -> None:
    with impatient.client() as client:
        conversation = create(client, user="victim")
        append(client, conversation, {"role": "user", "content": "VICTIM SECRET"})
    history = f"/conversations/{conversation}/messages"
    for asked in ("foo", "h2c", "websocket"):
        proxy = SmallProxy(impatient)
        try:
            attack = post(
                "/conversations", LIVE, "X-Request-ID: attack", "Connection: Upgrade", f"Upgrade: {asked}"
            )
            assert proxy.pass_on(attack[: -len(LIVE)], LIVE).mark == "attack"
            theirs = proxy.pass_on(marked("victim", history))
            assert theirs.mark == "victim"
            assert b"VICTIM SECRET" in theirs.body
            after = proxy.pass_on(marked("attacker"))
            assert after.mark == "attacker"
            assert b"VICTIM" not in after.body
        finally:
            proxy.close()


# -- what is a request ---------------------------------------------------------------------------------

BODY = b"Content-Length: 3\r\n"
MALFORMED = {
    "both lengths": b"Host: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way": HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Host: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "two equal lengths": b"Host: localhost\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": b"Host: localhost\r\nContent-Length: 3, 3\r\n\r\nabc",
    "a signed length": b"Host: localhost\r\nContent-Length: +3\r\n\r\nabc",
    "a negative length": b"Host: localhost\r\nContent-Length: -3\r\n\r\nabc",
    "a length in hex": b"Host: localhost\r\nContent-Length: 0x3\r\n\r\nabc",
    "a length that overflows": b"Host: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\nabc",
    "xchunked": b"Host: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked, identity": b"Host: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a folded header": b"Host: localhost\r\nX-A: b\r\n c\r\n" + BODY + b"\r\nabc",
    "a folded upgrade": b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade:\r\n foo\r\n" + BODY + b"\r\nabc",
    "a space before the colon": b"Host: localhost\r\nContent-Length : 3\r\n\r\nabc",
    "a space before the colon of upgrade": b"Host: localhost\r\nConnection: upgrade\r\nUpgrade : foo\r\n\r\n",
    "a header without a colon": b"Host: localhost\r\nfoo\r\n\r\n",
    "a bare CR": b"Host: localhost\r\nX-A: b\rc\r\n\r\n",
    "a NUL": b"Host: localhost\r\nX-A: b\0c\r\n\r\n",
    "a bare LF": b"Host: localhost\r\nX-A: b\nX-B: c\r\n\r\n",
    "no Host": b"Content-Length: 0\r\n\r\n",
    "two Hosts": b"Host: localhost\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "two Hosts that differ": b"Host: localhost\r\nhost: y\r\nContent-Length: 0\r\n\r\n",
    "a Host with a space": b"Host: a b\r\nContent-Length: 0\r\n\r\n",
    "a Host with a path": b"Host: a/b\r\nContent-Length: 0\r\n\r\n",
    "a Host with a user": b"Host: a@b\r\nContent-Length: 0\r\n\r\n",
    "two in one Host": b"Host: a, b\r\nContent-Length: 0\r\n\r\n",
    "a chunk size with LF": b"Host: localhost\r\n" + CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "a chunk size with 0x": b"Host: localhost\r\n" + CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk size that overflows": b"Host: localhost\r\n"
    + CHUNKED
    + b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "a negative chunk size": b"Host: localhost\r\n" + CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "a chunk longer than it says": b"Host: localhost\r\n" + CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
}
WHOLE = {
    "HTTP/0.9": b"GET /health/live\r\n\r\n",
    "HTTP/2.0": b"GET /health/live HTTP/2.0\r\nHost: localhost\r\n\r\n",
    "HTTP/1.2": b"GET /health/live HTTP/1.2\r\nHost: localhost\r\n\r\n",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: localhost\r\n\r\n" + LIVE,
    "CONNECT that upgrades": b"CONNECT x:1 HTTP/1.1\r\n"
    + HOST
    + b"Connection: upgrade\r\nUpgrade: a\r\n\r\n",
    "two Hosts in HTTP/1.0": b"GET /health/live HTTP/1.0\r\nHost: localhost\r\nHost: y\r\n\r\n",
    "a handshake of TLS": bytes.fromhex("16030100050100000100"),
    "no method": b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("case", [*MALFORMED, *WHOLE])
def test_what_is_no_request_is_a_400_and_the_connection_ends(impatient: Service, case: str) -> None:
    request = (
        WHOLE.get(case)
        or b"POST /conversations HTTP/1.1\r\nContent-Type: application/json\r\n" + MALFORMED[case]
    )
    with Wire(impatient, request + LIVE) as wire:
        assert wire.statuses() == [400]
        assert wire.ended
        (answer,) = wire.answers.whole
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/problem+json"
        assert b"urn:chat-history:problem:malformed-" in answer.body


def test_what_is_unusual_and_a_request_is_served(impatient: Service) -> None:
    body = b'{"user_id": "ada"}'
    start = b"POST /conversations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"%x;a=b\r\n%s\r\n000\r\nX-Trailer: y\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n" % (
        len(body),
        body,
    )
    tiny = b"".join(b"1\r\n%c\r\n" % each for each in body + b" " * 30_000) + b"0\r\n\r\n"
    for request in (
        start + CHUNKED + chunks,
        start + b"Transfer-Encoding: identity, chunked\r\n\r\n" + chunks,
        start + CHUNKED + tiny,
        b"\r\n\r\n" + start + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        start.replace(b"Host: localhost", b"Host: [::1]:8000") + CHUNKED + chunks,
    ):
        with Wire(impatient, request + marked("next")) as wire:
            assert wire.statuses(2) == [201, 200], request[:200]
            assert wire.answers.whole[1].mark == "next"


def test_http_1_0_is_answered_and_the_connection_ends(impatient: Service) -> None:
    with Wire(impatient, b"GET /health/live HTTP/1.0\r\nX-Request-ID: old\r\n\r\n" + LIVE) as wire:
        assert wire.statuses() == [200]
        assert wire.ended
        assert wire.answers.whole[0].mark == "old"


def test_a_body_that_goes_wrong_after_its_answer_is_not_answered_again(impatient: Service) -> None:
    with Wire(impatient, b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"1\r\na\r\n") as wire:
        assert wire.statuses(1) == [404]
        wire.send(b"no chunk\r\n" + LIVE)
        assert wire.statuses() == [404]
        assert wire.ended


def test_expect_100_continue_is_answered_before_the_body(impatient: Service) -> None:
    body = b'{"user_id": "ada"}'
    request = post("/conversations", body, "Expect: 100-continue")
    with Wire(impatient, request[: -len(body)]) as wire:
        assert wire.statuses(1) == [100]
        wire.send(body)
        assert wire.statuses(2) == [100, 201]
        wire.send(marked("next"))
        assert wire.statuses(3) == [100, 201, 200]
    # Refused without its body: whether that still comes nobody can tell, so nothing is read any more.
    with Wire(impatient, post("/nowhere", body, "Expect: 100-continue")[: -len(body)]) as wire:
        assert wire.statuses(1) == [404]
        wire.send(LIVE)
        assert wire.statuses() == [404]
        assert wire.ended


def test_a_body_that_was_asked_for_is_taken_whole_though_it_is_refused_meanwhile(impatient: Service) -> None:
    # A connection that is closed while its client sends is reset, and the answer may be lost with it.
    chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    request = post("/conversations", b"", "Expect: 100-continue", chunked=True).removesuffix(b"0\r\n\r\n")
    with Wire(impatient, request) as wire:
        assert wire.statuses(1) == [100]
        for _ in range(50):
            wire.send(chunk)
        assert wire.statuses(2) == [100, 413]
        for _ in range(100):
            wire.send(chunk)
        wire.send(b"0\r\n\r\n" + LIVE)
        assert wire.statuses(3) == [100, 413, 200]


# -- trailers, and what has no end -----------------------------------------------------------------------


def test_a_trailer_names_nobody(tmp_path: Path) -> None:
    settings = {
        "auth": "key",
        "api_key": "k" * 40,
        "trusted_proxies": "127.0.0.1",
        "failures_per_address": "5/hour",
    }
    with running(tmp_path, **settings) as service:

        def ask(*lines: str, trailers: str) -> Answer:
            request = post("/v1/conversations", b"{}", *lines, chunked=True)
            with Wire(service, request[:-2] + trailers.encode() + b"\r\n") as wire:
                return wire.read(1)[0]

        key = f"X-API-Key: {'k' * 40}"
        assert ask(trailers=f"{key}\r\n").status == 401
        assert ask(trailers=f"Authorization: Bearer {'k' * 40}\r\n").status == 401
        created = ask(key, trailers="X-User-Id: mallory\r\nX-Request-ID: mallory\r\n")
        assert created.status == 200
        assert created.mark != "mallory"
        with service.client(headers={"X-API-Key": "k" * 40}) as client:
            assert client.get("/conversations?user_id=mallory").json()["data"] == []
            assert len(client.get("/conversations?user_id=default").json()["data"]) == 1
        # Another address for each failure does not help.
        bad = "X-API-Key: " + "b" * 40
        statuses = [ask(bad, trailers=f"X-Forwarded-For: 10.0.0.{n}\r\n").status for n in range(8)]
        assert statuses[-1] == 429, statuses


ENDLESS = {
    "trailers": (b"0\r\n", b"a:\r\n" * 4096),
    "a trailer's value": (b"0\r\na: ", b"x" * 16384),
    "a trailer's name": (b"0\r\n", b"x" * 16384),
    "a chunk extension": (b"1;a=", b"x" * 16384),
    "a quoted chunk extension": (b'1;a="', b"x" * 16384),
    "chunk extensions": (b"", b"1;" + b"x" * 16384 + b"\r\na\r\n"),
    "zeros of a chunk size": (b"0", b"0" * 16384),
    "digits of a chunk size": (b"1", b"1" * 16384),
    "a line between chunks": (b"1\r\na", b"x" * 16384),
    "empty lines between chunks": (b"1\r\na\r\n", b"\r\n" * 8192),
}


@pytest.mark.parametrize("path", ["/conversations", "/nowhere"])
@pytest.mark.parametrize("case", ENDLESS)
def test_what_has_no_end_in_a_chunked_body_ends_the_connection(
    impatient: Service, case: str, path: str
) -> None:
    assert impatient.process is not None
    begin, more = ENDLESS[case]
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode() + CHUNKED
    before = resident_bytes(impatient.process.pid)
    with Wire(impatient, head + begin) as wire:
        accepted = 0
        with contextlib.suppress(OSError):
            while accepted < 12 * MEGABYTE:
                wire.socket.sendall(more)
                accepted += len(more)
        assert accepted < 12 * MEGABYTE
        assert ends(wire.socket, 5)
    assert resident_bytes(impatient.process.pid) - before < 16 * MEGABYTE


# -- pipelining ----------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(impatient: Service) -> None:
    bodies = [b'{"user_id": "ada"}', b'{"user_id": "grace", "metadata": {"x": "' + b"y" * 65_000 + b'"}}']
    requests = [
        marked("0"),
        post("/conversations", bodies[0], "X-Request-ID: 1"),
        post("/conversations", bodies[1], "X-Request-ID: 2", chunked=True),
        marked("3", "/docs"),
        post("/nowhere", bodies[1], "X-Request-ID: 4"),
        post(
            "/conversations",
            bodies[1],
            "X-Request-ID: 5",
            "Upgrade: h2c",
            "Connection: Upgrade",
            chunked=True,
        ),
        post("/conversations", b"", "X-Request-ID: 6", chunked=True),
        *(marked(f"{number}") for number in range(7, 30)),
    ]
    everything = b"".join(requests)
    for size in (len(everything), 1460, 8192):
        with Wire(impatient) as wire:
            pieces = [everything[at : at + size] for at in range(0, len(everything), size)]
            threading.Thread(target=wire.send, args=pieces, kwargs={"pause_s": 0.002}).start()
            answers = wire.read(30, within_s=20)
            assert [each.mark for each in answers] == [f"{number}" for number in range(30)]
            assert [each.status for each in answers[:8]] == [200, 201, 201, 200, 404, 201, 400, 200]
            assert wire.is_quiet()


def test_requests_without_end_that_nobody_reads_the_answers_of_are_not_kept(
    impatient: Service, long_history: str
) -> None:
    assert impatient.process is not None
    request = f"GET {long_history}?limit=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    before = grown = resident_bytes(impatient.process.pid)
    log_begins = len(impatient.output())
    wires = [Wire(impatient) for _ in range(30)]
    for wire in wires:
        wire.socket.settimeout(0.1)
        wire.send(request * (250_000 // len(request)))
    deadline = time.monotonic() + 40
    ended = 0
    while ended < len(wires) and time.monotonic() < deadline:
        time.sleep(0.2)
        grown = max(grown, resident_bytes(impatient.process.pid))
        ended = impatient.output()[log_begins:].count("answer-not-read")
    for wire in wires:
        wire.socket.close()
    assert ended == len(wires)
    assert grown - before < 90 * MEGABYTE, grown - before


# -- clocks --------------------------------------------------------------------------------------------

HALF = b"GET /health/live HTTP/1.1\r\nHo"
# How a connection begins, and what it sends every half second after that.
IDLE = {
    "says nothing": (b"", b""),
    "sends empty lines": (b"", b"\r\n"),
    "sends half a head": (HALF, b""),
    "drips a head": (b"GET /health/live HTTP/1.1\r\n", b"a"),
    "says no more after an answer": (LIVE, b""),
    "sends an empty line after an answer": (LIVE + b"\r\n", b""),
    "sends empty lines after an answer": (LIVE, b"\r\n"),
    "sends line feeds after an answer": (LIVE, b"\n"),
    "sends spaces after an answer": (LIVE, b" "),
    "sends half a head after an answer": (LIVE + HALF, b""),
    "drips a head after an answer": (LIVE + b"GET /health/live HTTP/1.1\r\n", b"a"),
    "drips a head after two answers": (LIVE * 2 + HALF, b"a"),
    "sends no body after 100 Continue": (post("/conversations", b"{}", "Expect: 100-continue")[:-2], b""),
    "sends empty lines after a body that was late": (post("/nowhere", b"{}"), b"\r\n"),
    "drips a body that is not wanted": (post("/nowhere", b"x" * 500)[:-400], b"x"),
    "drips a body that is wanted": (post("/conversations", b"x" * 500)[:-400], b"x"),
    "drips chunks": (b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED, b"1\r\na\r\n"),
    "drips trailers": (b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"0\r\n", b"a: b\r\n"),
    "drips after an error": (b"no request\r\n\r\n", b"x"),
}


def test_every_connection_that_stands_still_ends(impatient: Service) -> None:
    wires = {case: (Wire(impatient, begin), more) for case, (begin, more) in IDLE.items()}
    late, _ = wires["sends empty lines after a body that was late"]
    deadline = time.monotonic() + IDLE_ENDS_WITHIN_S
    still = set(wires)
    while still and time.monotonic() < deadline:
        for case in list(still):
            wire, more = wires[case]
            wire.send(more)
            wire.read(within_s=0.01)
            if wire.ended:
                still.remove(case)
        time.sleep(0.3)
    for wire, _ in wires.values():
        wire.socket.close()
    assert still == set()
    assert [each.status for each in late.answers.whole] == [404]


def test_a_body_that_comes_after_its_answer_leaves_no_connection_open_for_ever(impatient: Service) -> None:
    request = post("/nowhere", b"x" * 500)
    with Wire(impatient, request[:-100]) as wire:
        assert wire.statuses(1) == [404]
        wire.send(request[-100:])
        assert wire.is_quiet()
        assert not wire.ended
        assert ends(wire.socket, IDLE_ENDS_WITHIN_S)


def test_idle_connections_do_not_keep_others_out_for_ever(tmp_path: Path) -> None:
    with running(tmp_path, connections_max=10, header_timeout_ms=1_000) as service:
        with Wire(service, marked("first")) as first:
            assert first.statuses(1) == [200]
            crowd = [Wire(service, LIVE) for _ in range(9)]
            surplus = [Wire(service) for _ in range(3)]
            with Wire(service, LIVE) as wire:
                answers = wire.read()
                assert [each.status for each in answers] == [503]
                assert answers[0].headers["content-type"] == "application/problem+json"
                assert wire.ended
            # Who was there before is served on.
            first.send(marked("again"))
            assert first.statuses(2) == [200, 200]
        deadline = time.monotonic() + IDLE_ENDS_WITHIN_S
        served = False
        while not served and time.monotonic() < deadline:
            time.sleep(0.5)
            for wire in crowd:
                wire.send(b"\r\n")
            with Wire(service, LIVE) as wire:
                served = wire.statuses(1) == [200]
        for wire in (*crowd, *surplus):
            wire.socket.close()
        assert served


def test_where_few_descriptors_may_be_open_the_limit_is_lower_and_the_answer_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -n 200\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(limited))
    with running(tmp_path, header_timeout_ms=60_000) as service:
        assert "CHAT_CONNECTIONS_MAX is 100" in service.output()
        crowd = [Wire(service) for _ in range(105)]
        with Wire(service, LIVE) as wire:
            assert wire.statuses(1) == [503]
            assert b"100 connections" in wire.answers.whole[0].body
        for each in crowd:
            each.socket.close()


def test_a_reader_that_does_not_read_is_ended_whatever_it_sends_and_is_one_line(
    impatient: Service, long_history: str
) -> None:
    log_begins = len(impatient.output())
    wires = {}
    for name, behind in {
        "nothing": b"",
        "head": LIVE,
        "half": HALF,
        "lines": b"\r\n" * 9,
        "many": LIVE * 99,
    }.items():
        mark = new_id(name)
        wires[mark] = Wire(impatient, stream(mark, long_history), behind, pause_s=0.3)
    time.sleep(5)
    for wire in wires.values():
        assert ends(wire.socket, 5)  # what the kernel has taken is read; that it ends tells that it was ended
        wire.socket.close()
    lines = [each for each in impatient.output()[log_begins:].splitlines() if each.strip()]
    for mark in wires:
        (line,) = [each for each in lines if mark in each]
        assert '"problem":"answer-not-read"' in line
    assert not [each for each in lines if '"level":"error"' in each or '"level":"warning"' in each]


def test_reading_on_does_not_stop_the_clock_of_a_half_sent_head(
    impatient: Service, long_history: str
) -> None:
    with Wire(impatient, marked("stream", f"{long_history}?limit=100"), HALF) as wire:
        time.sleep(1)
        assert [each.mark for each in wire.read(1, within_s=20)] == ["stream"]
        assert ends(wire.socket, IDLE_ENDS_WITHIN_S)


def test_what_is_no_request_or_asks_to_upgrade_writes_no_warning(impatient: Service) -> None:
    log_begins = len(impatient.output())
    for _ in range(20):
        with Wire(impatient, b"no request\r\n\r\n") as wire:
            assert wire.statuses() == [400]
        with Wire(impatient, post("/nowhere", b"{}", "Connection: Upgrade", "Upgrade: h2c")) as wire:
            assert wire.statuses(1) == [404]
    said = impatient.output()[log_begins:]
    assert '"level":"warning"' not in said
    assert '"level":"error"' not in said
    assert len(said.splitlines()) <= 20  # the requests' own


# -- anything at all -----------------------------------------------------------------------------------

SEEDS = range(1, 161)
FAULTS = [
    b"no request\r\n\r\n",
    b"GET /health/live HTTP/1.1\r\n\r\n",
    b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n",
    b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"g\r\n",
    b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"0\r\n" + b"a: b\r\n" * 40_000,
    b"POST /conversations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    + CHUNKED
    + b"1;"
    + b"x" * 200_000,
    b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Half",
    b"POST /conversations HTTP/1.1\r\n" + HOST + b"Content-Type: text/plain\r\nContent-Length: 99\r\n\r\n{",
]


@dataclass
class Plan:
    """What one connection sends: whole requests, each with a mark, then perhaps something that is none."""

    seed: int
    marks: list[str] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    faulty: bool = False
    closes: bool = False


def _plan(seed: int) -> Plan:
    chance = random.Random(seed)
    plan = Plan(seed)
    sent = b""
    for number in range(chance.randint(0, 9)):
        mark = f"fuzz-{seed}-{number}"
        last = chance.random() < 0.05
        sent += b"\r\n" * chance.choice([0, 0, 0, 1, 2]) + _request(chance, mark, last=last)
        plan.marks.append(mark)
        if last:
            plan.closes = True
            break
    if chance.random() < 0.4:
        plan.faulty = True
        sent += chance.choice(FAULTS)
    while sent:
        size = chance.choice([1, 2, 3, 17, 100, 1460, 65_536, len(sent)])
        plan.pieces.append(sent[:size])
        sent = sent[size:]
        if len(plan.pieces) > 200:
            plan.pieces.append(sent)
            break
    return plan


def _request(chance: random.Random, mark: str, *, last: bool) -> bytes:
    user = mark.rpartition("-")[0]
    lines = [f"X-Request-ID: {mark}"]
    if chance.random() < 0.3:
        lines += ["Connection: Upgrade", f"Upgrade: {chance.choice(['h2c', 'websocket', 'foo'])}"]
    if last:
        lines += ["Connection: close"]
    lines += [f"X-{n}: {'y' * chance.choice([0, 9, 900])}" for n in range(chance.randint(0, 5))]
    chance.shuffle(lines)
    if chance.random() < 0.4:
        path = chance.choice(["/health/live", "/nowhere", "/openapi.json", f"/conversations?user_id={user}"])
        return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *lines, "\r\n"]).encode()
    path = chance.choice(["/conversations", "/conversations", "/nowhere"])
    body = chance.choice(
        [
            b'{"user_id": "%s"}' % user.encode(),
            b'{"user_id": "%s", "title": "%s"}' % (user.encode(), b"x" * chance.choice([1, 500])),
            b'{"user_id": "%s", "metadata": {"a": "%s"}}'
            % (user.encode(), b"x" * chance.choice([9, 90_000])),
            b'{"user_id": "%s"}' % user.encode() + b"\r\n" * chance.choice([1, 5, 900]),
            LIVE * 3,
            b"",
        ]
    )
    if chance.random() < 0.5:
        return post(path, body, *lines)
    chunks = b""
    while body:
        size = chance.choice([1, 2, 5, 100, 70_000])
        extension = chance.choice([b"", b"", b";a", b';a="b"'])
        part, body = body[:size], body[size:]
        if len(chunks) > 2_000:
            part, body = part + body, b""
        chunks += b"%x%s\r\n%s\r\n" % (len(part), extension, part)
    trailers = chance.choice(
        [b"", b"", b"X-Request-ID: wrong\r\n", b"Connection: Upgrade\r\nUpgrade: foo\r\n"]
    )
    return (
        post(path, b"", *lines, chunked=True)[: -len(b"0\r\n\r\n")] + chunks + b"0\r\n" + trailers + b"\r\n"
    )


def _run(service: Service, plan: Plan) -> list[str]:
    """Send as planned, read to the end, and return what broke an invariant."""
    chance = random.Random(-plan.seed)
    with Wire(service) as wire:
        sender = threading.Thread(
            target=wire.send, args=plan.pieces, kwargs={"pause_s": chance.choice([0, 0, 0.001, 0.01])}
        )
        sender.start()
        wire.read(within_s=30)
        sender.join(30)
        faults = [] if wire.ended else ["did not end"]
    marks = [each.mark for each in wire.answers.whole]
    whole = marks[: len(plan.marks)]
    if whole != plan.marks[: len(whole)] or (len(whole) < len(plan.marks) and not plan.faulty):
        faults.append(f"answers {marks} to {plan.marks}")
    if len(marks) > len(plan.marks) + (plan.faulty and not plan.closes):
        faults.append(f"{len(marks)} answers to {len(plan.marks)} requests")
    named = set(re.findall(rb"fuzz-\d+", b"".join(each.body for each in wire.answers.whole)))
    if named - {b"fuzz-%d" % plan.seed}:
        faults.append(f"another caller's bytes: {named}")
    return faults


def test_whatever_comes_each_request_has_one_answer_in_order_and_each_connection_ends(
    impatient: Service,
) -> None:
    assert impatient.process is not None
    print("seeds", SEEDS)
    before = resident_bytes(impatient.process.pid)
    log_begins = len(impatient.output())
    with ThreadPoolExecutor(64) as pool:
        outcomes = dict(zip(SEEDS, pool.map(lambda seed: _run(impatient, _plan(seed)), SEEDS), strict=True))
    assert {seed: faults for seed, faults in outcomes.items() if faults} == {}
    assert resident_bytes(impatient.process.pid) - before < 60 * MEGABYTE
    said: Any = impatient.output()[log_begins:]
    assert '"level":"error"' not in said
