"""The operations that are measured and the loop that measures, said once for all contestants.

It needs the standard library only, for some contestants run in an environment of their own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

CONTENT = "The tide turns twice a day, and a little later every day than the day before. " * 3
LENGTHS = (100, 10_000, 100_000)
LISTED = (10, 10_000)
WRITERS = 16
PAGED, STREAMED = 1_000, 4_000


@dataclass(frozen=True)
class Operation:
    """One thing that is measured: `kind` and its size; `where` names the conversation or the user.

    `units` are what is counted for the ratio of a batch to single appends (messages of one operation).
    """

    name: str
    kind: str
    size: int = 0
    where: str = ""
    units: int = 1


OPERATIONS = [
    Operation("append 1", "append", 1),
    Operation("append 4", "append", 4, units=4),
    Operation("append 100", "append", 100, units=100),
    Operation("append 1, one conversation", "append", 1, where="one"),
    *(Operation(f"last 50 of {length:,}", "last", 50, where=f"long-{length}") for length in LENGTHS),
    Operation(f"page through {PAGED:,}", "pages", 100, where=f"long-{PAGED}", units=PAGED // 100),
    Operation(f"stream {STREAMED:,}", "stream", STREAMED, where=f"long-{STREAMED}", units=STREAMED),
    *(Operation(f"list 20 of {count:,}", "list", 20, where=f"user-{count}") for count in LISTED),
    Operation("turn: last 50, append 4", "turn", 4, where="long-10000"),
]


def message(number: int) -> dict[str, str]:
    """Return a message of ordinary size."""
    return {"role": "assistant" if number % 2 else "user", "content": f"{number} {CONTENT}"}


def conversation(operation: Operation, writer: int) -> str:
    """Return the conversation that a writer appends to: its own, or the one of all."""
    return "writer-one" if operation.where == "one" else f"writer-{writer}"


Once = Callable[[int], Awaitable[None]]


async def measure(
    once: Once, concurrency: int, seconds: float, cpu_seconds: Callable[[], float] = time.process_time
) -> dict[str, Any]:
    """Do it over and over in so many tasks, for so long; return what it took, and the CPU of one."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def loop(writer: int) -> None:
        while not latencies or time.perf_counter() < end:
            began = time.perf_counter()
            await once(writer)
            latencies.append(time.perf_counter() - began)

    cpu, began = cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(loop(writer) for writer in range(concurrency)))
    took = time.perf_counter() - began
    cpu_us = (cpu_seconds() - cpu) / len(latencies) * 1e6
    return {"latencies": latencies, "seconds": took, "cpu_us": cpu_us}


async def answer(once_of: Callable[[Operation], Once]) -> None:
    """Measure what each line of JSON on standard input asks for, and answer with a line of JSON."""
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        once = once_of(Operation(**asked["operation"]))
        print(json.dumps(await measure(once, asked["concurrency"], asked["seconds"])), flush=True)
