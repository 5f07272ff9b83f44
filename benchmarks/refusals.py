"""Measures what refusing costs: `python -m benchmarks.refusals`, on Linux, in a few minutes.

For each kind of bad request, at its limit, and for good ones of the same size: the longest time that a
`/health/live` on another connection waited meanwhile, by how much the memory of the service grew at its
peak (over the body's size), and how large the answer was. The worst of a few runs counts.

A wait is told as it was, and as the CPU time that the service used during it. On a machine that has a core for
the service the two are about the same; on one that is busy only the second says something of the service.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import http.client
import itertools
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
MOST = 32 * MIB
MESSAGES = "/conversations/c/messages"
GOAL_MS, GOAL_TIMES = 100, 4


@dataclass
class Kind:
    """One kind of request; `body` is made when its turn comes, so that only one is held."""

    name: str
    path: str
    body: Callable[[], bytes] = bytes
    method: str = "POST"
    chunk: int = 0


def filled(frame: str, each: Callable[[int], str], size: int = MOST) -> bytes:
    """Put as many pieces as the size allows, commas between, into the frame at `@`."""
    before, after = frame.split("@")
    room = size - len(frame)
    pieces: list[str] = []
    for index in itertools.count():
        piece = each(index)
        room -= len(piece.encode()) + 1
        if room < 0:
            return (before + ",".join(pieces) + after).encode()
        pieces.append(piece)
    raise AssertionError


def batch(each: Callable[[int], str], field: str = "messages") -> bytes:
    """Make 1,000 messages of one kind, which is the most that one batch has."""
    return ('{"' + field + '":[' + ",".join(map(each, range(1_000))) + "]}").encode()


def text(index: int, **more: str) -> str:
    """Return a message of ordinary text, 32 KB of it."""
    return json.dumps({"role": "user", **more, "content": f"{index} " + "lorem ipsum dolor. " * 1_690})


def embedding(index: int) -> str:
    """Return a message with what a model made of its text: 1,536 numbers."""
    numbers = random.Random(index)
    vector = [round(numbers.uniform(-1, 1), 16) for _ in range(1_536)]
    return json.dumps({"role": "user", "content": "x", "metadata": {"embedding": vector}})


def row(index: int) -> str:
    """Return one row of the result of a tool."""
    return json.dumps({"id": index, "name": f"name {index}", "price": index / 4, "tags": ["a", "b"]})


LIST = '{"role":"user","content":[@]}'
BESIDE = '{"messages":[{"role":"user"}],@}'
KINDS = [
    Kind("nothing but the health checks", "", method=""),
    Kind("good: 1,000 messages of text", MESSAGES, lambda: batch(text)),
    Kind(
        "good: the same with an emoji in each", MESSAGES, lambda: batch(lambda n: text(n, name="\N{OCTOPUS}"))
    ),
    Kind("good: 1,000 messages with embeddings", MESSAGES, lambda: batch(embedding)),
    Kind(
        "good: one message of 15 MiB of text",
        MESSAGES,
        lambda: filled('{"role":"user","content":"@"}', lambda _: "lorem " * 99, 15 * MIB),
    ),
    Kind("good: one message, 4 MiB of rows", MESSAGES, lambda: filled(LIST, row, 4 * MIB)),
    Kind("good: one message, 2 MiB of `{}`", MESSAGES, lambda: filled(LIST, lambda _: "{}", 2 * MIB)),
    Kind("good: `/v1`, 1,000 items of text", "/v1/conversations/c/items", lambda: batch(text, "items")),
    Kind(
        "unknown keys, `POST /conversations`, 1 MiB",
        "/conversations",
        lambda: filled('{"user_id":"ada",@}', lambda n: f'"{n:x}":0', MIB),
    ),
    Kind(
        "unknown keys, `POST /conversations`, 16 MiB",
        "/conversations",
        lambda: filled('{"user_id":"ada",@}', lambda n: f'"{n:x}":0', 16 * MIB),
    ),
    Kind(
        "unknown keys, `POST /v1/conversations`, 8 MiB",
        "/v1/conversations",
        lambda: filled('{"items":[],@}', lambda n: f'"{n:x}":0', 8 * MIB),
    ),
    Kind(
        "unknown keys beside `messages`, 8 MiB",
        MESSAGES,
        lambda: filled(BESIDE, lambda n: f'"{n:x}":0', 8 * MIB),
    ),
    Kind("unknown keys beside `messages`", MESSAGES, lambda: filled(BESIDE, lambda n: f'"{n:x}":0')),
    Kind(
        "an unknown key of 32 MiB", MESSAGES, lambda: filled(BESIDE, lambda n: f'"{n}{"k" * (MOST - 99)}":0')
    ),
    Kind(
        "1,000 messages, 12 faults in each",
        MESSAGES,
        lambda: batch(
            lambda n: json.dumps(
                {
                    "role": 1,
                    "name": 2,
                    "tool_call_id": 3,
                    "metadata": "x",
                    "seq": n,
                    "_id": n,
                    "id": "/",
                    "content": {"x": "x" * 32_500},
                }
            )
        ),
    ),
    Kind(
        "1,000 items, 3 faults in each",
        "/v1/conversations/c/items",
        lambda: batch(
            lambda n: json.dumps({"type": "message", "id": f"/{n}", "content": {"x": "x" * 32_500}}), "items"
        ),
    ),
    Kind("1,000 messages, all with one id", MESSAGES, lambda: batch(lambda n: text(n, id="m"))),
    Kind(
        "metadata with 8 MiB of keys, `/v1`",
        "/v1/conversations",
        lambda: filled('{"metadata":{@}}', lambda n: f'"{n:x}":0', 8 * MIB),
    ),
    Kind("`[` and nothing else", MESSAGES, lambda: b"[" * MOST),
    Kind('`{"a":` and nothing else', MESSAGES, lambda: b'{"a":' * (MOST // 5)),
    Kind(
        "30 MiB of text, then 2,000 levels",
        MESSAGES,
        lambda: (
            b'{"role":"user","name":"'
            + b"x" * 30 * MIB
            + b'","content":'
            + b"[" * 2_000
            + b"]" * 2_000
            + b"}"
        ),
    ),
    Kind(
        "91 levels, around 15 MiB of text",
        MESSAGES,
        lambda: b'{"role":"user","content":' + b"[" * 91 + b'"' + b"x" * 15 * MIB + b'"' + b"]" * 91 + b"}",
    ),
    Kind("`[]`", MESSAGES, lambda: filled(LIST, lambda _: "[]")),
    Kind("`{}`", MESSAGES, lambda: filled(LIST, lambda _: "{}")),
    Kind("`[]`, as many as are parsed", MESSAGES, lambda: filled(LIST, lambda _: "[]", 3_100_000)),
    Kind("`{}`, as many as are parsed", MESSAGES, lambda: filled(LIST, lambda _: "{}", 3_100_000)),
    Kind('`{"a":0}`, as many as are parsed', MESSAGES, lambda: filled(LIST, lambda _: '{"a":0}', 4_000_000)),
    Kind("numbers, as many as are parsed", MESSAGES, lambda: filled(LIST, lambda n: f"{n}.5", 25_000_000)),
    Kind("strings, as many as are parsed", MESSAGES, lambda: filled(LIST, lambda n: f'"{n:x}"', 9_000_000)),
    Kind(
        "one key, again and again",
        MESSAGES,
        lambda: filled('{"role":"user",@}', lambda _: '"a":0', 4_000_000),
    ),
    Kind(
        "an integer of 32 MiB", MESSAGES, lambda: b'{"role":"user","content":[' + b"1" * (MOST - 30) + b"]}"
    ),
    Kind(
        "a fraction of 32 MiB", MESSAGES, lambda: b'{"role":"user","content":[0.' + b"1" * (MOST - 32) + b"]}"
    ),
    Kind(
        "escapes, 32 MiB of them",
        MESSAGES,
        lambda: b'{"role":"user","content":"' + b"\\n" * (MOST // 2 - 20) + b'"}',
    ),
    Kind(
        "letters of two bytes, 32 MiB of them",
        MESSAGES,
        lambda: filled('{"role":"user","content":"@"}', lambda _: "é" * 1_000),
    ),
    Kind(
        "not UTF-8, at the end",
        MESSAGES,
        lambda: b'{"role":"user","content":"' + b"x" * (MOST - 40) + b'\xff"}',
    ),
    Kind(
        "not JSON, at the end", MESSAGES, lambda: b'{"role":"user","content":"' + b"x" * (MOST - 40) + b'",}'
    ),
    Kind(
        "chunks of one byte, 1 MiB of them",
        MESSAGES,
        lambda: b'{"role":"user","content":"' + b"x" * MIB + b'",}',
        chunk=1,
    ),
    Kind(
        "a query of 12,000 names",
        "/conversations/c?" + "&".join(f"{n:x}" for n in range(12_000)),
        method="GET",
    ),
    Kind(
        "the same, and one of them twice",
        "/conversations/c?" + "&".join(f"{n:x}" for n in range(12_000)) + "&0",
        method="GET",
    ),
    Kind("one name, 7,000 times", "/conversations/c?" + "&".join(["user_id"] * 7_000), method="GET"),
]


class Probe(threading.Thread):
    """Asks for `/health/live` again and again on a connection of its own, and keeps the longest wait."""

    def __init__(self, port: int, pid: int) -> None:
        super().__init__(daemon=True)
        self._worst = self._worst_cpu = 0.0
        self._cpu_clock = (~pid << 3) | 2  # Linux's clock of the CPU time of a process, CPUCLOCK_SCHED
        self._ended = threading.Event()
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def run(self) -> None:
        """Ask until told to end."""
        while not self._ended.wait(0.002):
            began, cpu = time.perf_counter(), time.clock_gettime(self._cpu_clock)
            self._connection.request("GET", "/health/live")
            self._connection.getresponse().read()
            self._worst = max(self._worst, time.perf_counter() - began)
            self._worst_cpu = max(self._worst_cpu, time.clock_gettime(self._cpu_clock) - cpu)

    def end(self) -> tuple[float, float]:
        """Return the longest wait, and the most CPU that the service used in one, in milliseconds."""
        self._ended.set()
        self.join()
        self._connection.close()
        return self._worst * 1_000, self._worst_cpu * 1_000


def request(port: int, kind: Kind, body: bytes) -> tuple[int, int]:
    """Send one request, and return the status and the size of the answer."""
    headers = f"{kind.method} {kind.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    if kind.chunk:
        pieces = (body[at : at + kind.chunk] for at in range(0, len(body), kind.chunk))
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        headers += "Transfer-Encoding: chunked\r\n"
    elif kind.method != "GET":
        headers += f"Content-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port), 300) as connection:
        # It may be refused before it was all sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(headers.encode() + b"\r\n" + body)
        answer = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(MIB):
                answer += piece
    head, _, content = bytes(answer).partition(b"\r\n\r\n")
    return int(head.split()[1]), len(content)


def memory(pid: int, name: str) -> int:
    """Return a process's `VmRSS`, or its peak, `VmHWM`, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(port: int, pid: int, kind: Kind, runs: int) -> str:
    """Send a kind of request so many times, and return its row of the table."""
    body, idle = kind.body(), memory(pid, "VmRSS")
    wait, cpu, growth, seconds, status, size = 0.0, 0.0, 0, 0.0, 0, 0
    for _ in range(runs):
        time.sleep(0.2)
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        probe = Probe(port, pid)
        probe.start()
        time.sleep(0.1)
        began = time.perf_counter()
        if kind.method:
            status, size = request(port, kind, body)
        else:
            time.sleep(1)
        seconds = max(seconds, time.perf_counter() - began)
        waited, used = probe.end()
        wait, cpu = max(wait, waited), max(cpu, used)
        growth = max(growth, memory(pid, "VmHWM") - idle)
    sent = len(body) or len(kind.path)
    times = f"{growth / sent:.1f}" if sent > MIB // 2 else "-"
    misses = ["wait"] if cpu > GOAL_MS else []
    misses += ["memory"] if sent >= 8 * MIB and growth > GOAL_TIMES * sent else []
    shown = f"{sent / MIB:.1f} MiB" if sent > MIB // 2 else f"{sent / 1024:.0f} KiB"
    return (
        f"| {kind.name} | {shown} | {status or '-'} | {size:,} | {seconds:.1f} | {cpu:.0f} | {wait:.0f} "
        f"| {growth / MIB:.0f} MiB | {times} | {', '.join(misses) or 'met'} |"
    )


