"""`make bench`: starts all it needs on free ports, measures in interleaved rounds, writes the result."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo

from benchmarks import operations, report
from benchmarks.contestants import BareService, Floor, Service, Worker, free_port
from benchmarks.operations import LENGTHS, LISTED, OPERATIONS, PAGED, STREAMED, WRITERS, Operation
from benchmarks.plain import run as plain
from service.embedded.engine import EmbeddedEngine
from service.settings import Settings

ROOT = Path(__file__).parents[1]
OTHERS = {
    "langchain": "LangChain",
    "agents-mongodb": "Agents SDK, MongoDB",
    "agents-sqlite": "Agents SDK, SQLite",
}
# What the others can do, in the terms of ours.
COMPARED = {"append 1", "append 4", "last 50 of 100", "last 50 of 10,000", "turn: last 50, append 4"}
CONCURRENCIES = (1, 16)
# What the bare route over bare Motor does; each writer its own conversation, for it would collide.
TRANSACTIONS = {"append 1", "append 4"}


def seed(url: str) -> None:
    """Store what is read, as the service would have."""
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        database = client.get_default_database()
        start = datetime.now(UTC) - timedelta(days=30)
        about: dict[str, Any] = {"title": None, "metadata": {}, "exact_metadata": None, "created_at": start}
        for length in sorted({*LENGTHS, PAGED, STREAMED}):
            name = f"long-{length}"
            counts = {"updated_at": start, "last_seq": length, "message_count": length}
            database.conversations.insert_one({"_id": name, "user_id": "bench", **about, **counts})
            for first in range(1, length + 1, 1_000):
                database.messages.insert_many(_messages(name, first, min(first + 1_000, length + 1), start))
        for count in LISTED:
            counts = {"last_seq": 0, "message_count": 0}
            database.conversations.insert_many(
                {
                    "_id": f"listed-{count}-{n}",
                    "user_id": f"user-{count}",
                    **about,
                    "updated_at": datetime.now(UTC) - timedelta(minutes=n),
                    **counts,
                }
                for n in range(count)
            )
        for name in ["writer-one", *(f"writer-{n}" for n in range(WRITERS))]:
            counts = {"updated_at": start, "last_seq": 0, "message_count": 0}
            database.conversations.insert_one({"_id": name, "user_id": "bench", **about, **counts})


def _messages(name: str, first: int, end: int, start: datetime) -> list[dict[str, Any]]:
    return [
        {
            "_id": f"{name}/seeded-{seq}",
            "conversation_id": name,
            "user_id": "bench",
            "seq": seq,
            "created_at": start,
            **operations.message(seq),
        }
        for seq in range(first, end)
    ]


def drop(url: str) -> None:
    """Leave a database that is not ours as it was."""
    with pymongo.MongoClient[dict[str, Any]](url) as client:
        for name in (client.get_default_database().name, "langchain", "agents"):
            client.drop_database(name)


async def run(arguments: argparse.Namespace, url: str, directory: str) -> dict[str, Any]:
    """Start the contestants, measure in rounds, and return every round's figures."""
    service, floor = Service(url), Floor(url)
    bare = Worker([sys.executable, "-m", "benchmarks.worker", url])
    contestants: dict[str, Any] = {"service": service, "floor": floor, "motor": bare}
    python = ROOT / ".venv-others" / "bin" / "python"
    if python.exists() and not arguments.only_ours:
        for which in OTHERS:
            command = [str(python), "-m", "benchmarks.others", which, url, directory]
            contestants[which] = Worker(command)
    try:
        for each in contestants.values():
            await each.start()
        await floor.learn(service)
        contestants["bare service"] = BareService(floor)
        stream = await _stream_memory(service)
        rounds = await _rounds(contestants, arguments)
    finally:
        for each in contestants.values():
            await each.stop()
    return {"rounds": rounds, "stream": stream}


