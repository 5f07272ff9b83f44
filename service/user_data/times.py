"""Reads the times of a file as an import can store them, and counts what it changed.

Exports of this service need no change. Other programs write times without a zone, before 1970, in another
order than the messages, or not at all. Each change depends on the file alone, so that a repeated import finds
what the first one stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from service.clock import EPOCH
from service.formats.strict_json import Json

NO_ZONE = "times without a zone, read as UTC"
BEFORE_1970 = "times before 1970, set to 1970-01-01T00:00:00Z"
MISSING = "missing times, set to the time before, or to the first that is known"
BACKWARDS = "times earlier than the time before them, set to the time before"


class Times:
    """The times of one conversation and its messages. `changed` counts what is changed, by kind."""

    def __init__(self, changed: Counter[str]) -> None:
        self._changed = changed
        self._created: Any = None
        self._updated: datetime | None = None

    def of_conversation(self, conversation: Json, first_message: Json, otherwise: Any) -> Json:
        """Return the conversation with times, of its first message or `otherwise` if it has none itself.

        A value that is no time stays as it is, and is refused where the conversation is checked.
        """
        fields = {**conversation}
        if fields.get("created_at") is None:
            self._changed[MISSING] += 1
            fields["created_at"] = first_message.get("created_at") or otherwise
        for name in ("created_at", "updated_at", "active_at", "expires_at"):
            if fields.get(name) is not None:
                fields[name] = self._readable(fields[name])
        self._created = fields["created_at"]
        if fields.get("updated_at") is None:
            self._changed[MISSING] += 1
            fields["updated_at"] = self._created
        else:
            self._updated = _time(fields["updated_at"])
        return fields

    def of_messages(self, messages: Iterator[Json]) -> Iterator[Json]:
        """Yield the messages with times that never run backwards."""
        before: Any = self._created
        last: datetime | None = None
        for message in messages:
            given = message.get("created_at")
            if given is None:
                self._changed[MISSING] += 1
                text = before
            else:
                text = self._readable(given)
            time = _time(text)
            if time is not None and last is not None and time < last:
                self._changed[BACKWARDS] += 1
                text, time = before, last
            yield message if text is given else {**message, "created_at": text}
            before, last = text, time
        if last is not None and self._updated is not None and self._updated < last:
            # The import sets the last change of a conversation to its newest message.
            self._changed[BACKWARDS] += 1

    def _readable(self, value: Any) -> Any:
        """Return a time in a zone and since 1970, or the value itself if it is that, or no time at all."""
        time = _time(value)
        if time is None:
            return value
        if time.tzinfo is None:
            self._changed[NO_ZONE] += 1
            time = time.replace(tzinfo=UTC)
            value = time.isoformat()
        if time < EPOCH:
            self._changed[BEFORE_1970] += 1
            return EPOCH.isoformat()
        return value


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
