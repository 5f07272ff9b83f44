"""Several calls of the driver in one thread: where they run, and what ends them."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pymongo
import pytest
from pymongo import _csot

from service.database.threads import DriverThreads


@pytest.fixture
async def threads() -> AsyncIterator[DriverThreads]:
    opened = DriverThreads()
    yield opened
    opened.close_threads()


async def test_a_whole_coroutine_runs_in_one_thread(threads: DriverThreads) -> None:
    async def work() -> list[int]:
        return [await threads.run_in_thread(threading.get_ident) for _ in range(3)]

    idents = await threads.run_whole_in_thread(work)
    assert len(set(idents)) == 1
    assert idents[0] != threading.get_ident()


async def test_the_deadline_of_the_caller_holds_in_the_thread(threads: DriverThreads) -> None:
    async def work() -> float | None:
        return await threads.run_in_thread(_csot.remaining)

    with pymongo.timeout(5):
        left = await threads.run_whole_in_thread(work)
    assert left is not None
    assert 0 < left <= 5


async def test_an_error_of_a_call_reaches_the_coroutine_and_then_the_caller(threads: DriverThreads) -> None:
    def fail() -> None:
        raise ValueError("as it is")

    caught = []

    async def work() -> None:
        try:
            await threads.run_in_thread(fail)
        except ValueError as error:
            caught.append(error)
            raise

    with pytest.raises(ValueError, match="as it is"):
        await threads.run_whole_in_thread(work)
    assert len(caught) == 1


async def test_a_cancelled_caller_ends_the_coroutine_before_its_next_call(threads: DriverThreads) -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        began.set()
        may_end.wait(10)

    async def work() -> None:
        try:
            await threads.run_in_thread(call)
            await threads.run_in_thread(call)
        finally:
            ended.set()

    task = asyncio.create_task(threads.run_whole_in_thread(work))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_end.set()
    assert await asyncio.to_thread(ended.wait, 10)
    assert calls == [0]


async def test_a_coroutine_that_waits_for_something_else_is_refused(threads: DriverThreads) -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="waits for something else"):
        await threads.run_whole_in_thread(work)
