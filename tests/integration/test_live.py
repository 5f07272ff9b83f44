"""Following: what a reader was told is in the end the history, whatever happens to anybody meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import jwt
import pytest
from pymongo import MongoClient

from service.app import create_app
from service.settings import Settings
from tests.harness import Service, append, create, history, keys, new_id, new_key, running, whole_history
from tests.live import EVENTS, Reader, tail
from tests.proxy import Proxy
from tests.tokens import AUDIENCE, ISSUER


def message(text: str = "x") -> dict[str, str]:
    return {"role": "user", "content": text}


def path(conversation: str) -> str:
    return f"/conversations/{conversation}/messages"


def mongo_of(service: Service) -> MongoClient[Any]:
    return MongoClient(service.database_url)


@contextlib.contextmanager
def reading(conversation: str, *services: Service) -> Iterator[Reader]:
    reader = Reader(conversation, *services).start()
    try:
        yield reader
    finally:
        reader.stop()


# -- where a stream begins, and what it says -----------------------------------------------------------


def test_a_stream_has_all_messages_then_the_head_then_what_comes(
    client: httpx.Client, conversation: str
) -> None:
    stored = append(client, conversation, message("a"), message("b"))
    with client.stream("GET", f"{path(conversation)}?after=0", headers=EVENTS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-store"
        lines = response.iter_lines()
        assert next(lines) == "retry: 1000"
    with tail(client, f"{path(conversation)}?after=0") as told:
        first = [next(told) for _ in range(3)]
        assert [(each["event"], each["id"]) for each in first] == [
            ("message", "1"),
            ("message", "2"),
            ("head", "2"),
        ]
        assert [each["data"] for each in first[:2]] == stored
        assert first[2]["data"] == {"last_seq": 2}
        (third,) = append(client, conversation, message("c"))
        assert next(told) == {"event": "message", "id": "3", "data": third}


def test_a_stream_begins_at_the_last_event_else_after_a_seq_else_at_the_end(
    client: httpx.Client, conversation: str
) -> None:
    append(client, conversation, *[message()] * 5)
    for query, headers, expected in [
        ("?after=1", {"Last-Event-ID": "3"}, ["4", "5"]),
        ("?after=1", {}, ["2", "3", "4", "5"]),
        ("?after=1", {"Last-Event-ID": ""}, ["2", "3", "4", "5"]),
        ("?after=5", {}, []),
        ("", {"Last-Event-ID": "4"}, ["5"]),
        ("", {}, []),
    ]:
        with tail(client, path(conversation) + query, **headers) as told:
            ids = [next(told)["id"] for _ in range(len(expected) + 1)]
        assert ids == [*expected, "5"], (query, headers)  # the last one is the head's


def test_items_are_followed_as_items(client: httpx.Client, conversation: str) -> None:
    item = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    client.post(path(conversation), json={"items": [item]})
    with tail(client, f"{path(conversation)}?after=0&as=items") as told:
        assert next(told)["data"]["items"] == [item]


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 19, "9" * 30, "１"])
def test_a_last_event_id_that_is_no_seq_is_refused(
    client: httpx.Client, conversation: str, given: str
) -> None:
    headers = [(b"accept", b"text/event-stream"), (b"last-event-id", given.encode())]
    refused = client.get(path(conversation), headers=headers)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["path"] == "header.Last-Event-ID"


@pytest.mark.parametrize(
    ("query", "accept", "where"),
    [
        ("limit=1", "text/event-stream", "limit"),
        ("after=0&wait=1", "text/event-stream", "wait"),
        ("role=user", "text/event-stream", "role"),
        ("order=desc", "text/event-stream", "order"),
        ("wait=1", "application/json", "wait"),
        ("wait=61&after=0", "application/json", "wait"),
        ("wait=1.5&after=0", "application/json", "wait"),
        ("wait=1&after=0", "application/x-ndjson", "wait"),
        ("wait=1&after=0&order=desc", "application/json", "order"),
        ("wait=1&after=0&last=1", "application/json", "last"),
    ],
)
def test_parameters_that_make_no_sense_together_are_refused(
    client: httpx.Client, conversation: str, query: str, accept: str, where: str
) -> None:
    refused = client.get(f"{path(conversation)}?{query}", headers={"accept": accept})
    assert refused.status_code == 422, refused.text
    assert refused.json()["errors"][0]["path"] == f"query.{where}"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("text/event-stream", "text/event-stream"),
        ("Text/Event-Stream; q=0.5", "text/event-stream"),
        ("text/event-stream, application/json", "text/event-stream"),
        ("application/json, text/event-stream", "application/json"),
        ("application/json;q=0.5, text/event-stream", "text/event-stream"),
        ("text/event-stream;q=0.2, application/json;q=0.8", "application/json"),
        ("text/event-stream;q=0", "application/json"),
        ("application/json, application/x-ndjson", "application/x-ndjson"),
        ("application/x-ndjson;q=0.1, text/event-stream;q=0.2", "text/event-stream"),
        ("*/*", "application/json"),
        ("text/html", "application/json"),
    ],
)
def test_the_form_of_the_answer_is_the_one_that_the_client_prefers(
    client: httpx.Client, conversation: str, accept: str, expected: str
) -> None:
    append(client, conversation, message())
    with client.stream("GET", f"{path(conversation)}?after=0", headers={"accept": accept}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == expected


def test_a_stream_has_no_head_request_as_no_other_path_has(client: httpx.Client, conversation: str) -> None:
    assert client.head(path(conversation), headers=EVENTS).status_code == 405


def test_a_conversation_that_is_not_there_is_a_404_before_the_stream_begins(client: httpx.Client) -> None:
    assert client.get(path(new_id()), headers=EVENTS).status_code == 404


# -- what is deleted meanwhile ------------------------------------------------------------------------


def test_a_reader_is_told_what_is_deleted(client: httpx.Client, conversation: str, service: Service) -> None:
    stored = append(client, conversation, *[message(str(n)) for n in range(10)])
    with reading(conversation, service) as reader:
        reader.comes_to(client, conversation)
        client.delete(f"{path(conversation)}/{stored[3]['id']}")
        client.post(f"/conversations/{conversation}/pop")
        reader.comes_to(client, conversation)
        client.delete(path(conversation), params={"after": 6})
        append(client, conversation, message("new"))
        reader.comes_to(client, conversation)
        client.delete(path(conversation))
        reader.comes_to(client, conversation)
        assert reader.history == []
        append(client, conversation, message("again"))
        reader.comes_to(client, conversation)
        assert reader.connections == 1
        client.delete(f"/conversations/{conversation}")
        reader.until(lambda: reader.gone)
        assert reader.told[-1] == {"event": "gone", "data": {}}


def test_a_reader_of_an_erased_user_is_told_that_all_is_gone(client: httpx.Client, service: Service) -> None:
    user = new_id("user")
    conversation = create(client, new_id(), user=user)
    append(client, conversation, message())
    with reading(conversation, service) as reader:
        reader.comes_to(client, conversation)
        assert client.delete(f"/users/{user}").status_code == 200
        reader.until(lambda: reader.gone)


def test_a_reader_that_comes_back_learns_what_was_deleted_while_it_was_away(
    client: httpx.Client, conversation: str, service: Service
) -> None:
    stored = append(client, conversation, *[message(str(n)) for n in range(40)])
    with reading(conversation, service) as reader:
        reader.comes_to(client, conversation)
    # More parts than are kept apart, far from each other.
    for place in range(0, 40, 3):
        client.delete(f"{path(conversation)}/{stored[place]['id']}")
    client.delete(path(conversation), params={"after": 35})
    away = Reader(conversation, service)
    away.has, away.last_id = dict(reader.has), reader.last_id
    away.start()
    away.comes_to(client, conversation)
    append(client, conversation, message("new"))
    away.comes_to(client, conversation)
    assert away.delivered == [41]
    away.stop()
    # It has a later message now, so it was told of all of that, and is not told again.
    with tail(client, path(conversation), **{"Last-Event-ID": "41"}) as told:
        assert next(told)["event"] == "head"


def test_a_reader_is_not_given_the_messages_of_another_conversation_under_the_same_id(
    client: httpx.Client, conversation: str, service: Service
) -> None:
    append(client, conversation, *[message()] * 5)
    with reading(conversation, service) as reader:
        reader.comes_to(client, conversation)
    client.delete(f"/conversations/{conversation}")
    create(client, conversation, user="ada")
    append(client, conversation, message("other"))
    away = Reader(conversation, service)
    away.has, away.last_id = dict(reader.has), reader.last_id
    away.start()
    away.comes_to(client, conversation)
    # And one that is connected is told that its own is gone, also where it missed the time between the two.
    with mongo_of(service) as mongo:
        conversations: Any = mongo.get_default_database().conversations
        conversations.update_one({"_id": conversation}, {"$set": {"created_at": datetime.now(UTC)}})
    away.until(lambda: away.gone)
    away.stop()


def test_what_is_replaced_is_told_as_it_stands_now(
    client: httpx.Client, conversation: str, service: Service
) -> None:
    named = [message(text) | {"id": text} for text in "abcd"]
    append(client, conversation, *named)
    with reading(conversation, service) as reader:
        reader.comes_to(client, conversation)
        away = Reader(conversation, service)
        away.has, away.last_id = dict(reader.has), reader.last_id
        assert client.put(f"{path(conversation)}/b", json=message("B")).status_code == 200
        reader.comes_to(client, conversation)
        assert [event["event"] for event in reader.told][-1] == "updated"
        assert (reader.has[2]["content"], reader.has[2]["revision"]) == ("B", 1)
        # One is replaced, two are cut off, and two are appended, which have new places.
        a, e, f = named[0] | {"content": "A"}, message("e") | {"id": "e"}, message("f") | {"id": "f"}
        whole = [a, message("B") | {"id": "b"}, e, f]
        assert client.put(path(conversation), json={"messages": whole}).status_code == 200
        reader.comes_to(client, conversation)
        assert [each["content"] for each in reader.history] == ["A", "B", "e", "f"]
        assert reader.delivered == [1, 2, 3, 4, 5, 6]
    away.start()
    away.comes_to(client, conversation)
    away.stop()
    assert away.delivered == [5, 6]


def test_a_change_that_notes_nothing_makes_a_reader_hear_everything_again(
    client: httpx.Client, conversation: str, service: Service
) -> None:
    append(client, conversation, message("a"), message("b"))
    with reading(conversation, service) as reader, mongo_of(service) as mongo:
        reader.comes_to(client, conversation)
        database: Any = mongo.get_default_database()
        named = {"conversation_id": conversation, "seq": 2}
        database.messages.update_one(named, {"$set": {"content": "BB"}})
        database.conversations.update_one({"_id": conversation}, {"$inc": {"rewrites": 1, "version": 1}})
        reader.comes_to(client, conversation)
        assert reader.has[2]["content"] == "BB"


# -- several processes, and their ends ------------------------------------------------------------------


def test_what_another_process_writes_is_told_at_once(
    second_service: Service, client: httpx.Client, conversation: str
) -> None:
    with tail(client, path(conversation)) as told, second_service.client() as other:
        assert next(told)["event"] == "head"
        append(other, conversation, message("warm"))
        assert next(told)["event"] == "message"
        times = []
        for _ in range(10):
            began = time.monotonic()
            append(other, conversation, message())
            assert next(told)["event"] == "message"
            times.append(time.monotonic() - began)
        assert sorted(times)[5] < 0.5  # a poll would take up to 1 s


def test_a_reader_goes_on_with_another_process_when_its_own_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        (tmp_path / "b").mkdir()
        second = Service(tmp_path / "b", mongodb_url=first.database_url).start()
        try:
            with first.client() as client:
                conversation = create(client)
                append(client, conversation, *[message()] * 20)
                with reading(conversation, second, first) as reader:
                    reader.comes_to(client, conversation)
                    second.kill()
                    client.delete(path(conversation), params={"after": 15})
                    append(client, conversation, *[message()] * 20)
                    reader.comes_to(client, conversation)
                    assert reader.connections > 1
        finally:
            second.kill()


def test_a_stream_outlives_the_engine_and_misses_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        conversation = create(client)
        append(client, conversation, message("before"))
        with reading(conversation, service) as reader:
            reader.comes_to(client, conversation)
            os.kill(service.engine_pid(), signal.SIGKILL)
            service.wait_until("/health/ready")
            append(client, conversation, message("after"))
            client.post(f"/conversations/{conversation}/pop")
            append(client, conversation, message("last"))
            reader.comes_to(client, conversation, timeout_s=40)
            assert reader.connections == 1


def test_a_change_stream_that_is_cut_is_opened_again_and_nothing_is_missed(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    port = int(service.database_url.rpartition("@")[2].partition(":")[2].partition("/")[0])
    proxy = Proxy(port).start()
    url = service.database_url.replace(f":{port}/", f":{proxy.port}/")
    beside = Service(tmp_path, mongodb_url=url).start()
    try:
        conversation = create(client, new_id())
        with reading(conversation, beside) as reader:
            reader.until(lambda: bool(reader.told))
            proxy.down()
            for n in range(10):  # while the process that the reader is connected to hears of nothing
                append(client, conversation, message(str(n)))
            client.delete(path(conversation), params={"after": 5})
            proxy.up()
            reader.comes_to(client, conversation, timeout_s=40)
            append(client, conversation, message("new"))
            reader.comes_to(client, conversation, timeout_s=5)
    finally:
        beside.stop()
        proxy.stop()


def rewrite(http: httpx.Client, conversation: str, chance: random.Random) -> None:
    """Pop, cut off, replace the newest message, or make the end another list, as chance has it."""
    last = http.get(f"/conversations/{conversation}").json()["last_seq"]
    place = {"after": max(0, last - chance.randint(0, 8))}
    end = [message(str(chance.random())) | {"id": new_id()} for _ in range(chance.randint(0, 3))]
    match chance.randint(0, 3):
        case 0:
            http.post(f"/conversations/{conversation}/pop")
        case 1:
            http.delete(path(conversation), params=place)
        case 2:
            http.put(path(conversation), params=place, json={"messages": end})
        case _:
            for each in http.get(path(conversation), params={"last": 1}).json()["data"]:
                http.put(f"{path(conversation)}/{each['id']}", json=message("again"))


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_writers_rewrite_and_connections_end_a_reader_has_the_history_in_the_end(
    service: Service, second_service: Service, client: httpx.Client, seed: int
) -> None:
    conversation, chance = create(client, new_id()), random.Random(seed)

    def write(number: int) -> None:
        own = random.Random(seed * 100 + number)
        with (service, second_service)[number % 2].client() as other:
            for _ in range(25):
                if own.random() < 0.7:
                    append(other, conversation, *[message(str(own.random()))] * own.randint(1, 4))
                else:
                    rewrite(other, conversation, own)

    with (
        reading(conversation, service) as steady,
        reading(conversation, service, second_service) as restless,
        ThreadPoolExecutor(4) as pool,
    ):
        writers = [pool.submit(write, number) for number in range(4)]
        while not all(each.done() for each in writers):
            time.sleep(chance.uniform(0.01, 0.15))
            restless.disconnect()
        for each in writers:
            each.result()
        for reader in (steady, restless):
            reader.comes_to(client, conversation)
        assert steady.connections == 1
        assert restless.connections > 3


# -- a slow reader, the end, the limits ------------------------------------------------------------------


def _raw(service: Service, target: str, **headers: str) -> socket.socket:
    """Ask for events, and read nothing."""
    opened = socket.create_connection(("127.0.0.1", service.port))
    said = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n{said}\r\n"
    opened.sendall(head.encode())
    return opened


def _memory(service: Service) -> int:
    assert service.process is not None
    pid = str(service.process.pid)
    said = subprocess.run(["ps", "-o", "rss=", "-p", pid], capture_output=True, text=True, check=True)
    return int(said.stdout) * 1024


def test_readers_that_do_not_read_cost_no_memory_and_are_ended(tmp_path: Path) -> None:
    with running(tmp_path, send_timeout_ms=4_000) as service, service.client() as client:
        conversation = create(client)
        for _ in range(15):
            append(client, conversation, *[message("x" * 100_000)] * 40)
        before = _memory(service)
        slow = [_raw(service, f"{path(conversation)}?after=0") for _ in range(5)]
        time.sleep(2)
        assert _memory(service) - before < 60 * 1024 * 1024  # of 300 MB that they asked for
        time.sleep(4)
        for each in slow:
            each.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while each.recv(1 << 20):
                    pass
            each.close()
        assert "answer-not-read" in service.output()


def test_the_end_of_the_service_ends_every_stream_within_a_second(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        conversation = create(client)
        ends: list[float] = []
        began = threading.Barrier(4)

        def follow(target: str) -> None:
            with service.client() as own, tail(own, target) as told:
                next(told)
                began.wait()
                list(told)
            ends.append(time.monotonic())

        def poll() -> None:
            began.wait()
            with service.client() as own:
                answer = own.get(f"{path(conversation)}?after=0&wait=60")
            assert answer.json() == {"data": [], "has_more": False, "next": None}
            ends.append(time.monotonic())

        with ThreadPoolExecutor(3) as pool:
            working = [pool.submit(follow, path(conversation)), pool.submit(follow, "/events")]
            working.append(pool.submit(poll))
            began.wait()
            time.sleep(0.5)
            stopped = time.monotonic()
            assert service.process is not None
            service.process.send_signal(signal.SIGTERM)
            for each in working:
                each.result(20)
        assert len(ends) == 3
        assert max(ends) - stopped < 1


def test_streams_count_as_connections(tmp_path: Path) -> None:
    with running(tmp_path, connections_max=3) as service, service.client() as client:
        conversation = create(client)
        opened = [_raw(service, path(conversation)) for _ in range(2)]
        for each in opened:
            assert b"200 OK" in each.recv(1000)
        with service.client() as other:
            refused = other.get(path(conversation), headers=EVENTS)
            assert refused.status_code == 503
        for each in opened:
            each.close()
        deadline = time.monotonic() + 10
        while True:  # the service notices that they are gone, although nothing is sent
            with service.client() as other, other.stream("GET", path(conversation), headers=EVENTS) as answer:
                if answer.status_code == 200:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)


# -- who may follow ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"jwt_secret": "s" * 40, "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_leeway_s": 0}
    with running(
        tmp_path_factory.mktemp("guarded"), auth="key+jwt", key_cache_ms=200, audit_days=1, **settings
    ) as service:
        yield service


def _bearer(service: Service, credential: str) -> httpx.Client:
    return service.client(headers={"Authorization": f"Bearer {credential}"})


def _token(user: str, seconds: float) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": user, "exp": int(time.time() + seconds)}
    return jwt.encode(claims, "s" * 40, "HS256")


def test_a_stream_ends_with_the_token_that_opened_it(guarded: Service) -> None:
    with _bearer(guarded, _token("ada", 4)) as ada:
        conversation = create(ada, new_id())
        with tail(ada, path(conversation)) as told:
            assert next(told)["event"] == "head"
            began = time.monotonic()
            assert list(told) == []
            assert 0.5 < time.monotonic() - began < 6
        assert ada.get(path(conversation), headers=EVENTS).status_code == 401


def test_a_stream_and_a_wait_show_nothing_after_their_key_is_revoked(guarded: Service) -> None:
    key, writer = new_key(guarded, "read", "write"), new_key(guarded, "read", "write")
    with _bearer(guarded, key) as own, _bearer(guarded, writer) as other, ThreadPoolExecutor(1) as pool:
        conversation = create(other, new_id())
        with tail(own, path(conversation)) as told:
            assert next(told)["event"] == "head"
            waiting = pool.submit(own.get, f"{path(conversation)}?after=0&wait=30")
            time.sleep(0.5)
            keys(guarded, "revoke", key.split("_")[1])
            time.sleep(0.5)
            append(other, conversation, message("secret"))
            assert next(told, None) is None
            assert waiting.result(20).status_code == 401


def test_a_stranger_a_writer_and_another_tenant_cannot_follow(guarded: Service) -> None:
    writer, reader = new_key(guarded, "write"), new_key(guarded, "read", tenant="globex")
    with _bearer(guarded, _token("ada", 60)) as ada, _bearer(guarded, _token("bob", 60)) as bob:
        conversation = create(ada, new_id())
        missing = bob.get(path(new_id()), headers=EVENTS)
        foreign = bob.get(path(conversation), headers=EVENTS)
        assert missing.status_code == foreign.status_code == 404
        assert missing.json().keys() == foreign.json().keys()
    with _bearer(guarded, reader) as other:
        assert other.get(path(conversation), headers=EVENTS).status_code == 404
        assert other.get("/events").status_code == 403  # all of a tenant is for an administrator
        with tail(other, "/events?user_id=ada") as told:
            assert next(told)["event"] == "head"
    with _bearer(guarded, writer) as other:
        assert other.get(path(conversation), headers=EVENTS).status_code == 403
        assert other.get("/events?user_id=ada").status_code == 403
    with guarded.client() as nobody:
        assert nobody.get(path(conversation), headers=EVENTS).status_code == 401


def test_a_stream_is_one_entry_of_the_audit_trail_from_its_beginning_on(guarded: Service) -> None:
    with _bearer(guarded, _token("ada", 60)) as ada:
        conversation = create(ada, new_id())
        with tail(ada, path(conversation)) as told:
            next(told)
            append(ada, conversation, message())
            next(told)
            with mongo_of(guarded) as mongo:
                audit: Any = mongo.get_default_database().audit
                named = {"conversation_id": conversation, "method": "GET"}
                deadline = time.monotonic() + 10
                while not (found := list(audit.find(named))):
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
        time.sleep(2)
        with mongo_of(guarded) as mongo:
            found = list(mongo.get_default_database().audit.find(named))
        assert [(each["status"], each["principal"], each["user_id"]) for each in found] == [
            (200, "jwt:ada", "ada")
        ]


def test_a_stream_is_one_request_of_a_rate_however_long_it_is(tmp_path: Path) -> None:
    with running(tmp_path, rate_per_key="4/hour") as service, service.client() as client:
        conversation = create(client)
        with tail(client, path(conversation)) as told:
            next(told)
            append(client, conversation, message())
            assert next(told)["event"] == "message"
        answered = []
        for _ in range(3):
            with client.stream("GET", path(conversation), headers=EVENTS) as response:
                answered.append(response.status_code)
        assert answered == [200, 429, 429]


# -- waiting ----------------------------------------------------------------------------------------


def test_a_wait_is_answered_at_once_or_when_something_comes_or_when_it_is_over(
    client: httpx.Client, conversation: str
) -> None:
    began = time.monotonic()
    assert client.get(path(conversation), params={"after": 0, "wait": 1}).json() == {
        "data": [],
        "has_more": False,
        "next": None,
    }
    assert 0.9 < time.monotonic() - began < 5
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, path(conversation), params={"after": 0, "wait": 25})
        time.sleep(0.3)
        stored = append(client, conversation, message("a"), message("b"))
        assert waiting.result(10).json()["data"] == stored
    began = time.monotonic()
    assert client.get(path(conversation), params={"after": 1, "wait": 25}).json()["data"] == stored[1:]
    assert time.monotonic() - began < 5
    page = client.get(path(conversation), params={"after": 0, "wait": 25, "limit": 1}).json()
    assert (page["has_more"], page["next"]) == (True, 1)


def test_a_wait_for_a_role_does_not_end_with_another_one(client: httpx.Client, conversation: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        query: dict[str, Any] = {"after": 0, "wait": 25, "role": "assistant"}
        waiting = pool.submit(client.get, path(conversation), params=query)
        time.sleep(0.3)
        append(client, conversation, message())
        time.sleep(0.3)
        assert not waiting.done()
        append(client, conversation, {"role": "assistant", "content": "hi"})
        assert [each["seq"] for each in waiting.result(10).json()["data"]] == [2]


def test_a_wait_ends_with_its_conversation(client: httpx.Client, conversation: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, path(conversation), params={"after": 0, "wait": 25})
        time.sleep(0.3)
        client.delete(f"/conversations/{conversation}")
        assert waiting.result(10).status_code == 404


# -- a list -----------------------------------------------------------------------------------------


def test_a_list_is_told_what_is_created_changed_and_deleted_of_its_user_only(
    client: httpx.Client, second_service: Service
) -> None:
    user, stranger = new_id("user"), new_id("user")
    declared = create_app(Settings(_env_file=None)).openapi()["paths"]["/events"]["get"]["responses"]["200"]
    schema = declared["content"]["text/event-stream"]["schema"]
    with tail(client, f"/events?user_id={user}") as told, second_service.client() as other:
        time.sleep(1)  # until the change stream is open
        foreign = create(other, new_id(), user=stranger)
        append(other, foreign, message())
        own = create(other, new_id(), user=user)
        first = next(told)
        while first["event"] == "head":  # one at the beginning, one when the change stream was opened
            first = next(told)
        jsonschema.validate({**first, "data": "{}"}, schema)
        assert (first["event"], first["data"]["id"]) == ("created", own)
        append(client, own, message())
        changed = next(told)
        assert (changed["event"], changed["data"]["last_seq"]) == ("changed", 1)
        other.patch(f"/conversations/{own}", json={"title": "T"})
        while changed["data"]["title"] != "T":
            changed = next(told)
            assert changed["event"] == "changed"
        other.delete(f"/conversations/{foreign}")
        other.delete(f"/conversations/{own}")
        last = next(told)
        while last["event"] == "changed":
            last = next(told)
        assert last == {"event": "deleted", "data": {"id": own}}


def test_the_history_after_all_of_this_is_still_the_history(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, *[message()] * 3)
    client.post(f"/conversations/{conversation}/pop")
    assert [each["seq"] for each in whole_history(client, conversation)] == [1, 2]
    assert history(client, conversation)["has_more"] is False
