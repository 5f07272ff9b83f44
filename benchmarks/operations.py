"""The operations that are measured, said once for all contestants."""

from __future__ import annotations

from dataclasses import dataclass

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
