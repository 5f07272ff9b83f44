"""The threads in which calls of the driver run, because PyMongo waits in the thread that calls it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

import pymongo

T = TypeVar("T")

# As many threads as Motor has: the most calls of the driver that run at once.
_THREADS = 32
# Set in a thread that runs a whole transaction: whether its caller was cancelled.
_CALLER_IS_GONE: ContextVar[threading.Event | None] = ContextVar("caller_is_gone", default=None)


class CallerIsGone(Exception):
    """Ends a transaction in its thread, because its caller was cancelled. Nobody waits for it."""


class DriverThreads:
    """Threads for the calls of one connection."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")

    async def run_in_thread(self, calls: Callable[[], T]) -> T:
        """Run one call of the driver, or several in a row, in one thread, with the caller's deadline.

        Motor takes a thread for each call, and several turns of the event loop, which is most of its cost.
        Inside of `run_whole_in_thread` the calls run at once, because that is such a thread.
        """
        caller_is_gone = _CALLER_IS_GONE.get()
        if caller_is_gone is not None:
            if caller_is_gone.is_set():
                raise CallerIsGone
            return calls()
        # The driver keeps its deadline in a context variable.
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, calls)

    async def run_whole_in_thread(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine that waits for nothing but `run_in_thread` in one thread, from beginning to end.

        Such a coroutine is never suspended there, so it needs no event loop. If the caller is cancelled, the
        call of the driver that is under way ends by itself, and the next one raises CallerIsGone.
        """
        caller_is_gone = threading.Event()

        def run() -> T:
            _CALLER_IS_GONE.set(caller_is_gone)  # in this thread's copy of the context
            coroutine = work()
            try:
                coroutine.send(None)
            except StopIteration as ended:
                result: T = ended.value
                return result
            coroutine.close()
            raise AssertionError("The work of a transaction in one thread waits for something else.")

        try:
            return await self.run_in_thread(run)
        except asyncio.CancelledError:
            caller_is_gone.set()
            raise

    async def run_without_limit(self, calls: Callable[[], T]) -> T:
        """Run calls of the driver that may take hours, without any deadline, in a thread of their own.

        The interpreter waits for the threads of an executor when it ends, so there a call that takes hours
        would keep the process from ending. It does not wait for a daemon thread.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                # Zero is no limit, also where the URL has `timeoutMS`.
                with pymongo.timeout(0):
                    result = calls()
            except BaseException as error:  # noqa: BLE001  (whoever waits for the result gets it)
                tell(_fail, future, error)
            else:
                tell(_succeed, future, result)

        def tell(*call: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody waits
                loop.call_soon_threadsafe(*call)

        threading.Thread(target=run, name="database-without-limit", daemon=True).start()
        return await future

    def close_threads(self) -> None:
        """Start no further call. A thread that still waits for the server ends by its own deadline."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
