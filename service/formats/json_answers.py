"""Writes values as JSON, as every answer has them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import orjson

from service.errors import MalformedDocument


def timestamp(time: datetime) -> str:
    """Format a time, which is always UTC in this service, by RFC 3339 with milliseconds."""
    naive = time if time.tzinfo is None else time.replace(tzinfo=None)
    return naive.isoformat(timespec="milliseconds") + "Z"


def dumps(value: Any) -> bytes:
    """Encode an answer as JSON; times are formatted by `timestamp`.

    Raises MalformedDocument for another value that JSON does not have, which somebody stored by hand.
    """
    try:
        return orjson.dumps(value, default=timestamp, option=orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError as error:
        raise MalformedDocument(
            "A stored value that this call reads has a type that JSON does not have. Replace the value in "
            "the database."
        ) from error
