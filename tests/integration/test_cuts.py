"""Connections cut before a request, before its answer, and held: each message stands exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import Service, append, contents, create, new_id, running, whole_history
from tests.proxy import Proxy, proxied

TIMEOUT_MS = 1_500


@pytest.fixture(scope="module")
def database_proxy(service: Service) -> Iterator[Proxy]:
    with proxied(urlsplit(service.database_url).port or 0) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def behind(
    service: Service, database_proxy: Proxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service that reaches its database through the proxy, and gives it little time."""
    port = urlsplit(service.database_url).port
    url = service.database_url.replace(f":{port}", f":{database_proxy.port}")
    directory = tmp_path_factory.mktemp("behind")
    limits = {"database_timeout_ms": TIMEOUT_MS, "server_selection_timeout_ms": 700}
    with running(directory, mongodb_url=url, **limits) as started:
        yield started


def append_until_answered(client: httpx.Client, conversation: str, body: Any, key: str) -> httpx.Response:
    """What a good client does: the same request with the same key, until there is an answer."""
    for _ in range(60):
        try:
            response = client.post(
                f"/conversations/{conversation}/messages", json=body, headers={"Idempotency-Key": key}
            )
        except httpx.TransportError:
            continue
        if response.status_code != 503:
            return response
        assert response.headers["retry-after"]
        time.sleep(0.1)
    raise AssertionError("no answer")


COMMANDS = [b"\x02update\0", b"\x02find\0", b"\x02insert\0", b"\x10commitTransaction\0"]


