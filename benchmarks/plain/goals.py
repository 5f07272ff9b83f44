"""The goals of cost: ratios to the best of the plain design, measured in the same round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """The most CPU time of the service, the most of service and engine together, the least operations/s."""

    service: float | None = None
    total: float | None = None
    rate: float | None = None


APPEND = "append, 1 client"
APPEND_MANY = "append, 16 clients"
LENGTHS = (1_000, 20_000)
FIRST = "last 50, first time"
PAGE_FIRST = "1,000 messages in a page, first time"
PAGE = "1,000 messages in a page, again"
LIST = "list of 200 conversations"
TURN = "create, 10 appends, read"


def again(length: int) -> str:
    """Return the name of the operation that reads the end of a history once more."""
    return f"last 50 of {length:,}, again"


def after_append(length: int) -> str:
    """Return the name of the operation that reads the end of a history after an append."""
    return f"last 50 of {length:,}, after an append"


_WRITE = Goal(0.6, 1.6, 0.55)
_READ = Goal(0.45, 0.7, 1.3)
# `APPEND_MANY` has one goal more: no fewer operations/s than `APPEND` (report.py).
GOALS = {
    APPEND: _WRITE,
    APPEND_MANY: _WRITE,
    **{again(length): _READ for length in LENGTHS},
    **{after_append(length): _READ for length in LENGTHS},
    FIRST: Goal(service=0.7),
    PAGE_FIRST: Goal(service=0.35),
    PAGE: Goal(service=0.35, rate=1),
    LIST: Goal(0.6, 2, 0.5),
    TURN: _WRITE,
}
