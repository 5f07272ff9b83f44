"""In order, without holes, all or nothing: many writers, two processes, one database."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from pymongo import MongoClient

from service.chat_service import ChatService
from service.database import Database
from service.errors import ConversationNotFound
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, contents, new_id, whole_history

WRITERS, APPENDS = 32, 50


async def test_32_writers_over_two_processes_leave_no_hole_and_a_reader_sees_each_message_once(
    service: Service, second_service: Service
) -> None:
    """Acceptance 3: a third are batches; a reader polls with `after` during the writing."""
    conversation = new_id()
    async with service.async_client() as one, second_service.async_client() as two:
        await one.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}/messages"
        writing = True
        seen: list[Any] = []

        async def write(writer: int) -> None:
            client = (one, two)[writer % 2]
            for turn in range(APPENDS):
                size = 3 if turn % 3 == 0 else 1
                batch = [{"role": "user", "content": f"{writer}/{turn}/{part}"} for part in range(size)]
                await _until_stored(client, path, {"messages": batch}, f"{writer}-{turn}")

        async def read() -> None:
            last = False
            while True:
                last = not writing
                after = seen[-1]["seq"] if seen else 0
                page = (await two.get(path, params={"after": after, "limit": 1000})).json()
                seen.extend(page["data"])
                if last and not page["has_more"]:
                    return

        reader = asyncio.create_task(read())
        await asyncio.gather(*(write(each) for each in range(WRITERS)))
        writing = False
        await reader

    batches = (APPENDS + 2) // 3
    total = WRITERS * (APPENDS - batches + 3 * batches)
    assert [each["seq"] for each in seen] == list(range(1, total + 1))
    assert len({each["content"] for each in seen}) == total
    times = [each["created_at"] for each in seen]
    assert times == sorted(times)
    _assert_batches_stand_together(contents(seen))
    with service.client() as client:
        assert whole_history(client, conversation) == seen
        about = client.get(f"/conversations/{conversation}").json()
        assert (about["last_seq"], about["message_count"]) == (total, total)


def _assert_batches_stand_together(said: list[str]) -> None:
    position = 0
    turns: dict[str, list[int]] = {}
    while position < len(said):
        writer, turn, part = said[position].split("/")
        assert part == "0"
        size = 3 if int(turn) % 3 == 0 else 1
        assert said[position : position + size] == [f"{writer}/{turn}/{part}" for part in range(size)]
        turns.setdefault(writer, []).append(int(turn))
        position += size
    assert all(each == sorted(each) for each in turns.values()), "a writer's own order is kept"


async def _until_stored(client: httpx.AsyncClient, path: str, body: Any, key: str) -> httpx.Response:
    """Repeat while the service is busy, as a client does, with the same key."""
    while True:
        response = await client.post(path, json=body, headers={"Idempotency-Key": key})
        if response.status_code != 503:
            assert response.status_code in {200, 201}, response.text
            return response
        await asyncio.sleep(float(response.headers["retry-after"]) / 10)


async def test_equal_keys_at_once_store_once(service: Service, second_service: Service) -> None:
    async with service.async_client() as one, second_service.async_client() as two:
        for _ in range(10):
            conversation = new_id()
            await one.post("/conversations", json={"user_id": "ada", "id": conversation})
            path = f"/conversations/{conversation}/messages"
            body = {"messages": [{"role": "user", "content": n} for n in "abc"]}
            answers = await asyncio.gather(
                *(_until_stored((one, two)[n % 2], path, body, "k") for n in range(8))
            )
            assert sorted(each.status_code for each in answers) == [200] * 7 + [201]
            assert len({each.text for each in answers}) == 1
            assert contents((await one.get(path)).json()["data"]) == ["a", "b", "c"]


async def test_two_creations_of_one_id_make_one_conversation(
    service: Service, second_service: Service
) -> None:
    async with service.async_client() as one, second_service.async_client() as two:
        for _ in range(10):
            wanted = {"user_id": "ada", "id": new_id()}
            answers = await asyncio.gather(
                *((one, two)[n % 2].post("/conversations", json=wanted) for n in range(6))
            )
            assert sorted(each.status_code for each in answers) == [200] * 5 + [201]
            assert len({each.text for each in answers}) == 1


async def test_an_append_and_a_deletion_leave_no_orphan(service: Service, second_service: Service) -> None:
    conversations = [new_id() for _ in range(25)]
    async with service.async_client() as one, second_service.async_client() as two:
        for conversation in conversations:
            await one.post("/conversations", json={"user_id": "ada", "id": conversation})
            path = f"/conversations/{conversation}"
            message = {"role": "user", "content": "x"}
            answers = await asyncio.gather(
                *(two.post(f"{path}/messages", json=message) for _ in range(3)),
                one.delete(path),
                *(one.post(f"{path}/messages", json=message) for _ in range(3)),
            )
            assert {each.status_code for each in answers} <= {201, 204, 404, 503}
            while (await one.get(path)).status_code == 200:
                await one.delete(path)
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        messages = operator.get_default_database().messages
        assert messages.count_documents({"conversation_id": {"$in": conversations}}) == 0


async def test_no_two_that_pop_get_the_same_message(service: Service, second_service: Service) -> None:
    conversation = new_id()
    async with service.async_client() as one, second_service.async_client() as two:
        await one.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}"
        batch = [{"role": "user", "content": f"{n}"} for n in range(30)]
        await one.post(f"{path}/messages", json={"messages": batch})
        popped: list[str] = []

        async def pop(client: httpx.AsyncClient) -> None:
            while (response := await client.post(f"{path}/pop")).status_code != 204:
                assert response.status_code in {200, 503}, response.text
                if response.status_code == 200:
                    popped.append(response.json()["content"])

        await asyncio.gather(*(pop(client) for client in (one, two) for _ in range(3)))
    assert sorted(popped, key=int) == [f"{n}" for n in range(30)]


async def test_an_append_and_a_cut_off_agree_on_the_count(service: Service, second_service: Service) -> None:
    async with service.async_client() as one, second_service.async_client() as two:
        for _ in range(10):
            conversation = new_id()
            await one.post("/conversations", json={"user_id": "ada", "id": conversation})
            path = f"/conversations/{conversation}/messages"
            await asyncio.gather(*(one.post(path, json={"role": "user", "content": "x"}) for _ in range(5)))
            await asyncio.gather(
                *(two.post(path, json={"role": "user", "content": "y"}) for _ in range(4)),
                *(one.delete(path, params={"after": 2}) for _ in range(2)),
            )
            left = (await one.get(path)).json()["data"]
            about = (await one.get(f"/conversations/{conversation}")).json()
            assert about["message_count"] == len(left)
            assert [each["seq"] for each in left[:2]] == [1, 2]
            assert left[-1]["seq"] <= about["last_seq"]


async def test_a_refused_caller_neither_waits_for_the_owner_nor_keeps_the_owner_waiting(
    service: Service,
) -> None:
    """Whoever waits can tell by the wait that the conversation is there; whoever is waited for does harm."""
    settings = Settings(_env_file=None, mongodb_url=service.database_url)
    database, busy = Database(settings), new_id()
    await database.open()
    store, scope = ConversationStore(database, settings), TenantScope()
    chat, message = ChatService(store, scope), {"role": "user", "content": "x"}
    try:
        await chat.get_or_create_conversation("ada", busy)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: chat.pop_message(busy, "bob"),
            lambda: chat.add_message(busy, message, "bob"),
            lambda: chat.update_conversation(busy, "bob", title="no"),
            lambda: chat.delete_message(busy, "m", "bob"),
            lambda: chat.delete_messages(busy, "bob"),
            lambda: chat.delete_conversation(busy, "bob"),
        ]
        async with store.turn(scope.conversation(busy, "ada")):
            for call in calls:
                with pytest.raises(ConversationNotFound):
                    await call()
        async with store.turn(scope.conversation(busy, "bob")):
            assert len((await chat.add_message(busy, message, "ada")).messages) == 1
    finally:
        await store.close()
        await database.close()


async def test_nobody_can_compute_or_take_the_id_that_anothers_key_stands_for(
    service: Service, second_service: Service
) -> None:
    """The id is the same in every process, and its digest needs more than the user's name and the key."""
    key = new_id("turn")
    async with service.async_client() as one, second_service.async_client() as two:
        sent: dict[str, Any] = {"headers": {"Idempotency-Key": key, "X-User-Id": "ada"}, "json": {}}
        made = (await one.post("/v1/conversations", **sent)).json()["id"]
        assert (await two.post("/v1/conversations", **sent)).json()["id"] == made
        guesses = [f"ada/{key}", f"/ada/{key}", key, f"ada{key}"]
        for guess in guesses:
            digest = hashlib.sha256(guess.encode()).hexdigest()
            assert made != f"conv_{digest[:32]}"
        other = await one.post("/v1/conversations", headers={**sent["headers"], "X-User-Id": "bob"}, json={})
        assert other.json()["id"] != made


async def test_a_key_that_version_0_1_0_took_still_stands_for_its_conversation(service: Service) -> None:
    key = new_id("turn")
    digest = hashlib.sha256(f"ada/{key}".encode()).hexdigest()[:32]
    async with service.async_client() as client:
        made = await client.post("/conversations", json={"user_id": "ada", "id": f"conv_{digest}"})
        assert made.status_code == 201
        sent: dict[str, Any] = {"headers": {"Idempotency-Key": key, "X-User-Id": "ada"}, "json": {}}
        assert (await client.post("/v1/conversations", **sent)).json()["id"] == f"conv_{digest}"
        sent["headers"]["X-User-Id"] = "bob"
        assert (await client.post("/v1/conversations", **sent)).json()["id"] != f"conv_{digest}"
