"""The API as Python calls, asynchronous and synchronous, the one like the other.

What may be repeated is repeated, by tenacity, until there is an answer or `retry_s` is over: after a lost
connection, and after a 503 or 429, whose `Retry-After` is kept to. An append carries an idempotency key that
is made once for all its repetitions, so it is stored once. Messages and conversations are plain dicts, as
the API has them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote
from uuid import uuid4
from weakref import WeakKeyDictionary

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

Json = dict[str, Any]
UNSET: Any = object()

_AGAIN = frozenset({429, 502, 503, 504})
_LINES = {"Accept": "application/x-ndjson"}
_PAGE_ITEMS = 1_000
_JITTER = wait_random_exponential(multiplier=0.05, max=2)


class ApiError(Exception):
    """The service refused: `status`, the problem's `type`, `detail`, and `errors` with the place of each."""

    def __init__(self, status: int, problem: Json, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}".strip(": "))
        self.status = status
        self.type = str(problem.get("type", ""))
        self.detail = str(problem.get("detail", ""))
        self.errors: list[Json] = problem.get("errors") or []
        self.retry_after_s = retry_after_s


class NotFound(ApiError):
    """There is no such conversation or message, or it is somebody else's."""


class Conflict(ApiError):
    """The id is taken, or the key or the ids stand for another request."""


class Unavailable(ApiError):
    """The service or its database was away for all the time that there was to repeat the call.

    Whether an append was stored is then not known: repeat it with the same `key`.
    """


@dataclass(frozen=True)
class Page:
    """A page: what was found, and, while `has_more`, where to go on from."""

    data: list[Json]
    has_more: bool
    next: Any


@dataclass(frozen=True)
class _Call:
    """One request, which may be sent again if it is `repeatable`."""

    method: str
    path: str
    params: Mapping[str, Any] | None = None
    body: Any = UNSET
    headers: Mapping[str, str] | None = None
    repeatable: bool = True

    def options(self) -> Json:
        """Return it as httpx takes it."""
        options: Json = {"headers": dict(self.headers or {})}
        options["params"] = {name: value for name, value in (self.params or {}).items() if value is not None}
        if self.body is not UNSET:
            options["json"] = self.body
        return options


# -- the calls, said once for both clients -----------------------------------------------------------


def _conversation(conversation_id: str, *steps: str) -> str:
    # A step is quoted whole, so that no id can become a path of its own.
    return "/".join(("/conversations", *(quote(step, safe="") for step in (conversation_id, *steps))))


def _messages(conversation_id: str, *steps: str) -> str:
    return "/".join((_conversation(conversation_id), "messages", *(quote(step, safe="") for step in steps)))


def _create(user_id: str, conversation_id: str | None, title: str | None, metadata: Json | None) -> _Call:
    # The id is ours if it is not the caller's, so that a repetition finds what the first attempt made.
    body = {"user_id": user_id, "id": conversation_id or f"conv_{uuid4().hex}"}
    said = {"title": title, "metadata": metadata}
    return _Call(
        "POST",
        "/conversations",
        body=body | {name: value for name, value in said.items() if value is not None},
    )


def _append(
    conversation_id: str, messages: Sequence[Mapping[str, Any]], key: str | None, user_id: str | None
) -> _Call:
    own_ids = any("id" in message for message in messages)
    headers = {} if own_ids and key is None else {"Idempotency-Key": key or uuid4().hex}
    body = {"messages": list(messages)}
    return _Call("POST", _messages(conversation_id), {"user_id": user_id}, body, headers)


def _update(conversation_id: str, title: Any, metadata: Any, user_id: str | None) -> _Call:
    changes = {"title": title, "metadata": metadata}
    body = {name: value for name, value in changes.items() if value is not UNSET}
    return _Call("PATCH", _conversation(conversation_id), {"user_id": user_id}, body)


def _pop(conversation_id: str, user_id: str | None) -> _Call:
    return _Call("POST", _conversation(conversation_id, "pop"), {"user_id": user_id}, repeatable=False)


def _page(answer: Json) -> Page:
    return Page(answer["data"], answer["has_more"], answer["next"])


