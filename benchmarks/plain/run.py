"""`python -m benchmarks --plain`: the service beside the plain design, in interleaved rounds, on one core."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contestants import ROOT, free_port
from benchmarks.plain import contestants, measuring, postgres, report
from benchmarks.plain.contestants import Connection, Contestant
from benchmarks.plain.measuring import TINY, Sizes
from service.settings import Settings

# Less than the histories that are read, so that the cache is full after they were read.
_CACHE_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this part."""
    parser.add_argument("--no-postgres", action="store_true", help="the plain design on SQLite only")
    parser.add_argument("--tiny", action="store_true", help="little data, for a test that all of it works")
    parser.add_argument("--before", type=Path, help="the plain.json of an earlier run, to compare with")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, and write `plain.md` and `plain.json`."""
    began = time.monotonic()
    pinned = _pin()
    sizes = TINY if arguments.tiny else Sizes()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        ours = stack.enter_context(contestants.service(directory, arguments.mongodb_url))
        at_rest = ours.resident_bytes()
        after = measuring.fill_service(ours, sizes, arguments.rounds)
        plain = list(_plain(stack, directory, sizes, arguments))
        bytes_answered = measuring.require_equal_answers([ours, *plain], sizes)
        rounds = _rounds([ours, *plain], sizes, arguments)
        memory: dict[str, Any] = {"service_at_rest": at_rest, "service_after_10000_messages": after}
        memory |= {f"{each.name}_after_the_run": each.resident_bytes() for each in (ours, *plain)}
        memory["after_reading_everything"] = _memory_of_reading(ours, directory, sizes, arguments)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "pinned": pinned,
        "load": os.getloadavg()[1],
        "database": "MongoDB" if arguments.mongodb_url else "the embedded engine",
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "tiny": arguments.tiny,
        "took_s": round(time.monotonic() - began),
    }
    result = {"about": about, "rounds": rounds, "memory": memory, "bytes_answered": bytes_answered}
    before = json.loads(arguments.before.read_text()) if arguments.before else None
    report.write(result, arguments.output, before)


def _pin() -> bool:
    """Put this process, and so all that it starts, on one core, where the system can."""
    if sys.platform != "linux":
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def _plain(
    stack: contextlib.ExitStack, directory: Path, sizes: Sizes, arguments: argparse.Namespace
) -> Iterator[Contestant]:
    """Start the plain design on SQLite, and on PostgreSQL where that is installed."""
    urls: dict[str, tuple[str, int | None]] = {
        "SQLite": (f"sqlite+aiosqlite:///{directory / 'plain.db'}", None)
    }
    if not arguments.no_postgres:
        cluster = stack.enter_context(postgres.started(free_port()))
        if cluster is not None:
            urls["PostgreSQL"] = (cluster.url, cluster.pid)
    for name, (url, pid) in urls.items():
        asyncio.run(measuring.fill_plain(url, sizes, arguments.rounds))
        yield stack.enter_context(contestants.plain(name, url, directory, pid))


def _rounds(who: list[Contestant], sizes: Sizes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything once a round, contestants side by side and in turns, so that noise hits all alike."""
    found = []
    of = {each.name: measuring.operations_of(sizes, each) for each in who}
    for contestant in who:  # warm all up, but do not ask for what is to be new
        for operation in of[contestant.name]:
            if operation.most is None:
                measuring.measure(contestant, operation, arguments.seconds / 5, 0)
    for number in range(arguments.rounds):
        for place in range(len(of[who[0].name])):
            for contestant in _turned(who, number):
                operation = of[contestant.name][place]
                if arguments.operation and arguments.operation not in operation.name:
                    continue
                first = number * (operation.most or 0)
                figures = measuring.measure(contestant, operation, arguments.seconds, first)
                found.append(
                    {"round": number, "operation": operation.name, "contestant": contestant.name, **figures}
                )
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    return found


def _turned(who: list[Contestant], number: int) -> list[Contestant]:
    place = number % len(who)
    return [*who[place:], *who[:place]]


def _memory_of_reading(
    ours: Contestant, directory: Path, sizes: Sizes, arguments: argparse.Namespace
) -> dict[str, int]:
    """Return what a process of the service holds after it read all histories, with and without a full cache."""
    url = arguments.mongodb_url or _mongodb_url(ours)
    if "cache_bytes" not in Settings.model_fields:
        return {"without a cache": _resident_after_reading(directory, url, sizes, arguments.rounds, {})}
    return {
        f"with a cache of {size} bytes": _resident_after_reading(
            directory, url, sizes, arguments.rounds, {"CHAT_CACHE_BYTES": str(size)}
        )
        for size in (0, _CACHE_BYTES)
    }


def _resident_after_reading(
    directory: Path, url: str, sizes: Sizes, rounds: int, settings: dict[str, str]
) -> int:
    with contestants.service(directory, url, **settings) as other, Connection(other.port) as connection:
        for _, name, length in measuring.stored(sizes, rounds):
            if length:
                measuring.last_50(connection, name)
                measuring.page(connection, name)
        return other.resident_bytes()


def _mongodb_url(ours: Contestant) -> str:
    command = [sys.executable, "-m", "service", "mongo-url"]
    environment = os.environ | ours.environment
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
