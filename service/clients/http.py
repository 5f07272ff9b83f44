"""The API as Python calls, asynchronous and synchronous, the one like the other.

Calls are repeated, by tenacity, until there is an answer or `retry_s` is over: after a lost connection, and
after a 503 or 429, whose `Retry-After` is kept to. An append carries an idempotency key that is made once for
all its repetitions, so it is stored once. A failure that no repetition can mend (a certificate that is not
trusted, a header that HTTP cannot carry) is raised at once. Messages and conversations are plain dicts, as
the API has them.

A value that the service refuses is an ApiError with status 422 and the JSON path of the place: NaN, a lone
surrogate, an integer beyond 64 bits, too many levels (so also a value that contains itself), an id that no
URL can carry. A value that is not JSON at all (a set, bytes, a time, a Decimal, a key that is not a string)
is a TypeError that names the place in the same way, and nothing is sent. A tuple is sent as a list.

Every process has its own connections: a child of `os.fork()` opens new ones and leaves its parent's alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote
from uuid import uuid4
from weakref import WeakSet

import anyio
import anyio.lowlevel
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
T = TypeVar("T")
UNSET: Any = object()

_AGAIN = frozenset({429, 502, 503, 504})
_LINES = {"Accept": "application/x-ndjson"}
_PAGE_ITEMS = 1_000
_BATCH_ITEMS = 1_000
# The service takes bodies of 32 MiB unless it is told otherwise; proxies before it may count headers, too.
_BATCH_BYTES = 24 * 1024 * 1024
# Beyond any depth that the service takes, and within what Python's own recursion allows.
_LEVELS = 200
# Longer than any id, cursor or time, and short enough for a URL.
_URL_TEXT_CHARS = 8_000
_SERVICE_FIELDS = frozenset({"conversation_id", "user_id", "seq", "created_at"})
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
    content: bytes | None = None
    headers: Mapping[str, str] | None = None
    repeatable: bool = True

    def options(self) -> Json:
        """Return it as httpx takes it."""
        headers = dict(self.headers or {})
        if self.content is not None:
            headers["Content-Type"] = "application/json"
        said = {name: value for name, value in (self.params or {}).items() if value is not None}
        params = {name: _url_text(value, f"query.{name}") for name, value in said.items()}
        return {"headers": headers, "params": params, "content": self.content}


# -- what can be sent ----------------------------------------------------------------------------------


def _refusal(path: str, why: str) -> ApiError:
    """Return what the service would answer, for what no request can carry to it."""
    problem = {
        "type": "urn:chat-history:problem:invalid-request",
        "title": "The request is not valid",
        "detail": f"{path}: {why}.",
        "errors": [{"path": path, "message": why}],
    }
    return ApiError(422, problem)


def _url_text(value: Any, place: str) -> Any:
    """Return a value that may stand in a URL, or raise the ApiError that names its place."""
    if not isinstance(value, str):
        return value
    if len(value) > _URL_TEXT_CHARS:
        raise _refusal(place, f"a text of {len(value)} characters is too long for a URL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refusal(place, "a lone surrogate is not Unicode text") from None
    return value


def _step(value: str, name: str) -> str:
    """Quote an id whole, so that it cannot become a path of its own.

    A URL drops `.` and `..` as steps even when they are quoted, and with them would name the whole history or
    the whole conversation; so would an empty id.
    """
    if value in {"", ".", ".."}:
        raise _refusal(f"path.{name}", f"{value!r} is not an id")
    return quote(_url_text(value, f"path.{name}"), safe="")


def _encoded(value: Any, path: str) -> bytes:
    """Encode a value as JSON in UTF-8, or raise the error that names the place below `path`.

    NaN and the infinities go as Python writes them, and a lone surrogate as JSON's own escape, so that the
    service refuses them as it would refuse them from anybody.
    """
    fault = _fault(value, _LEVELS)
    if fault is not None:
        raise fault.error(path)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Fault:
    """The first place that cannot be sent: the steps to it, innermost first, and the reason."""

    steps: list[str | int]
    why: str
    json: bool

    def error(self, path: str) -> Exception:
        """Return the error to raise: the service's own for JSON, else a TypeError."""
        place = path + "".join(map(_path_step, reversed(self.steps)))
        return _refusal(place, self.why) if self.json else TypeError(f"{place}: {self.why}.")


