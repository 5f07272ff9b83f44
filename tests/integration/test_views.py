"""Which point in time a read outside of a transaction sees, in the words that are sent to the server.

The times are those that the engine itself answers. That MongoDB waits for such a time, or reads at it, is
from its documentation (causal consistency; read concern "snapshot").
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from chat_history_client import ChatHistoryClient
from service.chat_service import ChatService
from service.database import Database
from service.errors import DatabaseUnavailable
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, create, new_id, running
from tests.mongo_proxy import MongoProxy, mongo_proxied

Read = Callable[[ChatService], Any]
MESSAGE = {"role": "user", "content": "x"}
SINCE = datetime(2026, 1, 1, tzinfo=UTC)


async def streamed(chat: ChatService) -> None:
    assert sum([len(part) async for part in chat.stream_chat_history("c")]) == 6


# Reads of a conversation together with its messages, and how many commands each of them is.
TOGETHER: dict[str, tuple[Read, int]] = {
    "page": (lambda chat: chat.get_chat_history("c"), 2),
    "last": (lambda chat: chat.get_chat_history("c", last=2), 2),
    "time": (lambda chat: chat.get_chat_history("c", since=SINCE), 4),
    "message": (lambda chat: chat.get_message("c", "m3"), 2),
    "stream": (streamed, 3),
}
ALONE: dict[str, tuple[Read, int]] = {
    "conversation": (lambda chat: chat.get_conversation("c"), 1),
    "list": (lambda chat: chat.list_conversations("ada"), 1),
}


@asynccontextmanager
async def opened(service: Service, **options: Any) -> AsyncIterator[tuple[MongoProxy, ChatService]]:
    """The service module on a proxy, with a conversation of six messages."""
    with mongo_proxied(service.database_url, new_id("views"), **options) as proxy:
        settings = Settings(_env_file=None, mongodb_url=proxy.url, database_timeout_ms=20_000)
        database = Database(settings)
        await database.open()
        try:
            chat = ChatService(ConversationStore(database, settings), TenantScope())
            await chat.get_or_create_conversation("ada", "c")
            await chat.add_messages("c", [MESSAGE | {"id": f"m{n}"} for n in range(6)])
            yield proxy, chat
        finally:
            await database.close()


def sent(proxy: MongoProxy) -> list[str]:
    """The names of all commands but those with which the driver watches the server."""
    return [each.name for each in proxy.seen if each.name.lower() not in {"hello", "ismaster"}]


async def test_a_read_is_not_older_than_the_commits_that_this_process_was_told_of(service: Service) -> None:
    async with opened(service) as (proxy, chat):
        for name, (read, commands) in (TOGETHER | ALONE).items():
            await chat.update_conversation("c", title=name)
            (commit,) = [each for each in proxy.seen if each.name == "commitTransaction"][-1:]
            assert commit.answer is not None
            proxy.forget()
            await read(chat)
            # No command more than without a session.
            assert sent(proxy) == ["find"] * commands, name
            expected = {"level": "majority", "afterClusterTime": commit.answer["operationTime"]}
            assert [each["readConcern"] for each in proxy.commands("find")] == [expected] * commands, name


@pytest.fixture(scope="module", params=[False, True], ids=["replica-set", "cluster"])
def two_services(
    service: Service, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[MongoProxy, Service, Service]]:
    """Two processes of the service, each of which is told of its own commits only."""
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(
            mongo_proxied(service.database_url, new_id("views"), sharded=request.param)
        )
        first, second = (
            stack.enter_context(running(tmp_path_factory.mktemp("token"), mongodb_url=proxy.url))
            for _ in range(2)
        )
        yield proxy, first, second


def committed(proxy: MongoProxy) -> Any:
    """The time of the latest commit, as the server answered it."""
    commits = [each.answer for each in proxy.seen if each.name == "commitTransaction" and each.answer]
    return commits[-1]["operationTime"]


def test_a_token_lets_another_process_read_what_was_written(
    two_services: tuple[MongoProxy, Service, Service],
) -> None:
    proxy, first, second = two_services
    with first.client() as writer, second.client() as reader:
        conversation = create(writer, new_id())
        path = f"/conversations/{conversation}"
        writes: dict[str, httpx.Response] = {
            "append": writer.post(f"{path}/messages", json=MESSAGE),
            "rename": writer.patch(path, json={"title": "t"}),
            "pop": writer.post(f"{path}/pop"),
        }
        token, time = writes["pop"].headers["Consistency-Token"], committed(proxy)
        assert len({each.headers["Consistency-Token"] for each in writes.values()}) == len(writes)
        for read in (
            path,
            f"{path}/messages",
            "/conversations?user_id=ada",
            f"/v1{path}",
            "/users/ada/export",
        ):
            for headers in ({}, {"Consistency-Token": token}):
                proxy.forget()
                answer = reader.get(read, headers=headers)
                assert answer.status_code == 200, read
                assert "Consistency-Token" not in answer.headers
                finds = proxy.commands("find")
                times = [each["readConcern"].get("afterClusterTime") for each in finds]
                assert all(each is None or (each >= time) is bool(headers) for each in times), read
                # A snapshot is not before the cluster time that the server is told.
                assert not headers or all(each["$clusterTime"]["clusterTime"] >= time for each in finds)


def test_a_token_that_no_process_made_is_refused(two_services: tuple[MongoProxy, Service, Service]) -> None:
    _, first, second = two_services
    with first.client() as writer, second.client() as reader:
        conversation = create(writer, new_id())
        answer = writer.post(f"/conversations/{conversation}/messages", json=MESSAGE)
        token = answer.headers["Consistency-Token"]
        text, _, mac = token.rpartition(".")
        later = f"{int(text[:8], 16) + 1:08x}{text[8:]}"
        for forged in ("", "x", "..", "é", f"{later}.{mac}", f"{text}.{mac[:-1]}", text, token + "0"):
            sent_token = httpx.Headers([(b"Consistency-Token", forged.encode())])
            answer = reader.get(f"/conversations/{conversation}", headers=sent_token)
            assert answer.status_code == 422, forged
            assert answer.json()["errors"][0]["path"] == "header.Consistency-Token"


def test_a_client_reads_its_own_writes_from_another_process(
    two_services: tuple[MongoProxy, Service, Service],
) -> None:
    proxy, first, second = two_services
    with ChatHistoryClient(first.url) as client:
        conversation = client.get_or_create_conversation("ada", new_id())["id"]
        client.add_message(conversation, MESSAGE)
        time = committed(proxy)
        # As a load balancer does.
        client._http().base_url = second.url
        for read in (
            lambda: client.get_chat_history(conversation),
            lambda: list(client.stream_chat_history(conversation)),
        ):
            proxy.forget()
            read()
            assert all(each["$clusterTime"]["clusterTime"] >= time for each in proxy.commands("find"))


def test_on_the_embedded_engine_no_token_is_needed(client: httpx.Client, conversation: str) -> None:
    answer = client.post(f"/conversations/{conversation}/messages", json=MESSAGE)
    assert "Consistency-Token" not in answer.headers
    # A client that used MongoDB before may still have one.
    assert client.get(f"/conversations/{conversation}", headers={"Consistency-Token": "x"}).status_code == 200


async def test_on_a_cluster_the_reads_of_one_call_see_one_point_in_time(service: Service) -> None:
    async with opened(service, sharded=True) as (proxy, chat):
        for name, (read, commands) in TOGETHER.items():
            proxy.forget()
            await read(chat)
            assert sent(proxy) == ["find"] * commands, name
            first, *rest = [each for each in proxy.seen if each.name == "find"]
            assert first.document["readConcern"] == {"level": "snapshot"}, name
            assert first.answer is not None
            time = first.answer["cursor"]["atClusterTime"]
            concerns = [each.document["readConcern"] for each in rest]
            # Each part of a stream has a later view, which has all messages that the first view counted.
            expected = {"level": "snapshot"} | ({} if name == "stream" else {"atClusterTime": time})
            assert concerns == [expected] * len(concerns), name
            assert not any(each.in_transaction for each in proxy.seen)
        for name, (read, commands) in ALONE.items():
            proxy.forget()
            await read(chat)
            assert sent(proxy) == ["find"] * commands, name
            (find,) = proxy.commands("find")
            assert find["readConcern"].keys() == {"level", "afterClusterTime"}, name


async def test_on_a_cluster_a_write_reads_in_its_own_transaction(service: Service) -> None:
    async with opened(service, sharded=True) as (proxy, chat):
        proxy.forget()
        await chat.add_messages("c", [MESSAGE | {"id": f"m{n}"} for n in range(6)])  # a replay
        assert proxy.commands("find")
        assert all(each.in_transaction for each in proxy.seen if each.name == "find")


async def test_a_view_that_failed_leaves_the_next_one_alone(service: Service) -> None:
    async with opened(service, sharded=True) as (proxy, chat):
        proxy.fail("find", 239, "SnapshotTooOld")
        with pytest.raises(DatabaseUnavailable):
            await chat.get_chat_history("c")
        proxy.forget()
        assert len((await chat.get_chat_history("c")).messages) == 6
        assert proxy.commands("find")[0]["readConcern"] == {"level": "snapshot"}


@pytest.mark.embedded_engine("it is the engine's own way to read")
async def test_on_the_embedded_engine_reads_stay_as_they_are(service: Service) -> None:
    async with opened(service, hide_engine=False) as (proxy, chat):
        proxy.forget()
        await chat.get_chat_history("c")
        assert [each["readConcern"] for each in proxy.commands("find")] == [{"level": "majority"}] * 2