@contextlib.contextmanager
def running(directory: Path, **settings: object) -> Iterator[tuple[int, int, str]]:
    """Run a service: its port, its process id, and the URL of the engine that it may have started."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    mine = {
        "port": ports[0],
        "embedded_port": ports[1],
        "data_dir": directory / "data",
        "log_level": "error",
        **settings,
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
    environment = inherited | {f"CHAT_{name.upper()}": str(value) for name, value in mine.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"], env=environment, cwd=directory, stdout=subprocess.DEVNULL
    )
    try:
        wait_until_ready(ports[0])
        url = f"mongodb://127.0.0.1:{ports[1]}/chat_history?directConnection=true&retryWrites=false"
        yield ports[0], process.pid, url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(port: int) -> None:
    """Wait until the service answers, and see to it that there is a conversation."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health/ready")
            ready = connection.getresponse()
            ready.read()
            if ready.status == 200:
                body, headers = '{"user_id":"ada","id":"c"}', {"Content-Type": "application/json"}
                connection.request("POST", "/conversations", body, headers)
                connection.getresponse().read()
                return
        time.sleep(0.1)
    raise SystemExit("The service did not become ready.")


def main() -> None:
    """Measure every kind, or those whose name has the given word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="only kinds whose name matches it")
    parser.add_argument("--runs", type=int, default=2, help="how often each is sent")
    options = parser.parse_args()
    now = dt.datetime.now(dt.UTC)
    print(
        f"{now:%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| request | body | status | answer, bytes | s | waits, CPU ms | wall ms | memory | × body | goals |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with running(directory) as (_, _, url):
            for kind in KINDS:
                if re.search(options.word, kind.name):
                    # Each kind has a process of its own, since memory that was used is not given back at once.
                    with running(directory, mongodb_url=url) as (port, pid, _):
                        print(measure(port, pid, kind, options.runs), flush=True)


if __name__ == "__main__":
    main()
