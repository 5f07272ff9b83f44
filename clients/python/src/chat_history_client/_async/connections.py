"""Connections of an event loop, and cancellations: what the asynchronous client has by nature.

`_sync/connections.py` is its twin; the other modules of `_sync` are generated from those of `_async`.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.lowlevel
import httpx

from chat_history_client._requests import Call
from chat_history_client._retries import raise_unless_begun
from chat_history_client._settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class _Connected:
    """The connections of one event loop, and what closes them when that loop ends."""

    http: httpx.AsyncClient
    closing: AsyncGenerator[None, None]


# So many event loops that are not running may keep their connections at the same time.
_IDLE_LOOPS = 32
# So many loops may end without closing their connections before the garbage collector is asked to.
_UNCLOSED_LOOPS = 16


class Connections(Settings[httpx.AsyncBaseTransport]):
    """The connections of each event loop, and what a cancelled caller leaves to be done.

    An event loop has connections of its own. `aclose` closes them, and so does the loop's own end
    (`asyncio.run`, and whoever calls `shutdown_asyncgens`). Those of a loop that was closed without it are
    left to the garbage collector, because nobody else can close them.
    """

    _unclosed = 0

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

    async def _chunks(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Yield the body of an answer as it comes."""
        http = await self._http()
        async with http.stream(call.method, call.path, **self._request(call)) as response:
            if not response.is_success:
                await response.aread()
            raise_unless_begun(call, response)
            async for chunk in response.aiter_bytes():
                yield chunk

    async def _pause(self, seconds: float) -> None:
        await anyio.sleep(seconds)

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