# -- answers and repetitions -------------------------------------------------------------------------


def _raise_for(response: httpx.Response) -> None:
    """Raise the error that an answer says, if it says one."""
    if response.status_code < 400:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": response.text[:200]}
    named = {404: NotFound, 409: Conflict, **dict.fromkeys(_AGAIN, Unavailable)}
    seconds = response.headers.get("retry-after", "")
    after = float(seconds) if seconds.isdecimal() else None
    problem = problem if isinstance(problem, dict) else {}
    raise named.get(response.status_code, ApiError)(response.status_code, problem, after)


def _answer(response: httpx.Response) -> Any:
    _raise_for(response)
    return response.json() if response.content else None


def _worth_repeating(call: _Call) -> Any:
    def worth(error: BaseException) -> bool:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
            return True  # nothing was sent
        return call.repeatable and isinstance(error, Unavailable | httpx.TransportError)

    return retry_if_exception(worth)


def _wait(state: RetryCallState) -> float:
    """Wait as long as the service says, or a random time that grows."""
    error = state.outcome.exception() if state.outcome else None
    said = error.retry_after_s if isinstance(error, Unavailable) else None
    return float(_JITTER(state)) + (said or 0)


def _gone_already(call: _Call, attempts: int, error: BaseException) -> bool:
    """Tell whether a deletion found nothing because its own first attempt, unanswered, was done."""
    return call.method == "DELETE" and attempts > 1 and isinstance(error, NotFound)


class _Position:
    """Where a stream stands, so that one that breaks off goes on behind the last message that came."""

    def __init__(self, conversation_id: str, filters: Json) -> None:
        self._path = _messages(conversation_id)
        self._filters = dict(filters)
        self._rest = b""
        self._moved = time.monotonic()

    def call(self) -> _Call:
        """Return the request for what is left."""
        self._rest = b""
        return _Call("GET", self._path, self._filters, headers=_LINES)

    def messages(self, chunk: bytes) -> Iterator[Json]:
        """Return the messages that are complete with this chunk, and note that they came.

        A line ends with a newline and nothing else; a text may hold all the other characters at which
        `splitlines`, and so httpx's `iter_lines`, would cut it.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            message: Json = json.loads(line)
            self._filters["before" if self._filters.get("order") == "desc" else "after"] = message["seq"]
            if self._filters.get("limit") is not None:
                self._filters["limit"] -= 1
            self._moved = time.monotonic()
            yield message

    def stands_still(self, seconds: float) -> Callable[[RetryCallState], bool]:
        """Return when to give up: no message has come for so long."""
        return lambda _: time.monotonic() - self._moved > seconds

    @property
    def done(self) -> bool:
        """Tell whether as many came as were asked for."""
        return self._filters.get("limit") == 0


class _Settings:
    """What both clients are made with."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: Any = None,
    ) -> None:
        authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._options: Json = {
            "base_url": base_url,
            "timeout": timeout_s,
            "headers": {**authorization, **(headers or {})},
        }
        if transport is not None:
            self._options["transport"] = transport
        self._retry_s = retry_s

    def _retrying(self, call: _Call, position: _Position | None = None) -> Json:
        stop = position.stands_still(self._retry_s) if position else stop_after_delay(self._retry_s)
        return {"retry": _worth_repeating(call), "wait": _wait, "stop": stop, "reraise": True}


