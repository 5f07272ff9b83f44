"""The client's `tail`: what it has yielded is the history, whatever happens to anybody meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from chat_history_client import (
    ApiError,
    AsyncChatHistoryClient,
    ChatHistoryClient,
    HistoryEvent,
    ListEvent,
    NotFound,
    Unavailable,
)
from tests.harness import Service, append, contents, create, free_port, new_id, running
from tests.live import Reader
from tests.proxy import Proxy, proxied

KINDS = ["synchronous", "asynchronous"]


def message(text: str = "x", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def path(conversation: str, *steps: str) -> str:
    return "/".join((f"/conversations/{conversation}/messages", *steps))


class Tailing(Reader):
    """Follows a conversation with a client's `tail`, in a thread, from its beginning to its end."""

    def __init__(self, kind: str, conversation: str, url: str, **options: Any) -> None:
        super().__init__(conversation)
        self.failure: Exception | None = None
        self._kind, self._conversation, self._url, self._options = kind, conversation, url, options

    def _run(self) -> None:
        try:
            if self._kind == "synchronous":
                with ChatHistoryClient(self._url, **self._options) as client:
                    for event in client.tail(self._conversation, after=0):
                        self._apply(dict(event))
            else:
                asyncio.run(self._run_asynchronously())
        except Exception as error:  # noqa: BLE001  (told to the test's own thread)
            self.failure = error

    async def _run_asynchronously(self) -> None:
        async with AsyncChatHistoryClient(self._url, **self._options) as client:
            async for event in client.tail(self._conversation, after=0):
                self._apply(dict(event))

    def ends(self, timeout_s: float = 20) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def tailing(kind: str, conversation: str, url: str, **options: Any) -> Iterator[Tailing]:
    """Follow a conversation, which the test deletes at its end, so that the follower ends, too."""
    tail = Tailing(kind, conversation, url, **options)
    tail.start()
    yield tail
    tail.ends()
    assert (tail.failure, tail.gone, tail.told[-1]) == (None, True, {"event": "gone", "data": {}})
    heads = [event for event in tail.told if event["event"] == "head"]
    assert len(heads) == 1


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    with proxied(service.port) as started:
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_has_the_history_although_its_connection_is_lost_again_and_again(
    client: httpx.Client, conversation: str, proxy: Proxy, kind: str
) -> None:
    append(client, conversation, *[message(f"{n}", id=f"m{n}") for n in range(300)])
    with tailing(kind, conversation, f"http://127.0.0.1:{proxy.port}") as tail:
        tail.comes_to(client, conversation)
        for turn in range(4):
            proxy.down()
            client.delete(path(conversation, f"m{turn * 10}"))
            client.put(path(conversation, f"m{turn * 10 + 1}"), json=message("changed"))
            append(client, conversation, *[message(f"while away {n}") for n in range(20)])
            proxy.up()
            tail.comes_to(client, conversation)
            append(client, conversation, message("while there"))
            client.post(f"/conversations/{conversation}/pop")
            tail.comes_to(client, conversation)
        assert tail.delivered[:300] == list(range(1, 301))
        assert len(tail.delivered) == len(set(tail.delivered)) >= 380
        assert proxy.accepted > 4
        client.delete(f"/conversations/{conversation}")


@pytest.mark.parametrize(("kind", "end"), [("synchronous", "stop"), ("asynchronous", "kill")])
def test_a_tail_goes_on_when_the_service_was_ended_and_started_again(
    tmp_path: Path, kind: str, end: str
) -> None:
    with running(tmp_path) as service, service.client() as client:
        conversation = create(client)
        append(client, conversation, *[message(f"{n}", id=f"m{n}") for n in range(30)])
        with tailing(kind, conversation, service.url) as tail:
            tail.comes_to(client, conversation)
            getattr(service, end)()
            service.engine_is_gone()
            service.start()
            client.delete(path(conversation), params={"after": 20})
            client.put(path(conversation, "m3"), json=message("changed"))
            append(client, conversation, *[message("after")] * 5)
            tail.comes_to(client, conversation)
            assert tail.delivered == list(range(1, 36))
            client.delete(f"/conversations/{conversation}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_ends_when_the_conversation_was_deleted_while_it_was_away(
    client: httpx.Client, conversation: str, proxy: Proxy, kind: str
) -> None:
    append(client, conversation, message())
    with tailing(kind, conversation, f"http://127.0.0.1:{proxy.port}") as tail:
        tail.until(lambda: tail.told[-1:] != [] and tail.told[-1]["event"] == "head")
        proxy.down()
        client.delete(f"/conversations/{conversation}")
        proxy.up()