def _path_step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", step) else f"[{json.dumps(step)}]"


def _fault(value: Any, levels: int) -> _Fault | None:  # noqa: PLR0911  (a case for each type)
    """Return the first fault; the path is put together on the way back only, so that no fault costs none."""
    if value is None or isinstance(value, (str, float)):
        return None
    if isinstance(value, int):  # of more digits than Python itself would write, or than fit into 64 bits
        return _Fault([], "an integer beyond 64 bits", True) if value.bit_length() > 64 else None
    if not isinstance(value, dict | list | tuple):
        return _Fault([], f"a {type(value).__name__} is not JSON", False)
    if not levels:
        return _Fault([], "nested too deep", True)
    if isinstance(value, dict):
        return _fault_in_object(value, levels)
    for index, item in enumerate(value):
        if (found := _fault(item, levels - 1)) is not None:
            found.steps.append(index)
            return found
    return None


def _fault_in_object(value: dict[Any, Any], levels: int) -> _Fault | None:
    for key, item in value.items():
        if not isinstance(key, str):
            return _Fault(
                [], f"the key {key!r} is a {type(key).__name__}, and JSON's keys are strings", False
            )
        if (found := _fault(item, levels - 1)) is not None:
            found.steps.append(key)
            return found
    return None


# -- the calls, said once for both clients -----------------------------------------------------------


def _conversation(conversation_id: str, *steps: str) -> str:
    return "/".join(("/conversations", _step(conversation_id, "conversation_id"), *steps))


def _messages(conversation_id: str, *message_ids: str) -> str:
    quoted = [_step(each, "message_id") for each in message_ids]
    return _conversation(conversation_id, "messages", *quoted)


def _create(user_id: str, conversation_id: str | None, title: str | None, metadata: Json | None) -> _Call:
    # The id is ours if it is not the caller's, so that a repetition finds what the first attempt made.
    body: Json = {"user_id": user_id, "id": conversation_id or f"conv_{uuid4().hex}"}
    said = {"title": title, "metadata": metadata}
    body |= {name: value for name, value in said.items() if value is not None}
    return _Call("POST", "/conversations", content=_encoded(body, "$"))


def _append(
    conversation_id: str, messages: Sequence[Mapping[str, Any]], key: str | None, user_id: str | None
) -> _Call:
    given = list(messages)
    own_ids = any(isinstance(message, Mapping) and "id" in message for message in given)
    if key is None and not own_ids:
        key = uuid4().hex
    return _append_encoded(conversation_id, _encoded_messages(given), key, user_id)


def _append_encoded(
    conversation_id: str, messages: Sequence[bytes], key: str | None, user_id: str | None
) -> _Call:
    if key is not None and not (key.isascii() and key.isprintable()):
        raise _refusal("header.Idempotency-Key", "only printable ASCII characters can be sent")
    headers = {} if key is None else {"Idempotency-Key": key}
    body = b'{"messages":[' + b",".join(messages) + b"]}"
    return _Call("POST", _messages(conversation_id), {"user_id": user_id}, body, headers)


def _encoded_messages(messages: Sequence[Any]) -> list[bytes]:
    plain = [dict(each) if isinstance(each, Mapping) else each for each in messages]
    return [_encoded(each, f"$.messages[{place}]") for place, each in enumerate(plain)]


@dataclass(frozen=True)
class _Batch:
    """Messages of a longer list, as they are sent, with the key under which they are stored once."""

    first: int
    messages: Sequence[bytes]
    key: str

    def halves(self) -> list[_Batch]:
        """Return it as two, each with a key that a repetition of this makes again."""
        cut = len(self.messages) // 2
        return [
            _Batch(self.first, self.messages[:cut], f"{self.key}-0"),
            _Batch(self.first + cut, self.messages[cut:], f"{self.key}-1"),
        ]

    def can_be_halved(self, error: ApiError) -> bool:
        """Tell whether the service, or a proxy before it, refused this for its size alone."""
        return error.status == 413 and len(self.messages) > 1

    def name_places(self, error: ApiError) -> None:
        """Count the places that an error names from the list's beginning, not from the batch's."""

        def moved(text: str) -> str:
            return re.sub(r"\$\.messages\[(\d+)\]", lambda at: f"$.messages[{int(at[1]) + self.first}]", text)

        error.detail = moved(error.detail)
        error.errors = [{**each, "path": moved(str(each.get("path", "")))} for each in error.errors]
        error.args = (moved(str(error)),)


