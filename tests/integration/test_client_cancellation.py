"""What a cancelled call leaves behind: a write is settled before the cancellation goes on, and never lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from agents import Agent, RunConfig, Runner, SQLiteSession, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from langchain_core.messages import HumanMessage
from pydantic_ai.messages import ModelRequest, UserPromptPart

from chat_history_client import AsyncChatHistoryClient, ChatHistoryClient
from chat_history_client.langchain import ChatHistoryMessages
from chat_history_client.openai_agents import ChatHistorySession
from chat_history_client.pydantic_ai import ChatHistoryStore
from tests.harness import Service, new_id
from tests.proxy import Proxy, proxied

Write = Callable[[AsyncChatHistoryClient, str], Awaitable[Any]]


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    with proxied(service.port) as started:
        yield started


@pytest.fixture
async def slow(proxy: Proxy) -> AsyncIterator[AsyncChatHistoryClient]:
    """A client whose requests the test's proxy can hold."""
    async with AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}") as client:
        yield client


def says(text: str) -> Any:
    return {"role": "user", "content": text}


# -- a run of the Agents SDK ---------------------------------------------------------------------------


@function_tool
def book(place: str) -> str:
    return f"booked: {place}"


async def types_after_a_run_cancelled_at_its_tools_output(session: Any) -> list[str]:
    model = ScriptedModel(
        [
            [function_call("book", {"place": "Emden"}, call_id="call_1", item_id="fc_1")],
            [assistant_message("Booked.", item_id="msg_1")],
        ]
    )
    agent = Agent(name="booking", model=model, tools=[book])
    config = RunConfig(tracing_disabled=True)
    result = Runner.run_streamed(agent, "Book Emden.", session=session, run_config=config)
    async for event in result.stream_events():
        if event.type == "run_item_stream_event" and event.name == "tool_output":
            result.cancel()
    items: Any = await session.get_items()
    return [item.get("type", "message") for item in items]


async def test_a_run_cancelled_when_a_tools_output_arrives_keeps_what_the_tool_did(
    history: AsyncChatHistoryClient,
) -> None:
    expected = ["message", "function_call", "function_call_output"]
    for _ in range(20):
        sqlite = SQLiteSession(new_id())
        assert await types_after_a_run_cancelled_at_its_tools_output(sqlite) == expected
        sqlite.close()
        session = ChatHistorySession(new_id(), history)
        assert await types_after_a_run_cancelled_at_its_tools_output(session) == expected


# -- every write, by every hand --------------------------------------------------------------------------


async def append(client: AsyncChatHistoryClient, conversation: str) -> Any:
    return await client.add_messages(conversation, [says("written")])


async def add_items(client: AsyncChatHistoryClient, conversation: str) -> None:
    await ChatHistorySession(conversation, client).add_items([says("written")])


async def aadd_messages(client: AsyncChatHistoryClient, conversation: str) -> None:
    await ChatHistoryMessages(conversation, async_client=client).aadd_messages([HumanMessage("written")])


async def save(client: AsyncChatHistoryClient, conversation: str) -> None:
    await ChatHistoryStore(client).save(conversation, [ModelRequest([UserPromptPart("written")])])


async def clear(client: AsyncChatHistoryClient, conversation: str) -> None:
    await ChatHistorySession(conversation, client).clear_session()


async def rename(client: AsyncChatHistoryClient, conversation: str) -> None:
    await client.update_conversation(conversation, title="written")


WRITES = [append, add_items, aadd_messages, save, clear, rename]


def is_done(url: str, write: Write, conversation: str) -> bool:
    with ChatHistoryClient(url) as history:
        if write is rename:
            return bool(history.get_conversation(conversation)["title"] == "written")
        messages = list(history.stream_chat_history(conversation))
        return len(messages) == (0 if write is clear else 2)


@pytest.fixture
def conversation(service: Service) -> str:
    with ChatHistoryClient(service.url) as history:
        made = str(history.get_or_create_conversation("default")["id"])
        history.add_messages(made, [says("first")])
    return made


@pytest.mark.parametrize("write", WRITES)
async def test_a_cancelled_write_is_settled_before_the_cancellation_goes_on(
    service: Service, slow: AsyncChatHistoryClient, proxy: Proxy, conversation: str, write: Write
) -> None:
    await slow.get_conversation(conversation)
    proxy.hold()
    task = asyncio.ensure_future(write(slow, conversation))
    await asyncio.sleep(0.1)
    for _ in range(3):  # a second cancellation, and a third, do not lose it either
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
    proxy.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_done(service.url, write, conversation)


@pytest.mark.parametrize("write", [add_items, aadd_messages, save])
async def test_a_cancelled_first_write_makes_the_conversation_and_stores_all_batches(
    service: Service,
    slow: AsyncChatHistoryClient,
    proxy: Proxy,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chat_history_client._appending.BATCH_ITEMS", 1)
    conversation = new_id()
    proxy.hold()
    task = asyncio.ensure_future(write(slow, conversation))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.sleep(0)
    proxy.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    with ChatHistoryClient(service.url) as history:
        assert len(list(history.stream_chat_history(conversation))) == 1


async def test_a_write_cancelled_at_any_moment_is_stored_and_stays_as_it_is(
    history: AsyncChatHistoryClient,
) -> None:
    conversation = (await history.get_or_create_conversation("ada"))["id"]
    for trial in range(40):
        task = asyncio.ensure_future(history.add_messages(conversation, [says(f"{trial}")]))
        await asyncio.sleep(random.random() * 0.012)
        task.cancel()
        await asyncio.wait({task})
        newest = await history.last_messages(conversation, 1)
        assert newest
        assert newest[0]["content"] == f"{trial}"


async def by_wait_for(work: Awaitable[Any]) -> None:
    await asyncio.wait_for(work, 0.1)


async def by_timeout(work: Awaitable[Any]) -> None:
    async with asyncio.timeout(0.1):
        await work


async def by_nested_timeouts(work: Awaitable[Any]) -> None:
    async with asyncio.timeout(0.15):
        async with asyncio.timeout(0.1):
            await work
        await asyncio.sleep(10)


async def by_a_task_group(work: Awaitable[Any]) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.1)
        raise TimeoutError

    async def wait() -> None:
        await work

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait())
            group.create_task(fail())
    except ExceptionGroup as several:
        (error,) = several.exceptions
        raise error from None


