"""Compares the service of two checkouts: `python -m benchmarks.compare BEFORE AFTER`, on Linux.

Each checkout has its own `.venv`, service and embedded engine. Rounds are interleaved, and which of the two
comes first alternates. A figure is CPU time of the service process per request; a ratio is after by before in
one round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """A running service of one checkout, and a connection to it."""

    process: subprocess.Popen[bytes]
    connection: http.client.HTTPConnection
    port: int
    data_directory: str

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """Send a request, and return the body of its answer, which must be a success."""
        content = None if body is None else json.dumps(body).encode()
        if content is not None:
            headers["Content-Type"] = "application/json"
        self.connection.request(method, path, content, headers)
        response = self.connection.getresponse()
        answer = response.read()
        assert response.status < 300, (response.status, answer[:300])
        return answer

    def cpu_us(self) -> float:
        """Return the CPU time that all threads of the service process have used, in microseconds."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((each / "schedstat").read_text().split()[0]) for each in threads) / 1_000


@contextlib.contextmanager
def started(checkout: Path) -> Iterator[Service]:
    """Start the service of a checkout on an empty data directory, and store what is read."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
        environment |= {
            "CHAT_PORT": str(port),
            "CHAT_EMBEDDED_PORT": str(free_port()),
            "CHAT_DATA_DIR": f"{directory}/data",
        }
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen(
                [checkout.resolve() / ".venv/bin/python", "-m", "service", "serve"],
                env=environment,
                cwd=directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            service = Service(process, connection, port, f"{directory}/data")
            for _ in range(1_200):
                with contextlib.suppress(OSError, AssertionError):
                    service.call("GET", "/health/ready")
                    break
                service.connection.close()
                time.sleep(0.1)
            service.call("POST", "/conversations", {"user_id": "ada", "id": "c"})
            message = {"role": "user", "content": "lorem ipsum " * 20, "metadata": {"a": 1}}
            for _ in range(20):
                service.call("POST", "/conversations/c/messages", {"messages": [message] * 50})
            for place in range(200):
                service.call("POST", "/conversations", {"user_id": "bob", "id": f"listed-{place}"})
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


MESSAGE = {"role": "user", "content": "And tomorrow?"}
OPERATIONS: dict[str, Callable[[Service, str], bytes]] = {
    "append 1": lambda service, key: service.call(
        "POST", "/conversations/c/messages", MESSAGE, **{"Idempotency-Key": key}
    ),
    "last 50": lambda service, _: service.call("GET", "/conversations/c/messages?last=50"),
    "list 50": lambda service, _: service.call("GET", "/conversations?user_id=bob&limit=50"),
    "conversation": lambda service, _: service.call("GET", "/conversations/c"),
}


def measured(service: Service, name: str, turn: str, requests: int) -> float:
    """Return the CPU time per request of one operation."""
    service.connection.close()  # the service may have ended it while the other one was measured
    began = service.cpu_us()
    for number in range(requests):
        OPERATIONS[name](service, f"{turn}-{number}")
    return (service.cpu_us() - began) / requests


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    print(
        f"{dt.datetime.now(dt.UTC).date()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print("| operation | before, µs | after, µs | ratio (median) | ratio (least, most) |")
    print("| --- | --- | --- | --- | --- |")
    with started(arguments.before) as before, started(arguments.after) as after:
        for name in OPERATIONS:
            figures: dict[int, list[float]] = {0: [], 1: []}
            for turn in range(arguments.rounds + 1):
                order = ((0, before), (1, after)) if turn % 2 else ((1, after), (0, before))
                found = {
                    place: measured(each, name, f"{name.replace(' ', '')}{turn}", arguments.requests)
                    for place, each in order
                }
                if turn:  # the first round warms both up
                    for place, figure in found.items():
                        figures[place].append(figure)
            ratios = [new / old for old, new in zip(figures[0], figures[1], strict=True)]
            print(
                f"| {name} | {statistics.median(figures[0]):,.0f} | {statistics.median(figures[1]):,.0f} "
                f"| {statistics.median(ratios):.3f} | {min(ratios):.2f}, {max(ratios):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
