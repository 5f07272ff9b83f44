"""What a process keeps of the histories that it has read is never older than what is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.chat_service import ChatService, ConversationStore
from service.database import Database
from service.settings import Settings
from service.tenancy import TenantScope
from service.user_data import UserData
from tests.harness import Service, new_id, running

ROUNDS, TALKS = 30, 4


@pytest.fixture(scope="module")
def processes(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    """Two processes on one database, of which one may keep hardly anything."""
    directory = tmp_path_factory.mktemp("second")
    with running(directory, mongodb_url=service.database_url, cache_bytes=40_000) as second:
        yield [service, second]


class Writer:
    """Changes a conversation through any process, and compares what each process then shows."""

    def __init__(self, seed: int, clients: list[httpx.Client], stored: Callable[[str], list[Any]]) -> None:
        self.chance = random.Random(seed)
        self.clients = clients
        self.path = f"/conversations/{new_id()}"
        self.stored = stored
        self.expected: list[Any] = []
        self.create()

    def create(self) -> None:
        body = {"user_id": "kept", "id": self.path.rpartition("/")[2]}
        assert self.chance.choice(self.clients).post("/conversations", json=body).status_code == 201
        self.expected = []

    def change(self) -> None:
        client, chance = self.chance.choice(self.clients), self.chance
        messages = f"{self.path}/messages"
        kind = chance.choices(["append", "replace", "delete", "cut", "list", "again"], [8, 3, 3, 1, 1, 1])[0]
        if kind == "append" or not self.expected:
            new = [
                {"role": "user", "content": f"{chance.random()}"} for _ in range(chance.choice([1, 1, 3, 70]))
            ]
            self.expected += client.post(messages, json={"messages": new}).json()["data"]
        elif kind == "replace":
            place = chance.randrange(len(self.expected))
            named = f"{messages}/{self.expected[place]['id']}"
            answer = client.put(named, json={"role": "user", "content": f"other {chance.random()}"})
            self.expected[place] = answer.json()
        elif kind == "delete":
            place = chance.randrange(len(self.expected))
            assert client.delete(f"{messages}/{self.expected.pop(place)['id']}").status_code == 204
        elif kind == "cut":
            after = chance.choice(self.expected)["seq"]
            assert client.delete(messages, params={"after": after}).status_code == 204
            self.expected = [each for each in self.expected if each["seq"] <= after]
        elif kind == "list":
            kept = [
                {"id": each["id"], "role": "user", "content": each["content"]} for each in self.expected[:3]
            ]
            kept[-1]["content"] = "last"
            assert client.put(messages, json={"messages": kept}).status_code == 200
            self.expected = self.stored(self.path)
        else:
            assert client.delete(self.path).status_code == 204
            self.create()

    def compare(self) -> None:
        for client in self.clients:
            count = self.chance.choice([1, 5, 60])
            shown = client.get(f"{self.path}/messages", params={"limit": 1_000}).json()["data"]
            assert shown == self.expected
            newest = client.get(f"{self.path}/messages", params={"last": count}).json()["data"]
            assert newest == self.expected[-count:]

    def run(self) -> None:
        for _ in range(ROUNDS):
            self.change()
            self.compare()


def test_no_process_shows_what_another_has_changed(processes: list[Service]) -> None:
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=each.url, timeout=60)) for each in processes]

        def stored(path: str) -> list[Any]:
            """Read through a filter of a role, of which nothing is kept."""
            found = clients[0].get(f"{path}/messages", params={"role": "user", "limit": 1_000})
            return list(found.json()["data"])

        writers = [Writer(seed, clients, stored) for seed in range(TALKS)]

        def read_all_the_time(client: httpx.Client, seed: int) -> None:
            chance = random.Random(seed)
            while not stop.is_set():
                asked = chance.choice(["last=20", "limit=30", "limit=200&order=desc"])
                client.get(f"{chance.choice(writers).path}/messages?{asked}")

        with ThreadPoolExecutor(TALKS + 2) as pool:
            readers = [pool.submit(read_all_the_time, each, seed) for seed, each in enumerate(clients)]
            done = [pool.submit(each.run) for each in writers]
            try:
                for each in done:
                    each.result()
            finally:
                stop.set()
            for each in readers:
                each.result()


@contextlib.asynccontextmanager
async def store_on(url: str) -> AsyncIterator[ConversationStore]:
    """What a process of the service has of the database."""
    settings = Settings(mongodb_url=url)
    database = Database(settings)
    await database.open()
    store = ConversationStore(database, settings)
    try:
        yield store
    finally:
        await store.close()
        await database.close()


async def test_nothing_of_an_erased_user_is_kept_by_any_process_a_second_later(service: Service) -> None:
    async with store_on(service.database_url) as one, store_on(service.database_url) as other:
        chats = [ChatService(each, TenantScope()) for each in (one, other)]
        talks = {new_id("erased"): new_id(), new_id("stays"): new_id()}
        for user, name in talks.items():
            # Beanie has one database in a process, that which was opened last: so that one writes.
            await chats[1].get_or_create_conversation(user, name)
            await chats[1].add_message(name, {"role": "user", "content": f"secret of {user}"})

        async def read() -> None:
            for chat in chats:
                for user, name in talks.items():
                    await chat.get_encoded_history(name)
                    (listed,) = (await chat.list_conversations(user)).conversations
                    assert listed.id == name

        await read()
        # The receipts of other tests are seen first; then something is kept again.
        await asyncio.sleep(0.7)
        await read()
        assert [len(each.kept_pages._kept) for each in (one, other)] == [4, 4]
        user, stays = talks
        assert (await UserData(other, TenantScope()).erase(user)).done
        await asyncio.sleep(1.0)
        for store in (one, other):
            assert user not in str(store.kept_pages._kept)
        assert (await chats[1].get_encoded_history(talks[stays])).messages


async def test_an_append_joins_what_is_kept_only_if_nothing_happened_elsewhere_in_between(
    service: Service,
) -> None:
    async with store_on(service.database_url) as store:
        other = ConversationStore(store.database, store.settings)
        chat, elsewhere = (ChatService(each, TenantScope()) for each in (store, other))
        name = new_id()
        await chat.get_or_create_conversation("ada", name)

        async def add(to: ChatService, content: str) -> str:
            (stored,) = (await to.add_message(name, {"role": "user", "content": content})).messages
            return str(stored["id"])

        async def shown() -> list[str]:
            return [json.loads(each)["content"] for each in (await chat.get_encoded_history(name)).messages]

        first = await add(chat, "a")
        assert await shown() == ["a"]
        await add(elsewhere, "b")
        await add(chat, "c")
        assert await shown() == ["a", "b", "c"]
        await elsewhere.delete_message(name, first)
        await add(chat, "d")
        assert await shown() == ["b", "c", "d"]
        await other.close()


def test_without_a_cache_nothing_is_kept(service: Service, tmp_path: Path) -> None:
    with running(tmp_path, mongodb_url=service.database_url, cache_bytes=0) as bare:
        pages = [
            httpx.get(f"{each.url}/conversations", params={"user_id": "kept"}) for each in (service, bare)
        ]
        assert pages[0].json() == pages[1].json()
        name = new_id()
        body = {"user_id": "bare", "id": name}
        assert httpx.post(f"{bare.url}/conversations", json=body).status_code == 201
        for n in range(3):
            httpx.post(f"{bare.url}/conversations/{name}/messages", json={"role": "user", "content": f"{n}"})
            found = httpx.get(f"{bare.url}/conversations/{name}/messages").json()["data"]
            assert [each["content"] for each in found] == [f"{each}" for each in range(n + 1)]
