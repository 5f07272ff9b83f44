"""The time, cut to the millisecond as BSON stores it, so that it is equal before and after it is stored."""

from __future__ import annotations

from datetime import UTC, datetime

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def now() -> datetime:
    """Return the time in UTC."""
    return to_milliseconds(datetime.now(UTC))


def to_milliseconds(time: datetime) -> datetime:
    """Cut a time to its milliseconds."""
    return time.replace(microsecond=time.microsecond // 1000 * 1000)
