"""Reads answers that are lines of JSON, and knows where one that broke off goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
from tenacity import RetryCallState, stop_after_delay

from chat_history_client import _requests as requests
from chat_history_client._requests import Call
from chat_history_client.types import Json


class _Lines:
    """Cuts chunks of bytes into lines of JSON.

    A line ends with a newline and nothing else; a text may hold all the other characters at which
    `splitlines`, and so httpx's `iter_lines`, would cut it.
    """

    def __init__(self) -> None:
        self._rest = b""

    def restart(self) -> None:
        """Begin a new answer."""
        self._rest = b""

    def complete_with(self, chunk: bytes) -> Iterator[Json]:
        """Yield the lines that are complete with this chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        yield from map(json.loads, lines)


class HistoryStream:
    """A stream of messages, which goes on behind the last message that came."""

    def __init__(self, conversation_id: str, query: Json) -> None:
        self._conversation_id = conversation_id
        self._query = dict(query)
        self._lines = _Lines()
        self._moved = time.monotonic()

    def call(self) -> Call:
        """Return the request for what is left."""
        self._lines.restart()
        return requests.stream_messages(self._conversation_id, dict(self._query))

    def values(self, chunk: bytes) -> Iterator[Json]:
        """Return the messages that are complete with this chunk, and note that they came."""
        backwards = self._query.get("order") == "desc"
        for message in self._lines.complete_with(chunk):
            self._query["before" if backwards else "after"] = message["seq"]
            if self._query.get("limit") is not None:
                self._query["limit"] -= 1
            self._moved = time.monotonic()
            yield message

    @property
    def done(self) -> bool:
        """Tell whether as many came as were asked for."""
        return self._query.get("limit") == 0

    def end(self) -> None:
        """Take the end of an answer for the end of the history, as an answer that broke off has none."""

    def stop(self, retry_s: float) -> Any:
        """Return when to give up: no message has come for so long."""
        return lambda _: time.monotonic() - self._moved > retry_s


class ItemStream(HistoryStream):
    """A stream of items, which goes on behind the last message whose items came."""

    def __init__(self, conversation_id: str, user_id: str | None) -> None:
        super().__init__(conversation_id, {"user_id": user_id, "as": "items"})

    def values(self, chunk: bytes) -> Iterator[Json]:
        """Return the items of the messages that are complete with this chunk."""
        for message in super().values(chunk):
            yield from message["items"]


class ExportStream:
    """An export, which cannot go on where it broke off: it is repeated until its first line has come."""

    done = False

    def __init__(self, user_id: str) -> None:
        self._user_id = user_id
        self._lines = _Lines()
        self._last: Json | None = None

    def call(self) -> Call:
        """Return the request."""
        self._lines.restart()
        return requests.export(self._user_id)

    def values(self, chunk: bytes) -> Iterator[Json]:
        """Return the lines that are complete with this chunk."""
        for line in self._lines.complete_with(chunk):
            self._last = line
            yield line

    def end(self) -> None:
        """Raise httpx's error for an answer that ended early, unless the last line is the export's last."""
        if self._last is None or self._last.get("type") != "end":
            raise httpx.RemoteProtocolError("The export was cut short: its last line is missing.")

    def stop(self, retry_s: float) -> Any:
        """Return when to give up: after the first line, or after so long."""
        too_late = stop_after_delay(retry_s)

        def stop(state: RetryCallState) -> bool:
            return self._last is not None or too_late(state)

        return stop