async def by_anyio(work: Awaitable[Any]) -> None:
    with anyio.fail_after(0.1):
        await work


ENDINGS = [by_wait_for, by_timeout, by_nested_timeouts, by_a_task_group, by_anyio]


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("write", [append, add_items])
async def test_whatever_cancels_a_write_finds_it_settled(  # noqa: PLR0917
    service: Service, slow: AsyncChatHistoryClient, proxy: Proxy, conversation: str, write: Write, end: Any
) -> None:
    await slow.get_conversation(conversation)
    proxy.hold()
    asyncio.get_running_loop().call_later(0.4, proxy.release)
    with pytest.raises(TimeoutError):
        await end(write(slow, conversation))
    assert is_done(service.url, write, conversation)
    await asyncio.sleep(0)  # and no cancellation is left over


async def test_a_cancellation_by_anyio_does_not_keep_the_event_loop_busy(
    slow: AsyncChatHistoryClient, proxy: Proxy, conversation: str
) -> None:
    await slow.get_conversation(conversation)
    loop = asyncio.get_running_loop()
    proxy.hold()
    loop.call_later(0.5, proxy.release)
    wakes = 0
    original = loop._run_once  # type: ignore[attr-defined]

    def counted() -> None:
        nonlocal wakes
        wakes += 1
        original()

    loop._run_once = counted  # type: ignore[attr-defined]
    with anyio.move_on_after(0.05) as scope:
        await append(slow, conversation)
    loop._run_once = original  # type: ignore[attr-defined]
    assert scope.cancelled_caught
    assert wakes < 100


@pytest.mark.parametrize("write", [append, add_items, aadd_messages, save])
def test_the_end_of_an_event_loop_waits_for_what_is_being_written(
    service: Service, proxy: Proxy, conversation: str, write: Write
) -> None:
    """`asyncio.run` cancels every task, and so the write's own, too."""
    client = AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}")

    async def leave_it_behind() -> None:
        await client.get_conversation(conversation)
        proxy.hold()
        leave_it_behind.task = asyncio.ensure_future(write(client, conversation))  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().call_later(0.3, proxy.release)

    asyncio.run(leave_it_behind())
    assert is_done(service.url, write, conversation)
    assert not client._open


@pytest.mark.parametrize("write", [append, add_items])
async def test_waiting_for_a_cancelled_write_is_bounded(
    proxy: Proxy, conversation: str, write: Write
) -> None:
    url = f"http://127.0.0.1:{proxy.port}"
    async with AsyncChatHistoryClient(url, retry_s=0.3, timeout_s=0.3) as client:
        proxy.hold()
        for _ in range(2):
            task = asyncio.ensure_future(write(client, conversation))
            await asyncio.sleep(0.1)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=30)
            assert done
            assert task.cancelled()
        proxy.release()


async def test_a_cancelled_read_is_cancelled_at_once(
    slow: AsyncChatHistoryClient, proxy: Proxy, conversation: str
) -> None:
    proxy.hold()
    task = asyncio.ensure_future(slow.get_conversation(conversation))
    await asyncio.sleep(0.1)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=10)
    assert done
    assert task.cancelled()
    proxy.release()


# -- pop -----------------------------------------------------------------------------------------------


async def test_an_item_that_a_cancelled_pop_took_is_put_back(history: AsyncChatHistoryClient) -> None:
    session = ChatHistorySession(new_id(), history)
    items: list[Any] = [says(f"{n}") for n in range(40)]
    await session.add_items(items)
    received: list[Any] = []
    for _ in range(40):
        task = asyncio.ensure_future(session.pop_item())
        await asyncio.sleep(random.random() * 0.012)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            received.append(task.result())
        left = await session.get_items()
        assert left + received[::-1] == items


@pytest.mark.parametrize("pop", ["pop_message", "pop_item"])
async def test_a_message_put_back_is_the_same_message(
    service: Service, slow: AsyncChatHistoryClient, proxy: Proxy, pop: str
) -> None:
    conversation = (await slow.get_or_create_conversation("ada"))["id"]
    stored = await slow.add_messages(
        conversation, [says("a"), {**says("b"), "tool_calls": [1, 2], "x": {"a.b": None}}]
    )
    proxy.hold()
    task = asyncio.ensure_future(getattr(slow, pop)(conversation))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.sleep(0.05)
    proxy.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    moved = {"seq", "created_at"}
    with ChatHistoryClient(service.url) as history:
        found = list(history.stream_chat_history(conversation))
    assert [{k: v for k, v in each.items() if k not in moved} for each in found] == [
        {k: v for k, v in each.items() if k not in moved} for each in stored
    ]
    assert [each["seq"] for each in found] == [1, 3]