@pytest.mark.parametrize("before", [True, False], ids=["before_the_request", "before_the_answer"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each[1:-1].decode())
def test_a_cut_between_service_and_database_stores_once(
    behind: Service, database_proxy: Proxy, command: bytes, before: bool
) -> None:
    with behind.client() as client:
        conversation = create(client, new_id())
        first = append(client, conversation, {"role": "user", "content": "first"})
        if b"find" in command:  # a process that has changed the conversation otherwise reads it again
            client.patch(f"/conversations/{conversation}", json={"title": "new"}).raise_for_status()
        cut = database_proxy.cut(command, before=before)
        body = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
        response = append_until_answered(client, conversation, body, "k")
        assert cut.done == 1
        assert response.status_code in {200, 201}, response.text
        last = append(client, conversation, {"role": "user", "content": "last"})
        assert whole_history(client, conversation) == [*first, *response.json()["data"], *last]
        assert [each["seq"] for each in whole_history(client, conversation)] == [1, 2, 3, 4]
        assert client.get(f"/conversations/{conversation}").json()["message_count"] == 4


@pytest.mark.parametrize("before", [True, False], ids=["before_the_request", "before_the_answer"])
def test_a_commit_whose_outcome_nobody_knows_is_resolved_without_a_key_too(
    behind: Service, database_proxy: Proxy, before: bool
) -> None:
    """The service's own repetition must not double, and must not call its own message a replay."""
    with behind.client() as client:
        conversation = create(client, new_id())
        # The driver asks twice by itself; both answers are lost.
        cut = database_proxy.cut(b"\x10commitTransaction\0", before=before, times=2)
        path = f"/conversations/{conversation}/messages"
        response = client.post(path, json={"role": "user", "content": "x"})
        assert cut.done == 2
        assert response.status_code in {201, 503}, response.text
        stored = whole_history(client, conversation)
        assert len(stored) <= 1
        if response.status_code == 201:
            assert stored == [response.json()]
            assert "idempotent-replayed" not in response.headers
        message = append(client, conversation, {"role": "user", "content": "y"})[0]
        path = f"{path}/{message['id']}"
        database_proxy.cut(b"\x10commitTransaction\0", before=before, times=2)
        assert client.delete(path).status_code in {204, 503}
        assert client.delete(path).status_code in {204, 404}
        assert whole_history(client, conversation) == stored
        assert client.get(f"/conversations/{conversation}").json()["message_count"] == len(stored)


@pytest.mark.parametrize("before", [True, False], ids=["before_the_request", "before_the_answer"])
def test_a_pop_whose_commit_was_lost_takes_one_message_and_no_second(
    behind: Service, database_proxy: Proxy, before: bool
) -> None:
    with behind.client() as client:
        conversation = create(client, new_id())
        stored = append(client, conversation, *({"role": "user", "content": f"{n}"} for n in range(5)))
        cut = database_proxy.cut(b"\x10commitTransaction\0", before=before, times=2)
        response = client.post(f"/conversations/{conversation}/pop")
        assert cut.done == 2
        assert response.status_code in {200, 503}
        left = whole_history(client, conversation)
        if response.status_code == 200:
            assert response.json() == stored[-1]
            assert left == stored[:-1]
        assert len(left) >= 4
        assert client.get(f"/conversations/{conversation}").json()["message_count"] == len(left)


@pytest.mark.parametrize("before", [True, False], ids=["before_the_request", "before_the_answer"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each[1:-1].decode())
def test_a_conversation_is_started_with_all_its_items_once_or_not_at_all(
    behind: Service, database_proxy: Proxy, command: bytes, before: bool
) -> None:
    user = {"X-User-Id": new_id("user")}
    body = {"items": [{"role": "user", "content": f"{n}"} for n in range(3)]}
    with behind.client(headers=user) as client:
        cut = database_proxy.cut(command, before=before)
        for _ in range(30):
            made = client.post("/v1/conversations", json=body, headers={"Idempotency-Key": "k"})
            if made.status_code != 503:
                break
            time.sleep(0.1)
        assert made.status_code == 200, made.text
        assert cut.done == 1
        assert [each["id"] for each in client.get("/v1/conversations").json()["data"]] == [made.json()["id"]]
        assert len(client.get(f"/v1/conversations/{made.json()['id']}/items").json()["data"]) == 3


async def test_cuts_now_and_then_on_both_sides_leave_each_message_exactly_once(
    behind: Service, database_proxy: Proxy
) -> None:
    with proxied(behind.port) as client_proxy:
        for proxy, what, every in ((database_proxy, b"\x02", 23), (client_proxy, b"POST ", 7)):
            for before in (True, False):
                proxy.cut(what, before=before, times=12, every=every)
        base = f"http://127.0.0.1:{client_proxy.port}"
        conversations = [new_id() for _ in range(3)]
        with behind.client() as direct:
            for conversation in conversations:
                append_until_answered_create(direct, conversation)

        async def write(writer: int) -> None:
            conversation = conversations[writer % 3]
            with httpx.Client(base_url=base, timeout=20) as client:
                for turn in range(6):
                    batch = [{"role": "user", "content": f"{writer}/{turn}/{part}"} for part in range(2)]
                    args = (client, conversation, {"messages": batch}, f"{writer}-{turn}")
                    answer = await asyncio.to_thread(append_until_answered, *args)
                    assert answer.status_code in {200, 201}, answer.text

        await asyncio.gather(*(write(each) for each in range(6)))
        cuts = [each.done for each in (*database_proxy.cuts[-2:], *client_proxy.cuts)]
        database_proxy.cuts.clear()
    assert sum(cuts) > 10, cuts
    with behind.client() as client:
        for number, conversation in enumerate(conversations):
            stored = whole_history(client, conversation)
            said = contents(stored)
            writers = [number, number + 3]
            expected = {f"{w}/{turn}/{part}" for w in writers for turn in range(6) for part in range(2)}
            assert len(said) == len(expected)
            assert set(said) == expected
            assert [each["seq"] for each in stored] == list(range(1, len(said) + 1))
            assert all(said[n][:-1] == said[n + 1][:-1] for n in range(0, len(said), 2)), "batches together"


def append_until_answered_create(client: httpx.Client, conversation: str) -> None:
    while client.post("/conversations", json={"user_id": "ada", "id": conversation}).status_code == 503:
        time.sleep(0.1)


def assert_down(response: httpx.Response, began: float) -> None:
    assert response.status_code == 503, response.text
    assert response.headers["retry-after"] == "1"
    assert response.headers["content-type"] == "application/problem+json"
    assert time.monotonic() - began < TIMEOUT_MS / 1000 + 1.5


@pytest.mark.parametrize("outage", ["gone", "slow"])
async def test_while_the_database_is_gone_or_slow_every_answer_is_a_503_in_time(
    behind: Service, database_proxy: Proxy, outage: str
) -> None:
    async with behind.async_client() as client:
        conversation = new_id()
        await client.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}/messages"
        (database_proxy.down if outage == "gone" else database_proxy.hold)()
        try:
            began = time.monotonic()
            calls: list[Any] = [
                client.get(path),
                client.get("/conversations?user_id=ada"),
                client.get(path, headers={"accept": "application/x-ndjson"}),
                client.post("/conversations", json={"user_id": "ada"}),
                client.delete(path),
                client.delete("/conversations/another"),
                client.get("/health/ready"),
                *(client.post(path, json={"role": "user", "content": "x"}) for _ in range(40)),
            ]
            for response in await asyncio.gather(*calls):
                assert_down(response, began)
            live = time.monotonic()
            assert (await client.get("/health/live")).status_code == 200
            assert time.monotonic() - live < 1
        finally:
            (database_proxy.up if outage == "gone" else database_proxy.release)()
        # It works again within seconds, without a restart.
        deadline = time.monotonic() + 10
        while (await client.get("/health/ready")).status_code != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        found = await client.get("/conversations?user_id=ada")
        assert found.status_code == 200
        # The very conversation, too, though a statement that was held arrives after its transaction ended.
        while (await client.post(path, json={"role": "user", "content": "x"})).status_code != 201:
            assert time.monotonic() < deadline + 5
            await asyncio.sleep(0.1)


def test_a_statement_that_arrives_after_its_transaction_was_given_up_locks_nobody_out(
    behind: Service, database_proxy: Proxy
) -> None:
    """A minute is how long the database would keep the conversation locked for it."""
    with behind.client() as client:
        conversation = create(client, new_id())
        path = f"/conversations/{conversation}/messages"
        no_aborts = database_proxy.cut(b"abortTransaction\0", before=True, times=4)
        database_proxy.hold()
        try:
            assert client.post(path, json={"role": "user", "content": "lost"}).status_code == 503
        finally:
            database_proxy.release()
        began = time.monotonic()
        # With a key, for a 503 may be the answer to an append that took effect.
        answer = append_until_answered(client, conversation, {"role": "user", "content": "next"}, "k")
        assert time.monotonic() - began < 20
        no_aborts.times = 0
        assert answer.status_code in {200, 201}
        assert contents(whole_history(client, conversation)) == ["next"]


def test_a_stream_that_loses_its_database_ends_as_an_error_and_not_as_the_end(
    service: Service, behind: Service, database_proxy: Proxy
) -> None:
    with service.client() as unhurried:  # the one behind the proxy gives its database little time
        conversation = create(unhurried, new_id())
        for _ in range(16):
            append(unhurried, conversation, *({"role": "user", "content": "x" * 20_000} for _ in range(50)))
    with behind.client() as client:
        headers = {"accept": "application/x-ndjson"}
        path = f"/conversations/{conversation}/messages"
        try:
            with client.stream("GET", path, headers=headers) as response:
                lines = response.iter_lines()
                next(lines)
                database_proxy.down()
                with pytest.raises(httpx.RemoteProtocolError):
                    for _ in lines:
                        pass
        finally:
            database_proxy.up()
        assert "Traceback" not in behind.output()
