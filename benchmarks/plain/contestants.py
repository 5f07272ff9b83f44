"""The service and the plain design as processes: how they are started, asked, and how their CPU time is read."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contestants import ROOT, cpu_seconds, free_port


class Connection:
    """A connection that asks and waits; it does as little as a client can, for it shares the core."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def ask(self, method: str, path: str, body: Any = None) -> bytes:
        """Send a request, and return the body of its answer, which must be a success."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
        kind = "Content-Type: application/json\r\n" if content else ""
        self._socket.sendall(f"{head}{kind}\r\n".encode() + content)
        status, answer = self._answer()
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {answer[:300]!r}")
        return answer

    def _answer(self) -> tuple[int, bytes]:
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._receive()
        head = bytes(received[:end]).lower()
        length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        while len(received) < end + 4 + length:
            received += self._receive()
        return int(head[9:12]), bytes(received[end + 4 :])

    def _receive(self) -> bytes:
        part = self._socket.recv(1 << 20)
        if not part:
            raise RuntimeError("The server closed the connection.")
        return part


@dataclass
class Contestant:
    """A server that runs, and the processes of its database, if it has any of its own."""

    name: str
    port: int
    process: psutil.Process
    database: Callable[[], list[psutil.Process]] = field(default=list)
    environment: dict[str, str] = field(default_factory=dict)

    def service_cpu(self) -> float:
        """Return the CPU time, in seconds, that the process of the service has used."""
        return cpu_seconds(self.process)

    def database_cpu(self) -> float:
        """Return the CPU time, in seconds, that the processes of the database have used."""
        total = 0.0
        for each in self.database():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):  # a process of PostgreSQL that has ended
                total += cpu_seconds(each)
        return total

    def resident_bytes(self) -> int:
        """Return the memory that the process of the service holds."""
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def _running(
    command: list[str], environment: dict[str, str], port: int, ready: str, log: Path
) -> Iterator[int]:
    """Run a program until the end of the block; enter it when the program answers."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=inherited | environment, cwd=ROOT, stdout=output, stderr=output
        )
    try:
        _wait_until_ready(process, port, ready, log)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, ready: str, log: Path) -> None:
    for _ in range(1_200):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, RuntimeError), Connection(port) as connection:
            connection.ask("GET", ready)
            return
        time.sleep(0.05)
    raise RuntimeError(f"A server did not become ready:\n{log.read_text(errors='replace')[-2_000:]}")


@contextlib.contextmanager
def service(directory: Path, mongodb_url: str | None = None, **settings: str) -> Iterator[Contestant]:
    """Run the service, on an embedded engine of its own or on the MongoDB that is named."""
    port = free_port()
    environment = {
        "CHAT_PORT": str(port),
        "CHAT_DATA_DIR": str(directory / "data"),
        "CHAT_EMBEDDED_PORT": str(free_port()),
        **({} if mongodb_url is None else {"CHAT_MONGODB_URL": mongodb_url}),
        **settings,
    }
    command = [sys.executable, "-m", "service", "serve"]
    with _running(command, environment, port, "/health/ready", directory / "service.log") as pid:
        process = psutil.Process(pid)
        found = process.children(recursive=True)  # the guard, and the engine below it
        yield Contestant("service", port, process, lambda: found, environment)


@contextlib.contextmanager
def plain(name: str, url: str, directory: Path, database_pid: int | None = None) -> Iterator[Contestant]:
    """Run the plain design on the database that a URL of SQLAlchemy names."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.plain.design:app", "--port", str(port)]
    environment = {"BENCH_SQL_URL": url}
    log = directory / f"{name}.log"
    with _running([*command, "--no-access-log"], environment, port, "/openapi.json", log) as pid:

        def database() -> list[psutil.Process]:
            if database_pid is None:
                return []
            parent = psutil.Process(database_pid)
            return [parent, *parent.children(recursive=True)]

        yield Contestant(name, port, psutil.Process(pid), database)
