"""Appends to one conversation that wait at the same time share a transaction, and each has its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import pytest
from pymongo import monitoring

from service.chat_service import ChatService
from service.database import Database, Transaction
from service.errors import BatchTooLarge, ConversationNotFound, DatabaseUnavailable, IdempotencyConflict
from service.history import appending, group_commit
from service.history.appending import AppendResult
from service.history.new_messages import PreparedBatch
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import ConversationRef, TenantScope
from tests.harness import Service, new_id, until_ready
from tests.integration.test_flat_cost import Commands
from tests.mongo_proxy import TIMED_OUT, MongoProxy, mongo_proxied

SCOPE = TenantScope()


class Queue:
    """A conversation whose turn is taken, so that all appends to it wait until `let_go`."""

    def __init__(self, store: ConversationStore, conversation: str) -> None:
        self.store = store
        self.conversation = conversation
        self.chat = ChatService(store, SCOPE)
        self._going: list[asyncio.Task[Any]] = []
        self._released = asyncio.Event()

    async def hold(self) -> None:
        held = asyncio.Event()

        async def hold() -> None:
            async with self.store.turn(SCOPE.conversation(self.conversation)):
                held.set()
                await self._released.wait()

        self._going.append(asyncio.create_task(hold()))
        await held.wait()

    async def add(self, *contents: str, key: str | None = None) -> asyncio.Task[AppendResult]:
        """Begin an append, and return when it waits."""
        messages = [{"role": "user", "content": content} for content in contents]
        work: Coroutine[Any, Any, AppendResult] = self.chat.add_messages(
            self.conversation, messages, idempotency_key=key
        )
        task = asyncio.create_task(work)
        await asyncio.sleep(0.01)
        assert not task.done()
        return task

    def let_go(self) -> None:
        self._released.set()

    async def contents(self) -> list[str]:
        page = await self.chat.get_chat_history(self.conversation, limit=1_000)
        assert [each["seq"] for each in page.messages] == list(range(1, len(page.messages) + 1))
        return [each["content"] for each in page.messages]


async def opened(url: str, commands: Commands | None = None, **settings: Any) -> Database:
    if commands is not None:
        monitoring.register(commands)
    database = Database(Settings(_env_file=None, mongodb_url=url, **settings))
    await database.open()
    await until_ready(database)
    if commands is not None:
        monitoring._LISTENERS.command_listeners.remove(commands)
        commands.sent.clear()
    return database


async def queue_on(database: Database, **settings: Any) -> Queue:
    store = ConversationStore(database, Settings(_env_file=None, **settings))
    queue = Queue(store, new_id())
    await queue.chat.get_or_create_conversation("ada", queue.conversation)
    return queue


@pytest.fixture
async def counted(service: Service) -> AsyncIterator[tuple[Queue, Commands]]:
    commands = Commands()
    database = await opened(service.database_url, commands, database_timeout_ms=60_000)
    queue = await queue_on(database, database_timeout_ms=60_000)
    commands.sent.clear()
    yield queue, commands
    await queue.store.close()
    await database.close()


def sent(commands: Commands, name: str) -> int:
    return sum(name in each for each in commands.sent)


async def test_appends_that_wait_share_one_transaction_and_batches_stand_together(
    counted: tuple[Queue, Commands],
) -> None:
    queue, commands = counted
    await queue.hold()
    waiting = [await queue.add(f"{n}", f"{n} again", key=f"key {n}") for n in range(20)]
    queue.let_go()
    results = await asyncio.gather(*waiting)
    assert (sent(commands, "commitTransaction"), sent(commands, "insert")) == (1, 1)
    assert not any(result.replayed for result in results)
    assert await queue.contents() == [text for n in range(20) for text in (f"{n}", f"{n} again")]
    for n, result in enumerate(results):
        assert [each["seq"] for each in result.messages] == [2 * n + 1, 2 * n + 2]


async def test_a_replay_and_a_conflict_among_them_have_their_own_answers_and_the_rest_goes_on(
    counted: tuple[Queue, Commands],
) -> None:
    queue, commands = counted
    first = await queue.chat.add_message(
        queue.conversation, {"role": "user", "content": "a"}, idempotency_key="a"
    )
    commands.sent.clear()
    await queue.hold()
    new = [await queue.add(f"{n}") for n in range(5)]
    replay = await queue.add("a", key="a")
    conflict = await queue.add("not a", key="a")
    twins = [await queue.add("twin", key="twin") for _ in range(3)]
    new += [await queue.add(f"{n}") for n in range(5, 10)]
    queue.let_go()
    assert [each.messages[0]["content"] for each in await asyncio.gather(*new)] == [f"{n}" for n in range(10)]
    assert (await replay).replayed
    assert (await replay).messages == first.messages
    with pytest.raises(IdempotencyConflict):
        await conflict
    found = await asyncio.gather(*twins)
    assert sorted(each.replayed for each in found) == [False, True, True]
    assert len({each.messages[0]["id"] for each in found}) == 1
    assert sorted(await queue.contents()) == sorted(["a", "twin", *(f"{n}" for n in range(10))])
    # One insert for the rest, one for each time that a duplicate was found in it, and two for each duplicate.
    assert sent(commands, "insert") <= 3 + 2 * 4


async def test_who_is_cancelled_before_its_turn_is_not_stored_and_the_others_are(
    counted: tuple[Queue, Commands],
) -> None:
    queue, _ = counted
    await queue.hold()
    before, cancelled, after = [await queue.add(text) for text in ("before", "cancelled", "after")]
    cancelled.cancel()
    queue.let_go()
    await asyncio.gather(before, after)
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await queue.contents() == ["before", "after"]
    assert not queue.store.append_queues


async def test_a_caller_that_has_waited_too_long_is_told_so_and_the_others_are_stored(
    service: Service,
) -> None:
    database = await opened(service.database_url, database_timeout_ms=700)
    queue = await queue_on(database, database_timeout_ms=60_000)
    try:
        await queue.hold()
        late = await queue.add("late")
        with pytest.raises(DatabaseUnavailable):
            await late
        in_time = await queue.add("in time")
        queue.let_go()
        assert not (await in_time).replayed
        assert await queue.contents() == ["in time"]
    finally:
        await queue.store.close()
        await database.close()


async def test_appends_to_a_conversation_that_is_deleted_meanwhile_are_all_told(
    counted: tuple[Queue, Commands],
) -> None:
    queue, _ = counted
    await queue.hold()
    waiting = [await queue.add(f"{n}") for n in range(3)]
    another_process = ConversationStore(queue.store.database, queue.store.settings)
    await ChatService(another_process, SCOPE).delete_conversation(queue.conversation)
    queue.let_go()
    for each in waiting:
        with pytest.raises(ConversationNotFound):
            await each


async def test_a_group_whose_transaction_is_too_large_is_stored_one_by_one(
    counted: tuple[Queue, Commands], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, _ = counted
    original = appending.insert

    async def insert(
        store: ConversationStore,
        ref: ConversationRef,
        batches: list[PreparedBatch],
        transaction: Transaction,
        **condition: Any,
    ) -> appending.Inserted:
        if len(batches) > 1:
            raise BatchTooLarge("Too large.")
        return await original(store, ref, batches, transaction, **condition)

    monkeypatch.setattr(appending, "insert", insert)
    await queue.hold()
    waiting = [await queue.add(f"{n}") for n in range(3)]
    queue.let_go()
    await asyncio.gather(*waiting)
    assert sorted(await queue.contents()) == ["0", "1", "2"]


async def test_whoever_waits_for_a_group_that_fails_by_a_fault_of_ours_is_told(
    counted: tuple[Queue, Commands], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, _ = counted
    await queue.chat.add_message(queue.conversation, {"role": "user", "content": "a"}, idempotency_key="a")
    monkeypatch.setattr(group_commit, "_duplicates", None)
    await queue.hold()
    waiting = [await queue.add("a", key="a"), await queue.add("b")]
    queue.let_go()
    for each in waiting:
        with pytest.raises(DatabaseUnavailable):
            await each
    assert not queue.store.append_queues


@pytest.fixture
def proxy(service: Service) -> Iterator[MongoProxy]:
    with mongo_proxied(service.database_url, f"groups_{new_id()[2:8]}") as started:
        yield started


async def test_a_group_whose_commit_had_no_answer_is_stored_once_and_is_no_replay(proxy: MongoProxy) -> None:
    database = await opened(proxy.url, database_timeout_ms=20_000)
    queue = await queue_on(database, database_timeout_ms=20_000)
    try:
        await queue.hold()
        waiting = [await queue.add(f"{n}", key=f"{n}") for n in range(4)]
        proxy.rule("commitTransaction", concern=TIMED_OUT)
        queue.let_go()
        results = await asyncio.gather(*waiting)
        assert not any(result.replayed for result in results)
        assert await queue.contents() == ["0", "1", "2", "3"]
    finally:
        await queue.store.close()
        await database.close()
