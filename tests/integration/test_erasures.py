"""The erasure of a very large user: answered before its end, finished by whoever lives, counted once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from service.database import Database
from service.errors import ErasureNotFound
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import OwnerKey
from service.user_data import erasure
from service.user_data.erasure import ErasureState, RemovedCounts
from tests.harness import Service, new_id
from tests.mongo_proxy import MongoProxy, mongo_proxied

NOW = datetime.now(UTC)
SIZE = 150


@pytest.fixture
def proxy(service: Service) -> Iterator[MongoProxy]:
    with mongo_proxied(service.database_url, new_id("erasures"), hide_engine=False) as started:
        yield started
        started.forget()


@contextlib.asynccontextmanager
async def processes(proxy: MongoProxy) -> AsyncIterator[tuple[ConversationStore, ConversationStore]]:
    """What two processes of the service have: each has its own work. They share a connection (see Beanie)."""
    settings = Settings(_env_file=None, mongodb_url=proxy.url)
    database = Database(settings)
    await database.open(indexes="build")
    stores = ConversationStore(database, settings), ConversationStore(database, settings)
    try:
        yield stores
    finally:
        for each in stores:
            await each.close()
        await database.close()


def fill(proxy: MongoProxy, user: str, size: int = SIZE) -> RemovedCounts:
    """Store conversations with one message each, as the service would have stored them."""
    about: dict[str, Any] = {"user_id": user, "created_at": NOW}
    counts = {"last_seq": 1, "message_count": 1, "metadata": {}, "updated_at": NOW}
    keys = [f"{user}-{n}" for n in range(size)]
    proxy.latest.conversations.insert_many({"_id": key, **about, **counts} for key in keys)
    proxy.latest.messages.insert_many(
        {"_id": f"{key}/m", "conversation_id": key, "seq": 1, "role": "user", **about} for key in keys
    )
    return RemovedCounts(size, size)


def left(proxy: MongoProxy, user: str) -> int:
    database = proxy.latest
    return sum(
        each.count_documents({"user_id": user}) for each in (database.conversations, database.messages)
    )


async def test_an_erasure_goes_on_when_its_caller_has_been_answered_and_any_process_knows_how_far(
    proxy: MongoProxy,
) -> None:
    owner = OwnerKey("ada")
    async with processes(proxy) as (one, other):
        whole = fill(proxy, owner)
        begun = await erasure.erase(one, owner, 0.3)
        assert not begun.done
        assert begun.removed.conversations < SIZE
        first = await erasure.find(other, owner, begun.id)
        assert (first.id, first.done) == (begun.id, False)
        # The same call again takes the same erasure up, and returns its receipt.
        ended = await erasure.erase(one, owner, 60)
        assert ended == ErasureState(begun.id, True, whole)
        assert await erasure.find(other, owner, begun.id) == ended
        assert left(proxy, owner) == 0
        # What is kept does not say whose it is, and others do not find it.
        assert not proxy.latest.erasures.count_documents({})
        (receipt,) = proxy.latest.erasure_receipts.find()
        assert set(receipt) - {"revision_id"} == {"_id", "ended_at", "conversations", "messages"}
        assert owner not in receipt["_id"]
        assert begun.id not in receipt["_id"]
        for someone, which in (
            (OwnerKey("acme/ada"), begun.id),
            (OwnerKey("bob"), begun.id),
            (owner, "none"),
        ):
            with pytest.raises(ErasureNotFound):
                await erasure.find(one, someone, which)
        # A new erasure of the same user is another one.
        again = await erasure.erase(one, owner, 60)
        assert again.removed == RemovedCounts(0, 0)
        assert again.id != begun.id
        expiry = proxy.latest.erasure_receipts.index_information()["ended_at_1"]["expireAfterSeconds"]
        assert expiry == 7 * 86_400


async def test_erasures_of_one_user_at_once_are_one_erasure_and_count_once(proxy: MongoProxy) -> None:
    owner = OwnerKey("ada")
    async with processes(proxy) as (one, other):
        whole = fill(proxy, owner, 40)
        calls = [erasure.erase(store, owner, 60) for store in (one, one, other)]
        states = await asyncio.gather(*calls)
        assert {state.removed for state in states} == {whole}
        assert len({state.id for state in states}) == 1


@pytest.mark.parametrize("stop_s", [0.05, 0.3])
async def test_an_erasure_whose_process_dies_is_finished_by_the_sweep_of_another(
    proxy: MongoProxy, stop_s: float
) -> None:
    owner = OwnerKey("ada")
    async with processes(proxy) as (dying, other):
        whole = fill(proxy, owner)
        begun = await erasure.erase(dying, owner, stop_s)
        assert not begun.done
        await dying.close()
        # While it may still be going on, nobody takes it up.
        assert await erasure.resume_erasures(other) == 0
        assert not (await erasure.find(other, owner, begun.id)).done
        proxy.latest.erasures.update_one({"_id": owner}, {"$set": {"active_at": NOW - timedelta(minutes=2)}})
        assert await erasure.resume_erasures(other) == 1
        assert await erasure.find(other, owner, begun.id) == ErasureState(begun.id, True, whole)
        assert left(proxy, owner) == 0


async def test_what_is_erased_after_another_process_ended_the_erasure_is_added_to_its_receipt(
    proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = OwnerKey("ada")
    async with processes(proxy) as (one, other):
        fill(proxy, owner, 10)
        look = erasure._some_of_owner
        ended: list[ErasureState] = []

        async def slow(store: ConversationStore, owner: OwnerKey) -> Any:
            found = await look(store, owner)
            if store is one and not found and not ended:
                # Nothing is left for this one; before it ends, the other ends it, and one more is created.
                ended.append(await erasure.erase(other, owner, 60))
                proxy.latest.conversations.insert_one(
                    {"_id": "late", "user_id": owner, "message_count": 3, "last_seq": 3, "updated_at": NOW}
                )
                found = await look(store, owner)
            return found

        monkeypatch.setattr(erasure, "_some_of_owner", slow)
        state = await erasure.erase(one, owner, 60)
        assert ended == [ErasureState(state.id, True, RemovedCounts(10, 10))]
        assert state.removed == RemovedCounts(11, 13)
        assert not proxy.latest.erasures.count_documents({})


async def test_an_erasure_says_that_it_goes_on_while_one_conversation_takes_long(
    proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_ALIVE_EVERY_S", 0.1)
    owner = OwnerKey("ada")
    async with processes(proxy) as (store, _):
        fill(proxy, owner, 1)

        async def long(*_: object, **__: object) -> None:
            await asyncio.sleep(0.5)
            raise RuntimeError("this is enough")

        monkeypatch.setattr("service.history.deleting.delete_conversation", long)
        began = datetime.now(UTC)
        assert not (await erasure.erase(store, owner, 0.3)).done
        said = proxy.latest.erasures.find_one({"_id": owner}) or {}
        assert said["active_at"].replace(tzinfo=UTC) - began > timedelta(seconds=0.1)


def test_a_large_user_is_erased_over_http_with_a_receipt_to_be_asked_for(
    proxy: MongoProxy, tmp_path: Any
) -> None:
    service = Service(tmp_path, mongodb_url=proxy.url, database_timeout_ms=1_000)
    try:
        service.start()
        whole = fill(proxy, "ada", 600)
        with service.client() as client, ThreadPoolExecutor(1) as threads:
            began = time.monotonic()
            answer = client.delete("/users/ada")
            assert answer.status_code == 202, answer.text
            assert time.monotonic() - began < 5
            body, where = answer.json(), answer.headers["Location"]
            assert where == f"/users/ada/erasures/{body['id']}"
            assert int(answer.headers["Retry-After"]) >= 1
            assert (body["user_id"], body["state"]) == ("ada", "running")
            repeated = threads.submit(httpx.delete, f"{service.url}/users/ada", timeout=60).result()
            assert (repeated.status_code, repeated.headers["Location"]) == (202, where)
            counted = body["conversations"]
            while (asked := client.get(where)).status_code == 202:
                assert asked.headers["Location"] == where
                assert asked.json()["conversations"] >= counted
                counted = asked.json()["conversations"]
                time.sleep(0.1)
            assert asked.status_code == 200, asked.text
            done = {"id": body["id"], "user_id": "ada", "state": "done"}
            assert asked.json() == {**done, "conversations": whole.conversations, "messages": whole.messages}
            assert "Location" not in asked.headers
            assert left(proxy, "ada") == 0
            # A small erasure is answered at once.
            assert client.delete("/users/ada").status_code == 200
            for path in ("/users/bob/erasures/" + body["id"], "/users/ada/erasures/none"):
                missing = client.get(path)
                assert (missing.status_code, missing.json()["type"].rpartition(":")[2]) == (
                    404,
                    "erasure-not-found",
                )
            assert client.get(where, params={"x": 1}).status_code == 422
    finally:
        service.stop()