def _batches(messages: Sequence[Any]) -> list[_Batch]:
    """Cut messages into batches by their number and by their bytes, as few as there can be."""
    batches: list[_Batch] = []
    first, size = 0, 0
    encoded = _encoded_messages(messages)
    for place, message in enumerate(encoded):
        if place > first and (place - first == _BATCH_ITEMS or size + len(message) >= _BATCH_BYTES):
            batches.append(_Batch(first, encoded[first:place], uuid4().hex))
            first, size = place, 0
        size += len(message) + 1
    return [*batches, _Batch(first, encoded[first:], uuid4().hex)] if encoded else []


def _update(conversation_id: str, title: Any, metadata: Any, user_id: str | None) -> _Call:
    changes = {"title": title, "metadata": metadata}
    body = {name: value for name, value in changes.items() if value is not UNSET}
    return _Call("PATCH", _conversation(conversation_id), {"user_id": user_id}, _encoded(body, "$"))


def _pop(conversation_id: str, user_id: str | None) -> _Call:
    return _Call("POST", _conversation(conversation_id, "pop"), {"user_id": user_id}, repeatable=False)


def _put_back(conversation_id: str, message: Json, user_id: str | None) -> _Call:
    # Its own id makes this append repeatable.
    given = {name: value for name, value in message.items() if name not in _SERVICE_FIELDS}
    return _append(conversation_id, [given], None, user_id)


def _page(answer: Json) -> Page:
    return Page(answer["data"], answer["has_more"], answer["next"])


# -- answers and repetitions -------------------------------------------------------------------------


def _raise_for(response: httpx.Response) -> None:
    """Raise the error that an answer says, if it says one; the service never redirects."""
    if response.is_success:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": response.text[:200] or f"Redirected to {response.headers.get('location')}."}
    named = {404: NotFound, 409: Conflict, **dict.fromkeys(_AGAIN, Unavailable)}
    seconds = response.headers.get("retry-after", "")
    after = float(seconds) if seconds.isdecimal() else None
    problem = problem if isinstance(problem, dict) else {}
    raise named.get(response.status_code, ApiError)(response.status_code, problem, after)


def _answer(response: httpx.Response) -> Any:
    _raise_for(response)
    try:
        return response.json() if response.content else None
    except ValueError:
        detail = "The answer is not JSON, so `base_url` is not this service's."
        raise ApiError(response.status_code, {"detail": detail}) from None


# Reasons of OpenSSL that mean that the other side does not speak TLS, or none that we do.
_NEVER_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL"})


def _is_final(error: BaseException | None) -> bool:
    """Tell whether a failure stays the same, however often the call is repeated."""
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return True
    if isinstance(error, httpx.ProxyError) and str(error).startswith(("401", "403", "407")):
        return True  # the proxy's own refusal, 407 for one
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if isinstance(error, ssl.SSLError) and error.reason in _NEVER_TLS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _worth_repeating(call: _Call) -> Any:
    def worth(error: BaseException) -> bool:
        if _is_final(error):
            return False
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


# -- connections ---------------------------------------------------------------------------------------

_SETTINGS: WeakSet[_Settings] = WeakSet()
# Connections that belong to the parent of this process. They are kept, because to close one could end it for
# the parent, too: TLS says goodbye, and an event loop shares its selector with the loop it was copied from.
_INHERITED: list[Any] = []


def _after_fork() -> None:
    for each in list(_SETTINGS):
        each.leave_connections_to_parent()


if hasattr(os, "register_at_fork"):
    # A child has one thread, and this runs in it before anything else, so no lock is needed, and none that
    # another thread of the parent held can be in the way.
    os.register_at_fork(after_in_child=_after_fork)


def _url(base_url: str | httpx.URL) -> httpx.URL:
    """Return the service's URL, or raise the ValueError that says what is wrong with it."""
    try:
        url = httpx.URL(base_url)
        host = url.host
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"`base_url` is not a URL: {error}. Give one like http://127.0.0.1:8000.") from error
    if url.scheme not in {"http", "https"}:
        why = f"has the scheme {url.scheme!r}" if url.scheme else "has no scheme"
    elif not host or "%" in host:
        why = f"has the host {host!r}"
    elif url.port is not None and not 0 < url.port < 65_536:
        why = f"has the port {url.port}"
    else:
        return url
    raise ValueError(f"`base_url` {why}. Give one like http://127.0.0.1:8000 or https://chat.example.com.")