class ChatHistoryClient(_Settings):
    """The asynchronous client; one may be used from several event loops.

    `base_url` is the service's; the options are `api_key`, `timeout_s` (of one attempt), `retry_s` (how long
    a call is repeated), `headers`, and httpx's `transport`. Calls raise ApiError and its kinds, or
    httpx.TransportError when no attempt had an answer. Where `user_id` may be given, the conversation must
    be that user's.
    """

    def __init__(self, base_url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(base_url, **options)
        # A connection belongs to the loop in which it was opened.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(**self._options)
        return self._clients[loop]

    async def _do(self, call: _Call) -> Any:
        async for attempt in AsyncRetrying(**self._retrying(call)):
            with attempt:
                try:
                    return _answer(await self._http().request(call.method, call.path, **call.options()))
                except NotFound as error:
                    if _gone_already(call, attempt.retry_state.attempt_number, error):
                        return None
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def create_conversation(
        self,
        user_id: str,
        conversation_id: str | None = None,
        *,
        title: str | None = None,
        metadata: Json | None = None,
    ) -> Json:
        """Get or create a conversation."""
        created: Json = await self._do(_create(user_id, conversation_id, title, metadata))
        return created

    async def get_conversation(self, conversation_id: str, *, user_id: str | None = None) -> Json:
        """Read a conversation."""
        found: Json = await self._do(_Call("GET", _conversation(conversation_id), {"user_id": user_id}))
        return found

    async def update_conversation(
        self,
        conversation_id: str,
        *,
        title: str | None = UNSET,
        metadata: Json | None = UNSET,
        user_id: str | None = None,
    ) -> Json:
        """Change the title, or the metadata as a whole; None clears."""
        changed: Json = await self._do(_update(conversation_id, title, metadata, user_id))
        return changed

    async def delete_conversation(self, conversation_id: str, *, user_id: str | None = None) -> None:
        """Delete a conversation with all its messages."""
        await self._do(_Call("DELETE", _conversation(conversation_id), {"user_id": user_id}))

    async def list_conversations(
        self, user_id: str, *, limit: int | None = None, cursor: str | None = None
    ) -> Page:
        """Return a page of a user's conversations, latest activity first."""
        query = {"user_id": user_id, "limit": limit, "cursor": cursor}
        return _page(await self._do(_Call("GET", "/conversations", query)))

    async def append(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        key: str | None = None,
        user_id: str | None = None,
    ) -> list[Json]:
        """Append a batch, all of it or nothing, once; return what is stored."""
        stored = await self._do(_append(conversation_id, messages, key, user_id))
        return list(stored["data"])

    async def history(self, conversation_id: str, **filters: Any) -> Page:
        """Return a page of messages; the filters are those of the API (`limit`, `last`, `after` …)."""
        return _page(await self._do(_Call("GET", _messages(conversation_id), filters)))

    async def newest(self, conversation_id: str, count: int, *, user_id: str | None = None) -> list[Json]:
        """Return the newest so many messages, oldest first, in as many requests as it takes."""
        found: list[Json] = []
        before = None
        while len(found) < count:
            last = min(count - len(found), _PAGE_ITEMS)
            page = await self.history(conversation_id, last=last, before=before, user_id=user_id)
            found[:0] = page.data
            before = page.next
            if not page.has_more:
                break
        return found

    async def stream(self, conversation_id: str, **filters: Any) -> AsyncIterator[Json]:
        """Yield the history, message by message; where the connection breaks, go on behind the last one.

        The filters are those of the API, without `last`.
        """
        position = _Position(conversation_id, filters)
        async for attempt in AsyncRetrying(**self._retrying(position.call(), position)):
            with attempt:
                if position.done:
                    return
                call = position.call()
                async with self._http().stream(call.method, call.path, **call.options()) as response:
                    if response.status_code >= 400:
                        await response.aread()
                    _raise_for(response)
                    async for chunk in response.aiter_bytes():
                        for message in position.messages(chunk):
                            yield message
                return

    async def get_message(self, conversation_id: str, message_id: str, *, user_id: str | None = None) -> Json:
        """Read one message."""
        found: Json = await self._do(
            _Call("GET", _messages(conversation_id, message_id), {"user_id": user_id})
        )
        return found

    async def delete_message(
        self, conversation_id: str, message_id: str, *, user_id: str | None = None
    ) -> None:
        """Delete one message."""
        await self._do(_Call("DELETE", _messages(conversation_id, message_id), {"user_id": user_id}))

    async def delete_messages(
        self, conversation_id: str, *, after: int | None = None, user_id: str | None = None
    ) -> None:
        """Delete the messages after a seq, or all of them."""
        await self._do(_Call("DELETE", _messages(conversation_id), {"after": after, "user_id": user_id}))

    async def pop(self, conversation_id: str, *, user_id: str | None = None) -> Json | None:
        """Take the newest message, or None where there is none.

        It is never repeated once it was sent, for that would take another; when the answer is lost, this
        raises, and the message may be gone.
        """
        popped: Json | None = await self._do(_pop(conversation_id, user_id))
        return popped


class SyncChatHistoryClient(_Settings):
    """The synchronous client, like ChatHistoryClient call for call; safe in several threads."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(base_url, **options)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _do(self, call: _Call) -> Any:
        for attempt in Retrying(**self._retrying(call)):
            with attempt:
                try:
                    return _answer(self._http.request(call.method, call.path, **call.options()))
                except NotFound as error:
                    if _gone_already(call, attempt.retry_state.attempt_number, error):
                        return None
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def create_conversation(
        self,
        user_id: str,
        conversation_id: str | None = None,
        *,
        title: str | None = None,
        metadata: Json | None = None,
    ) -> Json:
        """Get or create a conversation."""
        created: Json = self._do(_create(user_id, conversation_id, title, metadata))
        return created

    def get_conversation(self, conversation_id: str, *, user_id: str | None = None) -> Json:
        """Read a conversation."""
        found: Json = self._do(_Call("GET", _conversation(conversation_id), {"user_id": user_id}))
        return found

    def update_conversation(
        self,
        conversation_id: str,
        *,
        title: str | None = UNSET,
        metadata: Json | None = UNSET,
        user_id: str | None = None,
    ) -> Json:
        """Change the title, or the metadata as a whole; None clears."""
        changed: Json = self._do(_update(conversation_id, title, metadata, user_id))
        return changed

    def delete_conversation(self, conversation_id: str, *, user_id: str | None = None) -> None:
        """Delete a conversation with all its messages."""
        self._do(_Call("DELETE", _conversation(conversation_id), {"user_id": user_id}))

    def list_conversations(
        self, user_id: str, *, limit: int | None = None, cursor: str | None = None
    ) -> Page:
        """Return a page of a user's conversations, latest activity first."""
        query = {"user_id": user_id, "limit": limit, "cursor": cursor}
        return _page(self._do(_Call("GET", "/conversations", query)))

    def append(
        self,
        conversation_id: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        key: str | None = None,
        user_id: str | None = None,
    ) -> list[Json]:
        """Append a batch, all of it or nothing, once; return what is stored."""
        return list(self._do(_append(conversation_id, messages, key, user_id))["data"])

    def history(self, conversation_id: str, **filters: Any) -> Page:
        """Return a page of messages; the filters are those of the API (`limit`, `last`, `after` …)."""
        return _page(self._do(_Call("GET", _messages(conversation_id), filters)))

    def stream(self, conversation_id: str, **filters: Any) -> Iterator[Json]:
        """Yield the history, message by message; where the connection breaks, go on behind the last one."""
        position = _Position(conversation_id, filters)
        for attempt in Retrying(**self._retrying(position.call(), position)):
            with attempt:
                if position.done:
                    return
                call = position.call()
                with self._http.stream(call.method, call.path, **call.options()) as response:
                    if response.status_code >= 400:
                        response.read()
                    _raise_for(response)
                    for chunk in response.iter_bytes():
                        yield from position.messages(chunk)
                return

    def get_message(self, conversation_id: str, message_id: str, *, user_id: str | None = None) -> Json:
        """Read one message."""
        found: Json = self._do(_Call("GET", _messages(conversation_id, message_id), {"user_id": user_id}))
        return found

    def delete_message(self, conversation_id: str, message_id: str, *, user_id: str | None = None) -> None:
        """Delete one message."""
        self._do(_Call("DELETE", _messages(conversation_id, message_id), {"user_id": user_id}))

    def delete_messages(
        self, conversation_id: str, *, after: int | None = None, user_id: str | None = None
    ) -> None:
        """Delete the messages after a seq, or all of them."""
        self._do(_Call("DELETE", _messages(conversation_id), {"after": after, "user_id": user_id}))

    def pop(self, conversation_id: str, *, user_id: str | None = None) -> Json | None:
        """Take the newest message, or None where there is none; never repeated once it was sent."""
        popped: Json | None = self._do(_pop(conversation_id, user_id))
        return popped