async def _rounds(contestants: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything once a round, contestants side by side, so that noise hits all alike."""
    found = []
    for number in range(arguments.rounds):
        for operation in OPERATIONS:
            if arguments.operation and arguments.operation not in operation.name:
                continue
            for concurrency in CONCURRENCIES:
                for name, contestant in contestants.items():
                    if name in OTHERS and (operation.name not in COMPARED or concurrency > 1):
                        continue
                    if name == "bare service" and operation.name not in TRANSACTIONS:
                        continue
                    figures = await contestant.measure(operation, concurrency, arguments.seconds)
                    found.append(_row(number, operation, concurrency, name, figures))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    return found


def _row(
    number: int, operation: Operation, concurrency: int, name: str, figures: dict[str, Any]
) -> dict[str, Any]:
    latencies = sorted(figures["latencies"])
    return {
        "round": number,
        "operation": operation.name,
        "concurrency": concurrency,
        "contestant": name,
        "operations": len(latencies),
        "per_second": len(latencies) / figures["seconds"],
        "cpu_us": figures["cpu_us"],
        **{
            f"p{p}_ms": latencies[min(len(latencies) - 1, len(latencies) * p // 100)] * 1e3
            for p in (50, 95, 99)
        },
    }


async def _stream_memory(service: Service) -> dict[str, float]:
    """Stream 100,000 messages and watch the memory of the service grow, or not."""
    path = f"/conversations/long-{LENGTHS[-1]}/messages"
    assert service._session is not None  # noqa: SLF001  (the same package)
    await service.ask("GET", path + "?limit=1000")
    before = most = service.resident_bytes()
    total = 0
    async with service._session.get(path, headers={"Accept": "application/x-ndjson"}) as response:  # noqa: SLF001
        async for chunk in response.content.iter_chunked(1 << 18):
            total += len(chunk)
            most = max(most, service.resident_bytes())
    return {
        "megabytes": total / 1e6,
        "before_megabytes": before / 1e6,
        "grown_megabytes": (most - before) / 1e6,
    }


def start_up(url_free_directory: str) -> dict[str, float]:
    """Time `chat-history serve` on an existing data directory, from its start to its first answer."""
    from tests.harness import Service as Started

    service = Started(Path(url_free_directory))
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        service.start()
        taken.append(time.perf_counter() - began)
        service.stop()
    return {"median_s": sorted(taken[1:])[2], "first_s": taken[0]}


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--mongodb-url", help="measure on this database instead of the embedded engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--operation", help="only those whose name contains this")
    parser.add_argument("--only-ours", action="store_true", help="leave out what people use instead")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plain", action="store_true", help="only the service beside the plain design")
    plain.add_arguments(parser)
    arguments = parser.parse_args()
    if not arguments.plain:
        measure_with_floor(arguments)
    plain.run(arguments)


def measure_with_floor(arguments: argparse.Namespace) -> None:
    """Measure the service beside its floor and beside what people use instead."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        url = arguments.mongodb_url
        if url is None:
            settings = Settings(
                _env_file=None,
                data_dir=Path(directory) / "data",
                embedded_port=free_port(),
                database="bench",
                mongodb_url=None,
            )
            stack.enter_context(EmbeddedEngine(settings))
            url = settings.embedded_url
        else:
            stack.callback(drop, url)
        began = time.monotonic()
        asyncio.run(_prepare(url))
        seed(url)
        result = asyncio.run(run(arguments, url, directory))
        (Path(directory) / "started").mkdir()
        result["start_up"] = start_up(str(Path(directory) / "started"))
        result["about"] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {_cores()} cores, Python {platform.python_version()}",
            "database": "the embedded engine" if arguments.mongodb_url is None else "MongoDB",
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "took_s": round(time.monotonic() - began),
        }
    report.write(result, arguments.output)


def _cores() -> int:
    import os

    return os.cpu_count() or 0


async def _prepare(url: str) -> None:
    """Make the collections and their indexes, as the service does at its start."""
    from service.database import Database

    database = Database(Settings(_env_file=None, mongodb_url=url))
    await database.open()
    await database.close()


if __name__ == "__main__":
    main()
