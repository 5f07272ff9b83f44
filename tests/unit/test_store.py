"""Locks, committed reads and work one by one, over a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import bson
import pytest

from service.database import Transaction
from service.errors import (
    BrokenCounter,
    ConversationNotFound,
    DatabaseUnavailable,
    IdempotencyConflict,
    MessageNotFound,
)
from service.history.store import ConversationStore
from service.tenancy import ConversationRef, OwnerKey
from tests.unit.fake_store import KEY, OWNER, FakeDatabase, conversation, fake_store

REF = ConversationRef(KEY, OWNER)


class Outcomes:
    """Notes how each transaction ended, and whether it had written."""

    def __init__(self, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[tuple[str, bool]] = []
        monkeypatch.setattr(database, "transaction", self._transaction)

    async def _transaction(
        self, work: Callable[[Transaction], Awaitable[Any]], transaction: Transaction | None = None
    ) -> Any:
        transaction = transaction or Transaction()
        try:
            result = await work(transaction)
        except Exception:
            self.ended.append(("aborted", transaction.wrote))
            raise
        self.ended.append(("committed", transaction.wrote))
        return result


def work_that(outcome: Any) -> Callable[[Transaction], Awaitable[Any]]:
    async def work(_: Transaction) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return work


@pytest.mark.parametrize(
    ("outcome", "ended"),
    [
        (7, ("committed", True)),
        (ConversationNotFound("…"), ("committed", False)),
        (MessageNotFound("…"), ("aborted", True)),
        (IdempotencyConflict("…"), ("aborted", True)),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_write_that_finds_no_conversation_commits_what_it_read(
    outcome: Any, ended: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, database = fake_store()
    outcomes = Outcomes(database, monkeypatch)
    if isinstance(outcome, Exception):
        with pytest.raises(type(outcome)):
            await store.run_exclusive(REF, work_that(outcome))
    else:
        assert await store.run_exclusive(REF, work_that(outcome)) == outcome
    assert outcomes.ended == [ended]


@pytest.mark.parametrize(
    ("outcome", "ended"),
    [
        (7, ("committed", False)),
        (ConversationNotFound("…"), ("committed", False)),
        (IdempotencyConflict("…"), ("committed", False)),
        (BrokenCounter("…"), ("committed", False)),
        (DatabaseUnavailable("…"), ("aborted", False)),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_a_read_finds_is_committed_before_it_is_told(
    outcome: Any, ended: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, database = fake_store()
    outcomes = Outcomes(database, monkeypatch)
    if isinstance(outcome, Exception):
        with pytest.raises(type(outcome)):
            await store.read_committed(work_that(outcome))
    else:
        assert await store.read_committed(work_that(outcome)) == outcome
    assert outcomes.ended == [ended]


# -- locks -----------------------------------------------------------------------------------------


async def started(store: ConversationStore, ref: ConversationRef, until: asyncio.Event) -> asyncio.Task[Any]:
    """Begin a write that lasts until an event, and return when it runs or waits."""

    async def work(_: Transaction) -> None:
        await until.wait()

    task = asyncio.create_task(store.run_exclusive(ref, work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize(
    ("other", "waits"),
    [
        (REF, True),
        (ConversationRef(KEY, OwnerKey("bob")), False),
        (ConversationRef(KEY), False),
        (ConversationRef(KEY, OWNER, {"importing": None}), True),
    ],
    ids=str,
)
async def test_writes_of_one_owner_to_one_conversation_wait_for_each_other(
    other: ConversationRef, waits: bool
) -> None:
    store, _ = fake_store()
    end = asyncio.Event()
    first = await started(store, REF, end)
    order: list[str] = []

    async def work(_: Transaction) -> None:
        order.append("second")

    second = asyncio.create_task(store.run_exclusive(other, work))
    for _ in range(5):
        await asyncio.sleep(0)
    assert order == ([] if waits else ["second"])
    end.set()
    await asyncio.gather(first, second)
    assert order == ["second"]
    # A lock that nobody holds is dropped, so the table does not grow with the conversations.
    del first, second
    assert len(store._locks) == 0


async def test_a_write_waits_no_longer_than_the_time_of_a_call() -> None:
    store, _ = fake_store(database_timeout_ms=1)
    end = asyncio.Event()
    first = await started(store, REF, end)
    with pytest.raises(DatabaseUnavailable, match="Too many writers"):
        await store.run_exclusive(REF, work_that(None))
    end.set()
    await first
    assert await store.run_exclusive(REF, work_that("free again")) == "free again"


async def test_a_write_that_fails_gives_its_lock_back() -> None:
    store, _ = fake_store(database_timeout_ms=1)
    with pytest.raises(RuntimeError):
        await store.run_exclusive(REF, work_that(RuntimeError("a fault")))
    assert await store.run_exclusive(REF, work_that("free again")) == "free again"


# -- one by one ------------------------------------------------------------------------------------


async def test_work_is_done_for_each_and_counted() -> None:
    store, _ = fake_store()
    seen: list[Any] = []

    async def work(each: Any) -> bool | None:
        seen.append(each)
        return False if each == "nothing to do" else None

    assert await store.for_each("not_done", ["a", "nothing to do", "b"], work) == 2
    assert seen == ["a", "nothing to do", "b"]


@pytest.mark.parametrize(
    ("error", "ready", "stops"),
    [
        (RuntimeError("a fault"), False, False),
        (DatabaseUnavailable("busy"), True, False),
        (DatabaseUnavailable("away"), False, True),
    ],
)
async def test_only_a_database_that_is_away_stops_the_rest(
    error: Exception, ready: bool, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, database = fake_store()

    async def is_ready() -> bool:
        return ready

    monkeypatch.setattr(database, "is_ready", is_ready)
    done: list[bytes] = []

    async def work(each: bytes) -> None:
        if not done:
            done.append(each)
            raise error
        done.append(each)

    documents = [bson.encode(conversation(key)) for key in "ab"]
    if stops:
        with pytest.raises(DatabaseUnavailable):
            await store.for_each("not_done", documents, work)
        assert len(done) == 1
    else:
        assert await store.for_each("not_done", documents, work) == 1
        assert done == documents