def test_a_tail_that_comes_back_to_another_conversation_under_the_id_goes_on_with_that_one(
    client: httpx.Client, conversation: str, proxy: Proxy
) -> None:
    append(client, conversation, *[message("old")] * 5)
    with tailing("synchronous", conversation, f"http://127.0.0.1:{proxy.port}") as tail:
        tail.comes_to(client, conversation)
        proxy.down()
        client.delete(f"/conversations/{conversation}")
        create(client, conversation)
        stored = append(client, conversation, message("new"), message("new"))
        proxy.up()
        tail.until(lambda: tail.history == stored)
        proxy.down()
        (last,) = append(client, conversation, message("newest"))
        proxy.up()
        tail.until(lambda: tail.history == [*stored, last])
        client.delete(f"/conversations/{conversation}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_has_the_history_while_many_write_and_connections_are_cut_at_random(
    client: httpx.Client, conversation: str, proxy: Proxy, kind: str
) -> None:
    random = Random(kind)
    ended = threading.Event()

    def write(writer: int) -> None:
        chosen = Random(writer)
        for turn in range(40):
            stored = append(client, conversation, *[message(f"{writer}/{turn}")] * chosen.randint(1, 3))
            if chosen.random() < 0.2:
                client.put(path(conversation, stored[0]["id"]), json=message("changed"))
            if chosen.random() < 0.2:
                client.delete(path(conversation, stored[-1]["id"]))
            if chosen.random() < 0.05:
                client.post(f"/conversations/{conversation}/pop")

    def cut() -> None:
        while not ended.wait(random.uniform(0.05, 0.4)):
            proxy.down()
            proxy.up()

    append(client, conversation, message("first"))
    with tailing(kind, conversation, f"http://127.0.0.1:{proxy.port}") as tail:
        with ThreadPoolExecutor(5) as pool:
            cutting = pool.submit(cut)
            try:
                list(pool.map(write, range(4)))
            finally:
                ended.set()
            cutting.result()
        tail.comes_to(client, conversation)
        assert proxy.accepted > 3
        client.delete(f"/conversations/{conversation}")


def test_a_tail_begins_at_the_end_or_after_a_seq_and_is_found_where_there_is_a_conversation(
    client: httpx.Client, conversation: str, sync_history: ChatHistoryClient
) -> None:
    stored = append(client, conversation, message("a"), message("b"))
    with closing(sync_history.tail(conversation)) as tail:
        assert next(tail) == {"event": "head", "data": {"last_seq": 2}, "id": 2}
        (third,) = append(client, conversation, message("c"))
        last = next(tail)
        assert last == {"event": "message", "data": third, "id": 3}
    append(client, conversation, message("d"))
    assert last["event"] == "message"
    with closing(sync_history.tail(conversation, after=last["id"], user_id="ada")) as tail:
        assert contents([text_of(next(tail))]) == ["d"]
    with closing(sync_history.tail(conversation, after=1)) as tail:
        assert text_of(next(tail)) == stored[1]
    for there, user in ((new_id(), None), (conversation, "another")):
        with pytest.raises(NotFound):
            next(sync_history.tail(there, after=0, user_id=user))


def text_of(event: HistoryEvent) -> Any:
    assert event["event"] in {"message", "updated"}
    return event["data"]


