"""Reads server-sent events, and knows where a stream of them that ended goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from tenacity import RetryCallState

from chat_history_client import _requests as requests
from chat_history_client._requests import Call
from chat_history_client.types import Json


class EventLines:
    """Cuts chunks of bytes into server-sent events.

    Of the line ends that the standard allows, it knows the newline only, because the service sends no other.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._fields: dict[str, str] = {}

    def restart(self) -> None:
        """Begin a new answer; an event of the last one that was not complete is dropped."""
        self._rest, self._fields = [], {}

    def complete_with(self, chunk: bytes) -> Iterator[dict[str, str]]:
        """Yield the fields of the events that are complete with this chunk; comments are none."""
        self._rest.append(chunk)
        if b"\n" not in chunk:
            return
        *lines, rest = b"".join(self._rest).split(b"\n")
        self._rest = [rest]
        for line in lines:
            name, _, value = line.decode().partition(":")
            if name:
                before = f"{self._fields['data']}\n" if name == "data" and "data" in self._fields else ""
                self._fields[name] = before + value.removeprefix(" ")
            elif not line:
                event, self._fields = self._fields, {}
                if "data" in event:
                    yield event


class Tail:
    """A stream of events without an end, which is asked for again whenever it ended."""

    def __init__(self) -> None:
        self._lines = EventLines()
        self._heard = False
        self._lost_at = 0.0

    def call(self) -> Call:
        """Return the request for what follows."""
        self._lines.restart()
        return self._request()

    def _request(self) -> Call:
        raise NotImplementedError

    @property
    def began(self) -> bool:
        """Tell whether the service has said where this stream stands."""
        return False

    def events(self, chunk: bytes) -> Iterator[Json]:
        """Yield the events that are complete with this chunk."""
        self._heard = True
        for fields in self._lines.complete_with(chunk):
            event: Json = {"event": fields.get("event", "message"), "data": json.loads(fields["data"])}
            if fields.get("id"):
                event["id"] = int(fields["id"])
            if self._is_news(event):
                yield event

    def _is_news(self, event: Json) -> bool:  # noqa: ARG002  (for those that leave some out)
        return True

    def stop(self, retry_s: float) -> Any:
        """Return when to give up: nothing was heard for so long since the stream ended, or was begun."""
        self._lost_at = time.monotonic()

        def stop(_: RetryCallState) -> bool:
            if self._heard:
                self._heard, self._lost_at = False, time.monotonic()
            return time.monotonic() - self._lost_at > retry_s

        return stop


class HistoryTail(Tail):
    """The events of a conversation, which go on after the latest position that an event told."""

    def __init__(self, conversation_id: str, after: int | None, user_id: str | None) -> None:
        super().__init__()
        self._conversation_id = conversation_id
        self._query = {"after": after, "user_id": user_id}
        self._position: int | None = None
        self._at_head = False

    def _request(self) -> Call:
        return requests.follow_messages(self._conversation_id, self._query, self._position)

    @property
    def began(self) -> bool:
        """Tell whether there is a position to go on after."""
        return self._position is not None

    def _is_news(self, event: Json) -> bool:
        """Note the position, and leave out the heads of later connections, which tell nothing new."""
        self._position = event.get("id", self._position)
        if event["event"] != "head":
            return True
        first, self._at_head = not self._at_head, True
        return first


class ListTail(Tail):
    """The events of a list of conversations; it has no positions, and tells to read the list instead."""

    def __init__(self, user_id: str | None) -> None:
        super().__init__()
        self._user_id = user_id

    def _request(self) -> Call:
        return requests.follow_conversations(self._user_id)
