"""Appends of many writers to one conversation: `python -m benchmarks.hot_conversation [CHECKOUT]`, on Linux.

Throughput of 1, 8 and 32 writers through one process of the service, in interleaved rounds, as ratios to 1
writer in the same round; then the latency of 8 writers through each of three processes on one engine. The
writers are threads of two processes, so that they wait for each other little.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.compare import Service, free_port, started

WRITER_PROCESSES = 2
MESSAGE = json.dumps({"role": "user", "content": "lorem ipsum " * 20}).encode()
_KEYS = itertools.count()


def write(port: int, conversation: str, key: str, until: float, taken: list[float]) -> None:
    """Append until the time is over, and note how long each append took, in seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    path = f"/conversations/{conversation}/messages"
    for number in itertools.count():
        began = time.perf_counter()
        if began > until:
            break
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"{key}-{number}"}
        connection.request("POST", path, MESSAGE, headers)
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 201, (response.status, answer)
        taken.append(time.perf_counter() - began)
    connection.close()


def writers(ports: list[int], conversation: str, key: str, seconds: float, results: object) -> None:
    """Be one of the processes of writers: a thread for each port given."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=write, args=(port, conversation, f"{key}-{place}", until, taken))
        for place, port in enumerate(ports)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(taken)  # type: ignore[attr-defined]  # a queue of multiprocessing, which has no public type


def measured(ports: list[int], conversation: str, seconds: float) -> list[float]:
    """Let one writer a port write, and return how long each append took."""
    results = multiprocessing.Queue()  # type: ignore[var-annotated]  # of lists of numbers
    shares = [ports[place::WRITER_PROCESSES] for place in range(WRITER_PROCESSES)]
    processes = [
        multiprocessing.Process(
            target=writers, args=(share, conversation, f"{os.getpid()}-{next(_KEYS)}", seconds, results)
        )
        for share in shares
        if share
    ]
    for process in processes:
        process.start()
    taken = [each for _ in processes for each in results.get()]
    for process in processes:
        process.join()
    return taken


@contextlib.contextmanager
def beside(checkout: Path, first: Service) -> Iterator[int]:
    """Start another process of the service on the first one's engine, and yield its port."""
    program = checkout.resolve() / ".venv/bin/python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
    data = {"CHAT_DATA_DIR": first.data_directory}
    url = subprocess.run(
        [program, "-m", "service", "mongo-url"],
        env=environment | data,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    port = free_port()
    process = subprocess.Popen(
        [program, "-m", "service", "serve"],
        env=environment | {"CHAT_PORT": str(port), "CHAT_MONGODB_URL": url},
        cwd=tempfile.gettempdir(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health/ready")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def percentile(taken: list[float], share: float) -> float:
    """Return how long that share of the appends took at most, in milliseconds."""
    return sorted(taken)[int(share * (len(taken) - 1))] * 1_000


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    day = datetime.now(UTC).date()
    print(f"{day}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| writers | appends/s | to 1 writer | p50, ms | p99, ms |\n| --- | --- | --- | --- | --- |")
    counts = (1, 8, 32)
    with started(arguments.checkout) as service:
        rounds: list[dict[int, list[float]]] = []
        for turn in range(arguments.rounds):
            service.connection.close()
            service.call("POST", "/conversations", {"user_id": "ada", "id": f"hot-{turn}"})
            order = counts if turn % 2 else counts[::-1]
            rounds.append(
                {each: measured([service.port] * each, f"hot-{turn}", arguments.seconds) for each in order}
            )
        for count in counts:
            rates = statistics.median(len(each[count]) / arguments.seconds for each in rounds)
            ratio = statistics.median(len(each[count]) / len(each[1]) for each in rounds)
            middle = statistics.median(percentile(each[count], 0.5) for each in rounds)
            last = statistics.median(percentile(each[count], 0.99) for each in rounds)
            print(f"| {count} | {rates:,.0f} | {ratio:.2f} | {middle:,.0f} | {last:,.0f} |", flush=True)
        with beside(arguments.checkout, service) as second, beside(arguments.checkout, service) as third:
            service.connection.close()
            service.call("POST", "/conversations", {"user_id": "ada", "id": "shared"})
            ports = [service.port, second, third] * 8
            taken = measured(ports, "shared", arguments.seconds * 2)
        print(
            f"\nThree processes, 8 writers each: {len(taken) / arguments.seconds / 2:,.0f} appends/s, "
            f"p50 {percentile(taken, 0.5):,.0f} ms, p99 {percentile(taken, 0.99):,.0f} ms, "
            f"longest {max(taken) * 1_000:,.0f} ms."
        )


if __name__ == "__main__":
    main()
