"""What idle readers cost: `python -m benchmarks.live [CHECKOUT]`, on Linux.

In each round, appends are measured alone, beside so many open connections that ask for nothing, and beside as
many streams in which nothing happens; the order changes from round to round. The table has the medians of the
rates, of the ratios to the same round without any, and of the memory that each connection adds to the service.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import socket
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.compare import Service, started
from benchmarks.hot_conversation import measured

KINDS = ("nothing", "connections", "streams")
_CONVERSATIONS = 100


def memory(service: Service) -> int:
    """Return the resident bytes of the service process."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def opened(service: Service, kind: str, count: int) -> list[socket.socket]:
    """Open so many connections of a kind, and wait until each has its answer."""
    sockets = []
    for number in range(count if kind != "nothing" else 0):
        each = socket.create_connection(("127.0.0.1", service.port))
        accept = "Accept: text/event-stream\r\n" if kind == "streams" else ""
        path = f"/conversations/quiet-{number % _CONVERSATIONS}/messages" if accept else "/health/live"
        each.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{accept}\r\n".encode())
        sockets.append(each)
    for each in sockets:
        assert each.recv(65536).startswith(b"HTTP/1.1 200")
    return sockets


def one_round(
    service: Service, turn: int, count: int, writers: int, seconds: float
) -> dict[str, list[float]]:
    """Return for each kind the appends a second and the bytes that a connection adds."""
    found: dict[str, list[float]] = {}
    for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
        before = memory(service)
        sockets = opened(service, kind, count)
        added = memory(service) - before
        time.sleep(1)
        rate = len(measured([service.port] * writers, f"hot-{turn}", seconds)) / seconds
        found[kind] = [rate, added / count]
        for each in sockets:
            each.close()
        time.sleep(1)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    day = datetime.now(UTC).date()
    print(f"{day}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    with started(arguments.checkout) as service:
        for number in range(_CONVERSATIONS):
            service.call("POST", "/conversations", {"user_id": "ada", "id": f"quiet-{number}"})
        rounds = []
        for turn in range(arguments.rounds):
            service.connection.close()
            service.call("POST", "/conversations", {"user_id": "ada", "id": f"hot-{turn}"})
            rounds.append(one_round(service, turn, arguments.count, arguments.writers, arguments.seconds))
    print(f"| beside {arguments.count:,} | appends/s | to none | KiB each |\n| --- | --- | --- | --- |")
    for kind in KINDS:
        rate = statistics.median(each[kind][0] for each in rounds)
        ratio = statistics.median(each[kind][0] / each["nothing"][0] for each in rounds)
        # The first time counts: what was freed is used again by those that come later.
        added = max(each[kind][1] for each in rounds) / 1024
        print(f"| {kind} | {rate:,.0f} | {ratio:.2f} | {added:.1f} |")


if __name__ == "__main__":
    main()
