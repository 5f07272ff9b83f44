"""The time, as BSON keeps it: in UTC, cut to the millisecond, so that it is the same wherever it appears."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> datetime:
    """Return the time."""
    return whole_ms(datetime.now(UTC))


def whole_ms(time: datetime) -> datetime:
    """Cut a time to its milliseconds."""
    return time.replace(microsecond=time.microsecond // 1000 * 1000)
