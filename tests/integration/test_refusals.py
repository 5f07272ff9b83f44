"""What refusing costs: little, whatever is refused, and however large it is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import bson
import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from pymongo import MongoClient
from starlette.datastructures import QueryParams

from service.access import api_keys as keys_module
from service.api import dependencies
from service.api.schemas import OwnerQuery
from service.database import Database
from service.errors import InvalidRequest
from service.formats import strict_json
from service.history.store import ConversationStore
from service.maintenance.sweep import expire
from service.server.http_protocol import TimeoutHttpProtocol
from service.settings import METADATA_BYTES_MAX, Settings
from tests.harness import Service, append, create, history, new_id, whole_history

JSON = {"content-type": "application/json"}
ANSWER_BYTES_MAX = 64 * 1024
MIB = 1024 * 1024


def refused(response: httpx.Response, status: int = 422) -> Any:
    assert response.status_code == status, response.text[:500]
    assert len(response.content) < ANSWER_BYTES_MAX
    return response.json()


def keys(count: int, first: str = "") -> str:
    return ",".join([*([first] if first else []), *(f'"{n:x}":0' for n in range(count))])


def post(client: httpx.Client, path: str, body: str | bytes) -> httpx.Response:
    return client.post(path, content=body, headers=JSON)


# -- how much is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 100, 70_000])
def test_more_keys_than_a_conversation_has_are_one_fault(client: httpx.Client, count: int) -> None:
    body = "{" + keys(count, '"user_id":"ada"') + "}"
    (fault,) = refused(post(client, "/conversations", body))["errors"]
    assert fault["path"] == '$["0"]'
    assert f"has {count + 1:,} keys" in fault["message"]
    assert "user_id, id, title, metadata, expires_at" in fault["message"]


def test_more_keys_than_a_change_has_are_one_fault(client: httpx.Client, conversation: str) -> None:
    content = "{" + keys(50_000) + "}"
    response = client.patch(f"/conversations/{conversation}", content=content, headers=JSON)
    assert len(refused(response)["errors"]) == 1


def test_more_keys_than_a_batch_has_are_one_fault(client: httpx.Client, conversation: str) -> None:
    body = "{" + keys(100_000, '"messages":[{"role":"user"}]') + "}"
    (fault,) = refused(post(client, f"/conversations/{conversation}/messages", body))["errors"]
    assert "100,001 keys" in fault["message"]
    assert whole_history(client, conversation) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/conversations", "{" + keys(50_000, '"items":[]') + "}"),
        ("/v1/conversations", '{"metadata":{' + keys(50_000) + "}}"),
        ("/v1/conversations/{}", "{" + keys(50_000) + "}"),
        ("/v1/conversations/{}", '{"metadata":{' + keys(50_000) + "}}"),
        ("/v1/conversations/{}/items", "{" + keys(50_000, '"items":[]') + "}"),
    ],
)
def test_more_keys_than_openais_models_have_are_one_fault(
    client: httpx.Client, conversation: str, path: str, body: str
) -> None:
    error = refused(post(client, path.format(conversation), body), 400)["error"]
    assert "keys" in error["message"]
    assert len(error["message"]) < 1_000


def bad_message(index: int) -> dict[str, Any]:
    return {"role": 1, "name": 2, "tool_call_id": 3, "metadata": "x", "seq": index, "content": {}}


def test_a_batch_names_a_hundred_faults_and_says_that_there_are_more(
    client: httpx.Client, conversation: str
) -> None:
    path = f"/conversations/{conversation}/messages"
    body = json.dumps({"messages": [bad_message(n) for n in range(1_000)]})
    answer = refused(post(client, path, body))
    assert len(answer["errors"]) == 100
    assert answer["errors"][0]["path"].startswith("$.messages[0].")
    assert "There are more faults; only the first 100 are listed." in answer["detail"]
    # A hundred are all of them, and that is said as well.
    body = json.dumps({"messages": [{"role": "robot"}] * 100})
    answer = refused(post(client, path, body))
    assert len(answer["errors"]) == 100
    assert "There are more" not in answer["detail"]


def test_a_thousand_bad_items_are_told_in_a_short_answer(client: httpx.Client, conversation: str) -> None:
    items = [{"type": "message", "id": "/", "content": 5}] * 1_000
    body = json.dumps({"items": items})
    for path in ("/v1/conversations", f"/v1/conversations/{conversation}/items"):
        message = refused(post(client, path, body), 400)["error"]["message"]
        assert "There are more faults" in message


@pytest.mark.parametrize(
    "body",
    [
        '{"role":"user",' + '"' + "k" * MIB + '":NaN}',
        '{"messages":[{"role":"user"}],"' + "k" * MIB + '":0}',
        '{"role":"user","' + "é" * MIB + '":1,"' + "é" * MIB + '":2}',
        '{"role":"user","content":' + ('[{"' + "k" * 10_000 + '":') * 100 + "0" + "}]" * 100 + "}",
        '{"role":"user","content":' + ('{"' + "\N{OCTOPUS}" * 1_000 + '":') * 2_000,
    ],
)
def test_a_fault_quotes_the_beginning_of_what_is_long(
    client: httpx.Client, conversation: str, body: str
) -> None:
    answer = refused(post(client, f"/conversations/{conversation}/messages", body.encode()))
    assert len(json.dumps(answer)) < 8_000


def test_a_header_is_quoted_by_its_beginning(client: httpx.Client, conversation: str) -> None:
    headers = {"content-type": "text/" + "x" * 50_000}
    response = client.post(f"/conversations/{conversation}/messages", content=b"{}", headers=headers)
    assert len(refused(response, 415)["detail"]) < 200


QUERIES = {
    "unknown": "&".join(f"{n:x}" for n in range(9_000)),
    "one of them twice": "&".join(f"{n:x}" for n in range(9_000)) + "&0",
    "each twice": "&".join(f"{n:x}&{n:x}" for n in range(4_500)),
    "one again and again": "&".join(["user_id"] * 6_000),
    "a long name": "k" * 50_000 + "=1",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
@pytest.mark.parametrize("path", ["/conversations", "/conversations/{}", "/v1/conversations/{}/items"])
def test_a_query_with_more_than_its_call_knows_is_one_fault(
    client: httpx.Client, conversation: str, path: str, query: str
) -> None:
    response = client.get(f"{path.format(conversation)}?{query}")
    answer = refused(response, 400 if path.startswith("/v1") else 422)
    assert len(response.content) < 2_000
    if not path.startswith("/v1"):
        assert len(answer["errors"]) <= 2  # and one for `user_id`, where it is missing


def test_a_call_without_a_query_refuses_one_by_one_fault(client: httpx.Client) -> None:
    body = {"user_id": "ada"}
    (fault,) = refused(client.post(f"/conversations?{QUERIES['unknown']}", json=body))["errors"]
    assert fault["path"] == "query.0"


def test_a_query_is_looked_through_a_few_times() -> None:

    walks = 0

    class Counted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal walks
            walks += 1
            return super().__iter__()

    class Request:
        query_params = QueryParams(QUERIES["one of them twice"])

    Request.query_params._list = Counted(Request.query_params._list)
    read = dependencies._reader(OwnerQuery, frozenset())
    with pytest.raises(RequestValidationError):
        read(Request()).send(None)  # type: ignore[arg-type]
    assert walks < 10


# -- how much is read ----------------------------------------------------------------------------------


SMALL: dict[str, Callable[[str], tuple[str, str, dict[str, Any]]]] = {
    "create": lambda _: ("POST", "/conversations", {"user_id": "ada", "metadata": {}}),
    "change": lambda c: ("PATCH", f"/conversations/{c}", {"metadata": {}}),
    "openai": lambda c: ("POST", f"/v1/conversations/{c}", {"metadata": {}}),
}


@pytest.mark.parametrize("call", SMALL.values(), ids=SMALL.keys())
def test_a_call_that_takes_no_messages_reads_two_mebibytes(
    client: httpx.Client, conversation: str, call: Callable[[str], tuple[str, str, dict[str, Any]]]
) -> None:
    method, path, body = call(conversation)
    content = json.dumps(body | {"metadata": {"k": "x" * 2 * MIB}})
    response = client.request(method, path, content=content, headers=JSON)
    assert "2097152" in str(refused(response, 413))
    if not path.startswith("/v1"):
        body |= {"metadata": {"k": "x" * (2 * MIB - 200)}}
        (fault,) = refused(client.request(method, path, json=body), 422)["errors"]
        assert fault["path"] == "$.metadata"


@pytest.mark.parametrize("call", [SMALL["create"], SMALL["change"]], ids=["create", "change"])
@pytest.mark.parametrize(
    "around", [{}, {"$ref": "an object of which the embedded engine keeps a copy", "$id": 1}]
)
def test_new_metadata_has_64_kib_at_most(
    client: httpx.Client, conversation: str, call: Any, around: dict[str, Any]
) -> None:
    method, path, body = call(conversation)
    left = METADATA_BYTES_MAX - len(bson.encode({"k": "", **around}))
    body["metadata"] = {"k": "x" * left, **around}
    response = client.request(method, path, json=body)
    assert response.status_code in {200, 201}
    assert response.json()["metadata"] == body["metadata"]
    body["metadata"]["k"] += "x"
    answer = refused(client.request(method, path, json=body))
    assert answer["errors"][0]["path"] == "$.metadata"
    assert "has 65537 bytes as BSON, and metadata may have 65536" in answer["detail"]


def test_metadata_that_is_larger_stays_readable(
    client: httpx.Client, conversation: str, service: Service
) -> None:

    large = {"k": "x" * MIB}
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        database = operator.get_default_database()
        database.conversations.update_one({"_id": conversation}, {"$set": {"metadata": large}})
    assert client.get(f"/conversations/{conversation}").json()["metadata"] == large
    append(client, conversation, {"role": "user"})
    path = f"/conversations/{conversation}"
    assert client.patch(path, json={"title": "t"}).json()["metadata"] == large
    # What changes nothing of it passes, and a change does not.
    changed = client.patch(path, json={"title": "again", "metadata": large}).json()
    assert (changed["title"], changed["metadata"]) == ("again", large)
    assert client.patch(path, json={"metadata": large}).json()["metadata"] == large
    fault = refused(client.patch(path, json={"title": "no", "metadata": large | {"more": 1}}))["errors"][0]
    assert fault["path"] == "$.metadata"
    after = client.get(path).json()
    assert (after["title"], after["metadata"], after["message_count"]) == ("again", large, 1)


@pytest.mark.parametrize("value", ["{}", "[]", '{"a":0}', '"ab"', "[[[]]]", "{},1.5"])
def test_a_body_of_more_values_than_fit_is_refused_before_it_is_parsed(
    client: httpx.Client, conversation: str, value: str
) -> None:
    count = 30 * MIB // (len(value) + 1)
    body = '{"role":"user","content":[' + ",".join([value] * count) + "]}"
    answer = refused(post(client, f"/conversations/{conversation}/messages", body), 413)
    assert "so many values" in answer["detail"]


def test_a_large_text_that_looks_like_json_is_not_counted_as_values(
    client: httpx.Client, conversation: str
) -> None:
    text = '{"a": [1, 2, {"b\\\\": "c"}]}, ' * 200_000
    body = json.dumps({"role": "user", "content": text})
    response = post(client, f"/conversations/{conversation}/messages", body)
    assert response.status_code == 201, response.text[:500]
    assert response.json()["content"] == text
    (stored,) = history(client, conversation)["data"]
    assert stored["content"] == text


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"[" * 32 * MIB, "$" + "[0]" * 90),
        (b'{"a":' * 6 * MIB, "$" + ".a" * 90),
        (
            b'{"role":"user","name":"' + b"[" * MIB + b'","content":' + b"[" * 2_000 + b"]" * 2_000 + b"}",
            "$.content" + "[0]" * 89,
        ),
        (b'{"a":["\\"[",{"k,]}":' + b"[" * 100_000, '$.a[1]["k,]}"]' + "[0]" * 87),
        (
            b'{"name":"' + b'\\"' * 6 * MIB + b"\\" * 6 * MIB + b'","content":' + b"[" * 2_000,
            "$.content" + "[0]" * 89,
        ),
    ],
    ids=["lists", "objects", "behind a text", "never closed", "behind escapes"],
)
def test_what_is_nested_too_deep_is_refused_with_its_path(
    client: httpx.Client, conversation: str, body: bytes, path: str
) -> None:
    (fault,) = refused(post(client, f"/conversations/{conversation}/messages", body))["errors"]
    assert fault["path"] == path
    assert "90 levels" in fault["message"]


def test_a_number_of_megabytes_is_refused(client: httpx.Client, conversation: str) -> None:
    for number in ("1" * 2 * MIB, "0." + "1" * 2 * MIB, "1e" + "0" * 2 * MIB):
        body = '{"role":"user","content":[' + number + "]}"
        (fault,) = refused(post(client, f"/conversations/{conversation}/messages", body))["errors"]
        assert fault["path"] == "$.content[0]"


def test_a_large_batch_is_stored_and_repeated_as_a_small_one_is(
    client: httpx.Client, conversation: str
) -> None:
    batch = [
        {"role": "user", "content": f"{n}", "data": [n, 1.5, None, {"x": "y" * 50}] * 10} for n in range(500)
    ]
    stored = append(client, conversation, *batch, key="large")
    assert [each["data"] for each in stored] == [each["data"] for each in batch]
    assert append(client, conversation, *batch, key="large") == stored
    batch[499] = batch[499] | {"content": "another"}
    response = client.post(
        f"/conversations/{conversation}/messages",
        json={"messages": batch},
        headers={"Idempotency-Key": "large"},
    )
    assert refused(response, 409)["type"].endswith("idempotency-conflict")
    assert whole_history(client, conversation) == stored


def test_a_large_batch_of_items_is_stored_and_repeated(client: httpx.Client, conversation: str) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "x" * 500}]} for _ in range(300)]
    path, key = f"/v1/conversations/{conversation}/items", {"Idempotency-Key": "k"}
    first = client.post(path, json={"items": items}, headers=key)
    assert first.status_code == 200, first.text[:500]
    again = client.post(path, json={"items": items}, headers=key)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"


# -- who waits -----------------------------------------------------------------------------------------


BODIES = {
    "deep": lambda: b"[" * 32 * MIB,
    "values": lambda: b'{"role":"user","content":[' + b",".join([b"{}"] * 1_000_000) + b"]}",
    "faults": lambda: json.dumps(
        {"messages": [bad_message(n) | {"x": "x" * 20_000} for n in range(1_000)]}
    ).encode(),
    "keys": ("{" + keys(600_000, '"messages":[{"role":"user"}]') + "}").encode,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_health_is_answered_while_a_large_body_is_refused(
    service: Service, conversation: str, body: Callable[[], bytes]
) -> None:
    content = body()

    def send() -> None:
        with service.client() as sending:
            post(sending, f"/conversations/{conversation}/messages", content)

    assert health_checks_while(service, send) > 5


@pytest.mark.parametrize("field", ["content", "tool_calls"])
def test_health_is_answered_while_a_message_of_many_parts_is_read_as_items(
    service: Service, conversation: str, field: str
) -> None:
    def read(path: str) -> None:
        with service.client() as reading:
            reading.get(path).raise_for_status()

    with service.client() as client:
        (stored,) = append(client, conversation, {"role": "assistant", field: [0] * 200_000})
    items = f"/v1/conversations/{conversation}/items"
    for path in (f"{items}?limit=1", f"{items}/{stored['id']}"):
        assert health_checks_while(service, partial(read, path)) > 5


def health_checks_while(service: Service, work: Callable[[], None]) -> int:
    """How many health checks were answered, one after the other, while the work was done in a thread."""
    answered = 0
    with service.client() as asking, ThreadPoolExecutor(1) as beside:
        asking.get("/health/live")
        done = beside.submit(work)
        while not done.done():
            asking.get("/health/live").raise_for_status()
            answered += 1
        done.result()
    return answered


async def test_large_work_is_done_one_at_a_time_beside_the_loop() -> None:

    names, running, most = set(), 0, 0

    def work() -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        names.add(threading.current_thread().name)
        for _ in range(1_000):
            pass
        assert not gc.isenabled()
        running -= 1
        return 7

    assert await asyncio.gather(*(strict_json.beside(MIB, work) for _ in range(20))) == [7] * 20
    assert most == 1
    assert len(names) == 1
    assert threading.current_thread().name not in names
    assert gc.isenabled()

    def fails() -> None:
        large = ["x"] * 1_000
        raise InvalidRequest(f"{len(large)}")

    with pytest.raises(InvalidRequest, match="1000") as caught:
        await strict_json.beside(MIB, fails)
    frames = []
    trace = caught.value.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "fails" not in frames  # or what it holds would live on
    assert await strict_json.beside(10, threading.current_thread) is threading.current_thread()


def test_a_body_in_chunks_of_one_byte_is_gathered_in_place() -> None:

    class Cycle:
        body: bytes | bytearray = b""
        message_event = threading.Event()
        response_complete = False

    class Parser:
        def should_upgrade(self) -> bool:
            return False

    class Flow:
        def pause_reading(self) -> None: ...

    protocol = TimeoutHttpProtocol.__new__(TimeoutHttpProtocol)
    protocol.cycle = Cycle()  # type: ignore[assignment]
    protocol.parser = Parser()  # type: ignore[assignment]
    protocol.flow = Flow()  # type: ignore[assignment]
    gathered = set()
    for _ in range(1_000):
        protocol.on_body(b"x")
        gathered.add(id(protocol.cycle.body))
    assert bytes(protocol.cycle.body) == b"x" * 1_000
    assert len(gathered) <= 3


def test_a_message_in_chunks_of_one_byte_is_read_whole(service: Service, conversation: str) -> None:
    body = json.dumps({"role": "user", "content": "é" * 40_000}, ensure_ascii=False).encode()
    head = (
        f"POST /conversations/{conversation}/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with socket.create_connection(("127.0.0.1", service.port), 60) as raw:
        raw.sendall(head.encode() + chunks + b"0\r\n\r\n")
        answer = b""
        while piece := raw.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 201")
    with service.client() as client:
        (stored,) = history(client, conversation)["data"]
    assert stored["content"] == "é" * 40_000


# -- wrong statuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "time", ["9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999Z", "0001-01-01T00:00:00Z"]
)
def test_a_time_at_the_end_of_time_bounds_a_history(
    client: httpx.Client, conversation: str, time: str
) -> None:
    append(client, conversation, {"role": "user"}, {"role": "user"})
    last = time.startswith("9999")
    assert len(history(client, conversation, until=time)["data"]) == (2 if last else 0)
    assert len(history(client, conversation, since=time)["data"]) == (0 if last else 2)
    lines = client.get(
        f"/conversations/{conversation}/messages?until={time}", headers={"accept": "application/x-ndjson"}
    )
    assert lines.status_code == 200
    assert len(lines.text.splitlines()) == (2 if last else 0)


@pytest.mark.parametrize(
    "time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1e400", "Infinity", "9" * 400]
)
def test_a_time_beyond_the_ends_of_time_is_refused(
    client: httpx.Client, conversation: str, time: str
) -> None:
    for name in ("since", "until"):
        response = client.get(f"/conversations/{conversation}/messages", params={name: time})
        (fault,) = refused(response)["errors"]
        assert fault["path"] == f"query.{name}"
    body = {"user_id": "ada", "expires_at": time}
    assert refused(client.post("/conversations", json=body))["errors"][0]["path"] == "$.expires_at"
    changes = {"expires_at": time}
    response = client.patch(f"/conversations/{conversation}", json=changes)
    assert refused(response)["errors"][0]["path"] == "$.expires_at"


@pytest.mark.parametrize(
    "time",
    ["1969-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "1970-01-01T00:00:00+01:00", "2020-01-01T00:00:00Z"],
)
async def test_a_conversation_whose_time_is_past_expires(service: Service, time: str) -> None:

    settings = Settings(mongodb_url=service.database_url)
    database = Database(settings)
    with service.client() as client:
        conversation = new_id()
        body = {"user_id": "ada", "id": conversation, "expires_at": time}
        assert client.post("/conversations", json=body).status_code == 201
        await database.open()
        try:
            await expire(ConversationStore(database, settings))
        finally:
            await database.close()
        assert client.get(f"/conversations/{conversation}").status_code == 404


def cursor(text: str | bytes) -> str:
    raw = text if isinstance(text, bytes) else text.encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


FORGED = {
    "underscore": cursor("1_0:x"),
    "other digits": cursor("١٢:x"),
    "sign": cursor("+1:x"),
    "spaces": cursor(" 1 :x"),
    "leading zero": cursor("01:x"),
    "huge": cursor("9" * 300 + ":x"),
    "beyond the year 9999": cursor(f"{10**15}:x"),
    "far before": cursor(f"-{10**15}:x"),
    "no id": cursor("1:"),
    "no time": cursor(":x"),
    "control character": cursor("1:a\nb"),
    "NUL": cursor("1:a\0b"),
    "not UTF-8": cursor(b"1:\xff"),
    "padding": cursor("1:x") + "==",
    "spare bits": cursor("1:xy")[:-1] + "l",
    "empty": "",
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_a_cursor_that_the_service_did_not_write_is_refused(client: httpx.Client, forged: str) -> None:
    response = client.get("/conversations", params={"user_id": "ada", "cursor": forged})
    assert refused(response)["errors"][0]["path"] == "query.cursor"


def test_a_cursor_that_the_service_wrote_is_taken(client: httpx.Client) -> None:
    user = new_id("user")
    ids = {create(client, new_id(), user) for _ in range(5)}
    found, query = [], {"user_id": user, "limit": "2"}
    while True:
        page = client.get("/conversations", params=query).json()
        found += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        query["cursor"] = page["next"]
    assert set(found) == ids
    assert len(found) == 5


async def test_a_key_that_is_forgotten_while_it_is_looked_up_is_looked_up_again() -> None:
    class Forgetful(dict[str, Any]):
        """Holds each entry until the first question after it is over, as a cache does whose time ends."""

        def __contains__(self, key: object) -> bool:
            held = super().__contains__(key)
            self.pop(str(key), None)
            return held

    class Database:
        def deadline(self) -> Any:
            return contextlib.AsyncExitStack()

        async def read(self, *_: Any, **__: Any) -> list[bytes]:
            return []

    keys = keys_module.ApiKeys(Database(), Settings())  # type: ignore[arg-type]
    keys._known = Forgetful()  # type: ignore[assignment]
    for _ in range(3):
        assert await keys._look_up("a") is None
