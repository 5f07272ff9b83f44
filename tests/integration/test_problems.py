"""Bad input: each answered with a problem document that names the place, and nothing stored."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Service, append, new_id, running, whole_history

HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
JSON = {"content-type": "application/json"}


def problem(response: httpx.Response, status: int, kind: str) -> Any:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) - {"errors"} == {"type", "title", "status", "detail"}
    assert body["status"] == status
    assert body["type"] == f"urn:chat-history:problem:{kind}"
    assert body["title"]
    return body


def post(client: httpx.Client, conversation: str, content: bytes, **headers: str) -> httpx.Response:
    path = f"/conversations/{conversation}/messages"
    return client.post(path, content=content, headers=JSON | headers)


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "The body is not JSON at line 1, column 1: Expecting value."),
    (b"{", "line 1"),
    (b'{"role": "user"} x', "The body is not JSON at line 1, column 18: Extra data."),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    (b'{"role": "user", "content": "\xff"}', "not UTF-8 at byte 29"),
    ('{"role": "user"}'.encode("utf-16"), "not UTF-8"),
    (b'{"role": "user", "content": "\x00"}', "Invalid control character"),
    (b"{'role': 'user'}", "line 1, column 2"),
    (b'{"a": 01}', "line 1"),
]


@pytest.mark.parametrize(("body", "says"), MALFORMED)
def test_what_is_not_json_is_a_400_that_says_where(
    client: httpx.Client, conversation: str, body: bytes, says: str
) -> None:
    assert says in problem(post(client, conversation, body), 400, "malformed-body")["detail"]
    assert whole_history(client, conversation) == []


INVALID: list[tuple[Any, str]] = [
    ({}, "$.role"),
    ({"role": "robot"}, "$.role"),
    ({"role": None}, "$.role"),
    ({"role": "user", "content": 5}, "$.content"),
    ({"role": "user", "content": {"text": "x"}}, "$.content"),
    ({"role": "user", "name": 5}, "$.name"),
    ({"role": "tool", "tool_call_id": ["x"]}, "$.tool_call_id"),
    ({"role": "user", "metadata": "x"}, "$.metadata"),
    ({"role": "user", "seq": 4}, "$.seq"),
    ({"role": "user", "conversation_id": "x"}, "$.conversation_id"),
    ({"role": "user", "user_id": "x"}, "$.user_id"),
    ({"role": "user", "created_at": "2026-01-01T00:00:00Z"}, "$.created_at"),
    ({"role": "user", "_id": 1}, "$._id"),
    ({"role": "user", "id": "a\x7f"}, "$.id"),
    ({"role": "user", "id": ".."}, "$.id"),
    ({"role": "user", "id": ""}, "$.id"),
    ({"role": "user", "id": "x" * 1_501}, "$.id"),
    ({"role": "user", "id": 7}, "$.id"),
    ({"role": "user", "id": None}, "$.id"),
    ([], "$"),
    ("x", "$"),
    (None, "$"),
    ({"messages": []}, "$.messages"),
    ({"messages": {}}, "$.messages"),
    ({"messages": [{"role": "user"}] * 1001}, "$.messages"),
    ({"messages": [{"role": "user"}, 5]}, "$.messages[1]"),
    ({"messages": [{"role": "user"}, {"role": "x"}]}, "$.messages[1].role"),
    ({"messages": [{"role": "user"}], "mode": "fast"}, "$.mode"),
]


@pytest.mark.parametrize(("body", "path"), INVALID)
def test_a_message_that_breaks_a_rule_is_a_422_that_names_the_place(
    client: httpx.Client, conversation: str, body: Any, path: str
) -> None:
    answer = problem(post(client, conversation, json.dumps(body).encode()), 422, "invalid-request")
    assert [each["path"] for each in answer["errors"]] == [path]
    assert whole_history(client, conversation) == []


def test_every_fault_of_a_batch_is_named_and_none_of_it_is_stored(
    client: httpx.Client, conversation: str
) -> None:
    batch = [{"role": "user"}, {"role": "x"}, {"role": "user", "seq": 1, "content": 2}]
    answer = problem(
        post(client, conversation, json.dumps({"messages": batch}).encode()), 422, "invalid-request"
    )
    places = [each["path"] for each in answer["errors"]]
    assert places == ["$.messages[1].role", "$.messages[2].seq", "$.messages[2].content"]
    assert whole_history(client, conversation) == []


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "$.user_id"),
        ({"user_id": ""}, "$.user_id"),
        ({"user_id": "a\n"}, "$.user_id"),
        ({"user_id": {"$ne": None}}, "$.user_id"),
        ({"user_id": "ada", "id": "."}, "$.id"),
        ({"user_id": "ada", "title": 5}, "$.title"),
        ({"user_id": "ada", "title": "x" * 1001}, "$.title"),
        ({"user_id": "ada", "metadata": []}, "$.metadata"),
        ({"user_id": "ada", "metdata": {}}, "$.metdata"),
        ({"user_id": "ada", "metadata": {"a\0b": 1}}, '$.metadata["a\\u0000b"]'),
        ([], "$"),
    ],
)
def test_a_conversation_that_breaks_a_rule_is_a_422(client: httpx.Client, body: Any, path: str) -> None:
    answer = problem(client.post("/conversations", json=body), 422, "invalid-request")
    assert [each["path"] for each in answer["errors"]] == [path]


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("limit=0", "query.limit"),
        ("limit=1001", "query.limit"),
        ("limit=-1", "query.limit"),
        ("limit=1_0", "query.limit"),
        ("limit=%D9%A3", "query.limit"),
        ("limit=ten", "query.limit"),
        ("after=-1", "query.after"),
        ("after=9223372036854775808", "query.after"),
        ("before=1e3", "query.before"),
        ("last=0", "query.last"),
        ("last=1001", "query.last"),
        ("last=5&limit=5", "query.last"),
        ("last=5&order=desc", "query.last"),
        ("order=up", "query.order"),
        ("role=robot", "query.role"),
        ("since=yesterday", "query.since"),
        ("since=2026-01-01T00:00:00", "query.since"),
        ("since=1767225600", "query.since"),
        ("until=0.5", "query.until"),
        ("user_id=a%0Ab", "query.user_id"),
        ("user_id=", "query.user_id"),
        ("user_id[$ne]=ada", "query.user_id[$ne]"),
        ("$where=1", "query.$where"),
        ("limit=1&limit=2", "query.limit"),
        (f"user_id={'x' * 10_000}", "query.user_id"),
    ],
)
def test_a_query_that_breaks_a_rule_is_a_422(
    client: httpx.Client, conversation: str, query: str, path: str
) -> None:
    answer = problem(client.get(f"/conversations/{conversation}/messages?{query}"), 422, "invalid-request")
    assert [each["path"] for each in answer["errors"]] == [path]


@pytest.mark.parametrize(
    ("word", "status"),
    [
        *((each, 404) for each in ("a b", "x" * 1_500, "é", "$where", "a%2Fb", "a%5cb", "%2e%2e%2e", "a+b")),
        *((each, 422) for each in ("x" * 1_501, "%00", "%7F", "%C2%80", "%2e%2e", "%2E", "a%0a")),
    ],
)
def test_an_id_of_the_wrong_form_is_a_422_and_another_finds_nothing(
    client: httpx.Client, word: str, status: int
) -> None:
    response = client.get(f"/conversations/{word}")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get(f"/v1/conversations/{word}").status_code == 404


@pytest.mark.parametrize("wrong", ["100%", "%zz", "%FF", "%C3", "%ED%A0%80", "a%2", "%C0%AF"])
def test_what_is_not_percent_encoded_utf_8_is_a_400(service: Service, wrong: str) -> None:
    """Else it would name the id with a replacement character, or the one with a percent sign."""
    with contextlib.closing(HTTPConnection("127.0.0.1", service.port, timeout=60)) as http:
        for path in ("/conversations/", "/conversations/c?user_id=", "/health/live?", "/v1/conversations/"):
            http.request("GET", path + wrong)  # as it is: httpx would encode it
            answer = http.getresponse()
            body = json.loads(answer.read())
            assert answer.status == 400, path
            kind = body["error"]["code"] if path.startswith("/v1") else body["type"]
            assert kind in {"malformed_url", "urn:chat-history:problem:malformed-url"}, body


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_another_form_of_body_is_a_415(
    client: httpx.Client, conversation: str, headers: dict[str, str]
) -> None:
    content = b'{"role": "user"}'
    if "content-encoding" in headers:
        content = gzip.compress(content)
    response = client.post(f"/conversations/{conversation}/messages", content=content, headers=headers)
    problem(response, 415, "unsupported-body")


def test_charset_utf_8_is_json_too(client: httpx.Client, conversation: str) -> None:
    headers = {"content-type": 'application/json; charset="UTF-8"'}
    response = client.post(
        f"/conversations/{conversation}/messages", content=b'{"role": "user"}', headers=headers
    )
    assert response.status_code == 201


def test_a_body_just_under_the_limit_is_taken_and_just_over_it_is_a_413(tmp_path: Path) -> None:
    with running(tmp_path, body_bytes_max=2_000) as service, service.client() as client:
        client.post("/conversations", json={"user_id": "ada", "id": "c"})
        frame = len(json.dumps({"role": "user", "content": ""}))

        def sized(size: int) -> bytes:
            return json.dumps({"role": "user", "content": "x" * (size - frame)}).encode()

        assert post(client, "c", sized(2_000)).status_code == 201
        problem(post(client, "c", sized(2_001)), 413, "body-too-large")

        def chunks() -> Any:
            yield from (b"x" * 500 for _ in range(10))

        # Without a length that is announced, too.
        response = client.post("/conversations/c/messages", content=chunks(), headers=JSON)
        problem(response, 413, "body-too-large")
        assert len(whole_history(client, "c")) == 1


def test_a_body_of_50_mb_is_refused_without_being_read(client: httpx.Client, conversation: str) -> None:
    address = (client.base_url.host, client.base_url.port or 0)
    head = f"POST /conversations/{conversation}/messages HTTP/1.1\r\n{HEAD}"
    with socket.create_connection(address, 10) as raw:
        raw.sendall(f"{head}Content-Length: 52428800\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_takes_too_long_is_a_408(tmp_path: Path) -> None:
    with running(tmp_path, body_timeout_ms=300) as service:
        head = f"POST /conversations HTTP/1.1\r\n{HEAD}Content-Length: 40\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", service.port), 10) as raw:
            raw.sendall(head + b'{"user')
            answer = b""
            while b"}" not in answer:  # head and body may come apart
                answer += raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body-too-slow" in answer


def test_what_the_framework_answers_by_itself_is_a_problem_too(client: httpx.Client) -> None:
    detail = problem(client.get("/nowhere"), 404, "not-found")["detail"]
    assert detail == "This service has no such path. `/openapi.json` has every path."
    response = client.put("/conversations")
    assert "`Allow`" in problem(response, 405, "method-not-allowed")["detail"]
    assert set(response.headers["allow"].split(", ")) <= {"GET", "POST"}
    problem(client.get("/conversations/"), 404, "not-found")


def test_a_missing_conversation_is_a_404_everywhere(client: httpx.Client) -> None:
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/messages"), ("DELETE", "/messages/m")]:
        problem(client.request(method, f"/conversations/{new_id()}{path}"), 404, "conversation-not-found")


def test_every_response_carries_a_request_id_and_takes_a_callers(client: httpx.Client) -> None:
    for path in ("/health/live", "/nowhere", "/openapi.json"):
        assert client.get(path).headers["x-request-id"].startswith("req_")
        assert client.get(path, headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    forged = client.get("/health/live", headers={"x-request-id": "a b" + "x" * 200})
    assert forged.headers["x-request-id"].startswith("req_")


def test_openapi_lists_every_answer_that_a_call_can_give(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) >= 11
    bodiless = {"/conversations/{conversation_id}/pop"}
    for path, methods in paths.items():
        openai = path.startswith("/v1/")
        refused = "application/json" if openai else "application/problem+json"
        for method, operation in methods.items():
            answers = operation["responses"]
            always = {"401", "403", "429", "500", "503"} | ({"400"} if openai else {"422"})
            assert always <= set(answers), (method, path)
            assert ("404" in answers) is ("{" in path or (openai and method == "get"))
            has_body = method in {"post", "patch", "put"} and path not in bodiless
            assert ({"400", "408", "413", "415"} <= set(answers)) is has_body, (method, path)
            for status, answer in answers.items():
                kinds = set(answer.get("content", {}))
                assert kinds == ({refused} if status[0] in "45" else kinds), (method, path)
                assert "application/problem+json" not in kinds or status[0] in "45"


@pytest.mark.embedded_engine("it reads the engine's log")
def test_content_never_reaches_a_log_line(tmp_path: Path) -> None:
    secret = "s3cr3t-c0ntent"
    with running(tmp_path, log_level="debug") as service, service.client() as client:
        client.post(
            "/conversations", json={"user_id": "ada", "id": "c", "title": secret, "metadata": {"k": secret}}
        )
        append(client, "c", {"role": "user", "content": secret, secret: secret})
        post(client, "c", json.dumps({"role": secret, secret: 1}).encode())
        post(client, "c", f'{{"{secret}": 1, "{secret}": 2}}'.encode())
        post(client, "c", f'{{"role": "{secret}'.encode())
        client.get(f"/conversations?user_id={secret} {secret}")
        client.get(f"/{secret}")
        whole_history(client, "c")
        service.stop()
        output = service.output() + (service.data / "engine.log").read_text()
    assert secret not in output
    lines = [json.loads(each) for each in output.splitlines() if each.startswith("{")]
    requests = [each for each in lines if each.get("event") == "request" and each["route"] != "/health/ready"]
    assert len(requests) == 8
    assert set(requests[1]) >= {
        "method",
        "route",
        "status",
        "ms",
        "request_id",
        "conversation_id",
        "timestamp",
    }
    assert requests[1]["route"] == "/conversations/{conversation_id}/messages"
    assert (requests[1]["status"], requests[1]["conversation_id"]) == (201, "c")


def test_health_says_what_it_knows(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}