async def test_a_silent_tail_outlasts_the_timeout_of_a_call_and_is_cancelled_at_once(
    client: httpx.Client, conversation: str, service: Service
) -> None:
    connections: list[httpx.Request] = []

    class Counting(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            connections.append(request)
            return await super().handle_async_request(request)

    async with (
        AsyncChatHistoryClient(service.url, timeout_s=0.5, transport=Counting()) as history,
        aclosing(history.tail(conversation)) as tail,
    ):
        assert (await anext(tail))["event"] == "head"
        coming = asyncio.create_task(anext(tail))
        await asyncio.sleep(1.5)
        await asyncio.to_thread(append, client, conversation, message("late"))
        assert text_of(await coming)["content"] == "late"
        assert len(connections) == 1
        waiting = asyncio.create_task(anext(tail))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert time.monotonic() - began < 0.5


# -- what a service cannot be asked for ------------------------------------------------------------------

HEAD = 'id: 5\nevent: head\ndata: {"last_seq":5}\n\n'
SSE = {"content-type": "text/event-stream"}


def stream(text: str) -> httpx.Response:
    return httpx.Response(200, headers=SSE, content=text.encode())


def answering(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    left, sent = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return httpx.MockTransport(answer), sent


def test_a_tail_waits_out_503s_and_streams_that_end_and_asks_for_what_follows() -> None:
    cut = 'retry: 1000\nid: 4\nevent: message\ndata: {"seq":4}\n\nid: 5\nevent: message\ndata: {"s'
    unavailable = httpx.Response(503, headers={"Retry-After": "0"}, json={"type": "x"})
    rest = 'id: 5\nevent: message\ndata: {"seq":5}\n\n' + HEAD + "event: gone\ndata: {}\n\n"
    transport, sent = answering(
        unavailable, stream(cut), unavailable, stream(":\n"), httpx.ReadError("cut"), stream(rest)
    )
    with ChatHistoryClient("http://x", transport=transport) as history:
        told = list(history.tail("c", after=3))
    assert [(event["event"], event["data"]) for event in told] == [
        ("message", {"seq": 4}),
        ("message", {"seq": 5}),
        ("head", {"last_seq": 5}),
        ("gone", {}),
    ]
    assert [each.headers.get("last-event-id") for each in sent] == [None, None, "4", "4", "4", "4"]
    assert {each.url.query for each in sent} == {b"after=3"}


def test_a_tail_goes_on_after_the_position_that_a_later_head_tells_which_may_be_an_earlier_one() -> None:
    again = 'event: deleted\ndata: {"after":2,"upto":5}\n\nid: 2\nevent: head\ndata: {"last_seq":2}\n\n'
    transport, sent = answering(stream(HEAD), stream(again), stream("event: gone\ndata: {}\n\n"))
    with ChatHistoryClient("http://x", transport=transport) as history:
        assert [event["event"] for event in history.tail("c")] == ["head", "deleted", "gone"]
    assert [each.headers.get("last-event-id") for each in sent] == [None, "5", "2"]


def test_a_tail_gives_up_when_nothing_was_heard_for_as_long_as_a_call_is_repeated() -> None:
    for failure, kind in ((httpx.Response(503), Unavailable), (httpx.ReadError("x"), httpx.ReadError)):
        transport, sent = answering(stream(HEAD), failure)
        with ChatHistoryClient("http://x", transport=transport, retry_s=1) as history:
            tail = history.tail("c")
            next(tail)
            began = time.monotonic()
            with pytest.raises(kind):
                next(tail)
            assert 0.5 < time.monotonic() - began < 5
            assert len(sent) > 3
    with ChatHistoryClient(f"http://127.0.0.1:{free_port()}", retry_s=0.3) as history:
        tail = history.tail("c")
        with pytest.raises(httpx.ConnectError):
            next(tail)


def test_a_tail_goes_on_longer_than_that_while_it_hears_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chat_history_client._retries._JITTER", lambda _: 0.2)
    gone = stream("event: gone\ndata: {}\n\n")
    turns: list[httpx.Response | Exception] = [stream(HEAD), httpx.ReadError("cut")]
    transport, sent = answering(*turns * 3, gone)
    with ChatHistoryClient("http://x", transport=transport, retry_s=0.9) as history:
        assert [event["event"] for event in history.tail("c")] == ["head", "gone"]
    assert len(sent) == 7


def test_a_tail_whose_credential_has_ended_or_that_is_answered_by_another_server_is_an_error() -> None:
    transport, sent = answering(stream(HEAD), httpx.Response(401, json={"type": "x"}))
    with ChatHistoryClient("http://x", transport=transport) as history:
        tail = history.tail("c")
        next(tail)
        with pytest.raises(ApiError) as refused:
            next(tail)
        assert (refused.value.status, len(sent)) == (401, 2)
    transport, sent = answering(httpx.Response(200, text="<html></html>"))
    with ChatHistoryClient("http://x", transport=transport) as history:
        tail = history.tail("c")
        with pytest.raises(ApiError, match="no stream of events"):
            next(tail)
    assert len(sent) == 1


# -- a list ----------------------------------------------------------------------------------------------


async def news(tail: AsyncGenerator[ListEvent, None]) -> Any:
    """The next event that is no head; a head comes whenever the service may have missed something."""
    while True:
        event = await anext(tail)
        if event["event"] != "head":
            return event


async def test_a_list_is_followed_and_told_to_be_read_again_after_a_lost_connection(
    proxy: Proxy, history: AsyncChatHistoryClient
) -> None:
    user, conversation = new_id("user"), new_id()
    async with (
        AsyncChatHistoryClient(f"http://127.0.0.1:{proxy.port}") as follower,
        aclosing(follower.tail_conversations(user)) as tail,
    ):
        assert await anext(tail) == {"event": "head", "data": {}}
        made = await history.get_or_create_conversation(user, conversation)
        assert await news(tail) == {"event": "created", "data": made}
        await history.add_message(conversation, message())
        changed = await news(tail)
        assert (changed["event"], changed["data"]["message_count"]) == ("changed", 1)
        await asyncio.to_thread(proxy.down)
        proxy.up()
        assert await anext(tail) == {"event": "head", "data": {}}
        await history.delete_conversation(conversation)
        assert await news(tail) == {"event": "deleted", "data": {"id": conversation}}


def test_the_synchronous_client_follows_a_list(client: httpx.Client, sync_history: ChatHistoryClient) -> None:
    user = new_id("user")
    with closing(sync_history.tail_conversations(user)) as tail:
        assert next(tail)["event"] == "head"
        conversation = create(client, new_id(), user=user)
        created = next(event for event in tail if event["event"] == "created")
        assert created["data"]["id"] == conversation
