"""A reader of a conversation's events, which keeps what it is told and comes back when it is cut off."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.harness import Service, whole_history

EVENTS = {"Accept": "text/event-stream"}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Read events by the rules of the standard: fields, and an empty line that ends an event."""
    event: dict[str, Any] = {}
    for line in response.iter_lines():
        name, _, value = line.partition(":")
        if line == "":
            if "data" in event:
                yield {**event, "data": json.loads(event["data"])}
            event = {}
        elif name:
            event[name] = value.removeprefix(" ")


@contextlib.contextmanager
def tail(client: httpx.Client, path: str, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Follow a path for a test that reads event by event."""
    with client.stream("GET", path, headers={**EVENTS, **headers}) as response:
        assert response.status_code == 200, response.read()
        yield events(response)


class Reader:
    """Follows a history in a thread, from its beginning, on any of several services, until it is stopped."""

    def __init__(self, conversation: str, *services: Service) -> None:
        self._path = f"/conversations/{conversation}/messages"
        self._services = services
        self._stopped = threading.Event()
        self._response: httpx.Response | None = None
        self.has: dict[int, Any] = {}
        self.told: list[dict[str, Any]] = []
        self.last_id: str | None = None
        self.connections = 0
        self.gone = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Reader:
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stopped.is_set() and not self.gone:
            service = self._services[self.connections % len(self._services)]
            self.connections += 1
            with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
                self._read_once(service)
            time.sleep(0.02)

    def _read_once(self, service: Service) -> None:
        headers = {**EVENTS, **({"Last-Event-ID": self.last_id} if self.last_id is not None else {})}
        with (
            service.client(timeout=httpx.Timeout(20, connect=2)) as client,
            client.stream("GET", self._path, params={"after": 0}, headers=headers) as response,
        ):
            self._response = response
            if response.status_code == 200:
                for event in events(response):
                    self._apply(event)
                    if self._stopped.is_set():
                        return
            else:
                time.sleep(0.2)

    def _apply(self, event: dict[str, Any]) -> None:
        self.told.append(event)
        self.last_id = event.get("id", self.last_id)
        data = event["data"]
        if event["event"] in {"message", "updated"}:
            self.has[data["seq"]] = data
        elif event["event"] == "deleted":
            for seq in [seq for seq in self.has if data["after"] < seq <= data["upto"]]:
                del self.has[seq]
        elif event["event"] == "gone":
            self.gone = True

    def disconnect(self) -> None:
        """Cut the connection under the reader, which then comes back."""
        if self._response is not None:
            with contextlib.suppress(Exception):
                stream: Any = self._response.extensions["network_stream"]
                stream.get_extra_info("socket").shutdown(2)

    def stop(self) -> None:
        self._stopped.set()
        self.disconnect()
        self._thread.join(30)

    @property
    def history(self) -> list[Any]:
        return [self.has[seq] for seq in sorted(self.has)]

    @property
    def delivered(self) -> list[int]:
        """The seqs of the messages in the order in which they were delivered."""
        return [event["data"]["seq"] for event in self.told if event["event"] == "message"]

    def until(self, true: Callable[[], bool], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, (self.connections, self.last_id, self.told[-3:])
            time.sleep(0.01)

    def comes_to(self, client: httpx.Client, conversation: str, timeout_s: float = 20) -> None:
        """Wait until what was delivered is the history; nothing came twice, and everything in order."""
        expected = whole_history(client, conversation)
        self.until(lambda: self.history == expected, timeout_s)
        assert self.delivered == sorted(set(self.delivered))