def _headers(api_key: str | None, more: Mapping[str, str] | None) -> dict[str, str]:
    headers = {**({"Authorization": f"Bearer {api_key}"} if api_key else {}), **(more or {})}
    for name, value in headers.items():
        # The value may be secret, so it is not quoted.
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(
                f"The header {name} has a value that HTTP cannot carry (a line break, a space at an end, or "
                "a character that is not ASCII). If it is from a file, strip it."
            )
    return headers


class _Settings:
    """What both clients are made with, and the connections that they opened in this process."""

    def __init__(
        self,
        base_url: str | httpx.URL = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: Any = None,
    ) -> None:
        self._options: Json = {
            "base_url": _url(base_url),
            "timeout": timeout_s,
            "headers": _headers(api_key, headers),
            # To make one takes longer than a call, so all event loops and processes share it.
            "verify": httpx.create_ssl_context(),
        }
        self._transport = transport
        self._transport_is_inherited = False
        self._retry_s = retry_s
        # After a cancellation a write has as long as a call that begins now.
        self._outcome_s = retry_s + timeout_s
        self._open: dict[Any, Any] = {}
        _SETTINGS.add(self)

    def leave_connections_to_parent(self) -> None:
        """Begin without connections, in a child process, and keep the parent's untouched."""
        _INHERITED.append(self._open)
        self._open = {}
        self._transport_is_inherited = True

    def _httpx_options(self) -> Json:
        if self._transport is None:
            return self._options
        if callable(self._transport):
            return {**self._options, "transport": self._transport()}
        if self._transport_is_inherited:
            raise RuntimeError(
                "This client's `transport` holds the connections of the parent process. Give the client a "
                "function that makes a transport, and each process has its own."
            )
        return {**self._options, "transport": self._transport}

    def _retrying(self, call: _Call, position: _Position | None = None) -> Json:
        stop = position.stands_still(self._retry_s) if position else stop_after_delay(self._retry_s)
        return {"retry": _worth_repeating(call), "wait": _wait, "stop": stop, "reraise": True}


@dataclass(frozen=True)
class _Connected:
    """The connections of one event loop, and what closes them when that loop ends."""

    http: httpx.AsyncClient
    closing: AsyncGenerator[None, None]


# So many event loops that are not running may keep their connections at the same time.
_IDLE_LOOPS = 32
# So many loops may end without closing their connections before the garbage collector is asked to.
_UNCLOSED_LOOPS = 16


class ChatHistoryClient(_Settings):
    """The asynchronous client; one may be used from several event loops, threads and processes.

    `base_url` is the service's; the options are `api_key`, `timeout_s` (of one attempt), `retry_s` (how long
    a call is repeated), `headers`, and httpx's `transport`, or a function that makes one, which is needed
    where there are several event loops or processes. Calls raise ApiError and its kinds, or
    httpx.TransportError when no attempt had an answer; a `base_url` or a header that cannot work is a
    ValueError at once. Where `user_id` may be given, the conversation must be that user's.

    A write that is cancelled is finished first, within `retry_s + timeout_s`: its outcome is settled when the
    CancelledError comes. So it is not lost, nor does it show up later. Reads are cancelled at once.

    An event loop has connections of its own. `aclose` closes them, and so does the loop's own end
    (`asyncio.run`, and whoever calls `shutdown_asyncgens`). Those of a loop that was closed without it are
    left to the garbage collector, because nobody else can close them.
    """

    def __init__(self, base_url: str | httpx.URL = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(base_url, **options)
        self._unclosed = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        connected = self._open.pop(asyncio.get_running_loop(), None)
        if connected is not None:
            await connected.closing.aclose()

    async def _http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        connected: _Connected | None = self._open.get(loop)
        if connected is None:
            self._drop_ended_loops()
            http = httpx.AsyncClient(**self._httpx_options())
            connected = self._open[loop] = _Connected(http, self._closing(loop, http))
            # It is begun, so that the loop knows of it, and ends it when the loop itself is shut down.
            await anext(connected.closing)
        return connected.http

    async def _closing(
        self, loop: asyncio.AbstractEventLoop, http: httpx.AsyncClient
    ) -> AsyncGenerator[None, None]:
        opened = self._open
        try:
            yield
        finally:
            # A child process that falls out of its parent's event loop ends it, too, and must not do this.
            if self._open is opened:
                opened.pop(loop, None)
                await http.aclose()

    def _drop_ended_loops(self) -> None:
        """Let go of the connections of loops that were closed without them, or that are too many."""
        unused = [loop for loop in list(self._open) if loop.is_closed()]
        if len(self._open) - len(unused) > _IDLE_LOOPS:
            unused += [loop for loop in list(self._open) if not loop.is_closed() and not loop.is_running()]
        for loop in unused:
            self._open.pop(loop, None)
        self._unclosed += len(unused)
        if self._unclosed >= _UNCLOSED_LOOPS:
            self._unclosed = 0
            gc.collect()

    async def _do(self, call: _Call) -> Any:
        if call.method == "GET":
            return await self._attempts(call)
        return await self._settled(lambda: self._attempts(call), repeatable=call.repeatable)

    async def _attempts(self, call: _Call) -> Any:
        async for attempt in AsyncRetrying(**self._retrying(call)):
            with attempt:
                try:
                    http = await self._http()
                    return _answer(await http.request(call.method, call.path, **call.options()))
                except NotFound as error:
                    if _gone_already(call, attempt.retry_state.attempt_number, error):
                        return None
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _settled(
        self,
        write: Callable[[], Coroutine[Any, Any, T]],
        *,
        repeatable: bool = True,
        undo: Callable[[T], Coroutine[Any, Any, Any]] | None = None,
    ) -> T:
        """Run a write to its outcome, whatever cancels the caller; then let the cancellation through.

        With `undo`, a write that was done for a caller who will not hear of it is taken back before that.
        """
        with anyio.CancelScope(shield=True):  # for AnyIO would cancel again in each step of the loop
            task, cancelled = await self._outcome(write, repeatable)
        given_up = cancelled is not None or anyio.current_effective_deadline() == -math.inf
        failure = None if task.cancelled() else task.exception()
        if given_up and undo is not None and failure is None and not task.cancelled():
            result = task.result()
            with anyio.CancelScope(shield=True):
                undone, again = await self._outcome(lambda: undo(result), repeatable=True)
            cancelled = cancelled or again
            failure = None if undone.cancelled() else undone.exception()
        if cancelled is not None:
            raise cancelled from failure
        await anyio.lowlevel.checkpoint_if_cancelled()
        return task.result()

    async def _outcome(
        self, write: Callable[[], Coroutine[Any, Any, T]], repeatable: bool
    ) -> tuple[asyncio.Task[T], asyncio.CancelledError | None]:
        """Wait for a write in a task of its own, and return it with the first cancellation that came.

        The end of an event loop cancels the write itself, too. One that is repeatable is then begun anew, for
        the loop waits until those whom it cancelled are done.
        """
        task = asyncio.create_task(write())
        cancelled: asyncio.CancelledError | None = None
        deadline = math.inf
        while True:
            left = None if cancelled is None else max(0.0, deadline - time.monotonic())
            try:
                await asyncio.wait({task}, timeout=left)
            except asyncio.CancelledError as error:
                if cancelled is None:
                    cancelled, deadline = error, time.monotonic() + self._outcome_s
                continue
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                return task, cancelled
            ended_from_outside = task.cancelled() and task.cancelling() > 0
            if not ended_from_outside or not repeatable or time.monotonic() > deadline:
                return task, cancelled
            task = asyncio.create_task(write())

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

    async def append_all(
        self, user_id: str, conversation_id: str, messages: Sequence[Mapping[str, Any]]
    ) -> None:
        """Append messages of any number and size, and create the conversation where it is not there.

        They go in batches of up to 1,000 messages and 24 MiB, or smaller ones where the service says that
        these are too large (413). Each batch is stored whole or not at all, and once. When one is refused,
        those before it stay stored, those behind it are not sent, and the error counts its places from the
        beginning of `messages`. A message that is too large by itself is sent alone, so that the service
        says so.
        """
        batches = _batches(messages)
        if batches:
            await self._settled(lambda: self._append_batches(user_id, conversation_id, batches))

    async def _append_batches(self, user_id: str, conversation_id: str, batches: Sequence[_Batch]) -> None:
        for batch in batches:
            call = _append_encoded(conversation_id, batch.messages, batch.key, user_id)
            try:
                await self._append_or_create(user_id, conversation_id, call)
            except ApiError as error:
                if not batch.can_be_halved(error):
                    batch.name_places(error)
                    raise
                await self._append_batches(user_id, conversation_id, batch.halves())

    async def _append_or_create(self, user_id: str, conversation_id: str, call: _Call) -> None:
        try:
            await self._attempts(call)
        except NotFound:
            await self._attempts(_create(user_id, conversation_id, None, None))
            await self._attempts(call)

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
                http = await self._http()
                async with http.stream(call.method, call.path, **call.options()) as response:
                    if not response.is_success:
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
        raises, and the message may be gone. When the caller was cancelled, and so will not have the message,
        it is appended again, with its id, before the cancellation goes on: it stays in the history, as the
        newest.
        """

        async def take() -> Json | None:
            popped: Json | None = await self._attempts(_pop(conversation_id, user_id))
            return popped

        async def put_back(message: Json | None) -> None:
            if message is not None:
                await self._attempts(_put_back(conversation_id, message, user_id))

        return await self._settled(take, repeatable=False, undo=put_back)


class SyncChatHistoryClient(_Settings):
    """The synchronous client, like ChatHistoryClient call for call; for several threads and processes."""

    def __init__(self, base_url: str | httpx.URL = "http://127.0.0.1:8000", **options: Any) -> None:
        super().__init__(base_url, **options)
        self._http()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of this process."""
        http = self._open.get(None)
        if http is not None:
            http.close()

    def _http(self) -> httpx.Client:
        http: httpx.Client | None = self._open.get(None)
        if http is None:
            # Of two threads that come here at once, one has made a client in vain, and nothing else.
            http = self._open.setdefault(None, httpx.Client(**self._httpx_options()))
        return http

    def _do(self, call: _Call) -> Any:
        for attempt in Retrying(**self._retrying(call)):
            with attempt:
                try:
                    return _answer(self._http().request(call.method, call.path, **call.options()))
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

    def append_all(self, user_id: str, conversation_id: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """Append messages of any number and size, as ChatHistoryClient does."""
        self._append_batches(user_id, conversation_id, _batches(messages))

    def _append_batches(self, user_id: str, conversation_id: str, batches: Sequence[_Batch]) -> None:
        for batch in batches:
            call = _append_encoded(conversation_id, batch.messages, batch.key, user_id)
            try:
                self._append_or_create(user_id, conversation_id, call)
            except ApiError as error:
                if not batch.can_be_halved(error):
                    batch.name_places(error)
                    raise
                self._append_batches(user_id, conversation_id, batch.halves())

    def _append_or_create(self, user_id: str, conversation_id: str, call: _Call) -> None:
        try:
            self._do(call)
        except NotFound:
            self._do(_create(user_id, conversation_id, None, None))
            self._do(call)

    def history(self, conversation_id: str, **filters: Any) -> Page:
        """Return a page of messages; the filters are those of the API (`limit`, `last`, `after` …)."""
        return _page(self._do(_Call("GET", _messages(conversation_id), filters)))

    def stream(self, conversation_id: str, **filters: Any) -> Iterator[Json]:
        """Yield the history, message by message; where the connection breaks, go on behind the last one.

        A child process may go on with a stream that its parent began; it does so on a connection of its own.
        """
        position = _Position(conversation_id, filters)
        for attempt in Retrying(**self._retrying(position.call(), position)):
            with attempt:
                if position.done:
                    return
                for chunk in self._chunks(position.call()):
                    yield from position.messages(chunk)
                return

    def _chunks(self, call: _Call) -> Iterator[bytes]:
        http, opened = self._http(), self._open
        response = http.send(http.build_request(call.method, call.path, **call.options()), stream=True)
        chunks = response.iter_bytes()
        try:
            if not response.is_success:
                response.read()
            _raise_for(response)
            for chunk in chunks:
                yield chunk
                if self._open is not opened:
                    raise httpx.ReadError("The connection belongs to the parent process.")
        finally:
            if self._open is opened:
                response.close()
            else:
                _INHERITED.append((response, chunks))

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
