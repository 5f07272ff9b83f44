"""OpenAI's items in the native API: appended exactly as they are, read and taken with `as=items`."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.harness import append, new_id, sent, whole_history

CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'}
ITEMS: list[Any] = [
    {"role": "user", "content": "plain text"},
    {"content": [{"type": "input_text", "text": "part"}], "role": "user", "type": "message"},
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "t", "annotations": []}],
    },
    {"role": "critic", "content": None},
    {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "…"},
    {**CALL, "id": "fc_1"},
    {**CALL, "status": None},
    {**CALL, "call_id": 7},
    {"type": "function_call_output", "call_id": "c", "output": "done"},
    {"type": "function_call_output", "call_id": None, "output": [{"type": "input_text", "text": "x"}]},
    {"id": "rs_1", "type": "reasoning", "summary": []},
    {"id": 5, "type": "of_next_month", "anything": {"a.b": [1, None, {"$ref": 1}]}},
    {"id": None, "type": None, "role": "user"},
    {"neither": "type nor role", "seq": 3, "user_id": "x"},
    {},
]


def path(conversation: str, end: str = "messages") -> str:
    return f"/conversations/{conversation}/{end}"


def add(client: httpx.Client, conversation: str, items: list[Any], **headers: str) -> httpx.Response:
    return client.post(path(conversation), json={"items": items}, headers=headers)


def read(client: httpx.Client, conversation: str, **query: Any) -> Any:
    answer = client.get(path(conversation), params={"as": "items", **query})
    assert answer.status_code == 200, answer.text
    return answer.json()


def flat(messages: list[Any]) -> list[Any]:
    return [item for message in messages for item in message["items"]]


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}])
def test_items_come_back_exactly_as_they_were_given(
    client: httpx.Client, conversation: str, headers: dict[str, str]
) -> None:
    answer = add(client, conversation, ITEMS, **headers)
    assert answer.status_code == 201
    stored = answer.json()
    assert (stored["has_more"], stored["next"]) == (False, None)
    assert json.dumps([message["items"] for message in stored["data"]]) == json.dumps([[i] for i in ITEMS])
    page = read(client, conversation)
    assert page["data"] == stored["data"]
    assert [message["seq"] for message in page["data"]] == list(range(1, len(ITEMS) + 1))
    assert flat(read(client, conversation, last=3)["data"]) == ITEMS[-3:]
    newest_first = read(client, conversation, order="desc", limit=2)
    assert (flat(newest_first["data"]), newest_first["has_more"]) == (ITEMS[:-3:-1], True)
    lines = client.get(
        path(conversation), params={"as": "items"}, headers={"Accept": "application/x-ndjson"}
    ).text
    assert [json.loads(line) for line in lines.splitlines()] == page["data"]
    fifth = page["data"][4]
    assert client.get(path(conversation, f"messages/{fifth['id']}?as=items")).json() == fifth
    for item in reversed(ITEMS):
        taken = client.post(path(conversation, "pop?as=items")).json()
        assert taken["items"] == [item]
        assert taken["message"]["id"] == taken["id"]
    assert client.post(path(conversation, "pop?as=items")).status_code == 204


def test_items_are_native_messages_and_items_of_the_openai_api(
    client: httpx.Client, conversation: str
) -> None:
    add(client, conversation, [{"role": "user", "content": "hi"}, {**CALL, "id": "fc_1"}])
    said, called = whole_history(client, conversation)
    assert (said["role"], said["content"]) == ("user", "hi")
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    items = client.get(f"/v1/conversations/{conversation}/items?order=asc").json()["data"]
    assert [item["type"] for item in items] == ["message", "function_call"]


def test_what_was_appended_in_another_way_reads_as_what_a_model_takes(
    client: httpx.Client, conversation: str
) -> None:
    tool_call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    append(client, conversation, {"role": "assistant", "content": "ok", "tool_calls": [tool_call] * 2})
    given = {"id": "msg_mine", "role": "user", "content": "hi"}
    answer = client.post(f"/v1/conversations/{conversation}/items", json={"items": [given, CALL]})
    of_openai = answer.json()["data"]
    native, *others = read(client, conversation)["data"]
    assert [item["type"] for item in native["items"]] == ["message", "function_call", "function_call"]
    assert not any("id" in item for item in native["items"])
    assert flat(others) == of_openai


def test_a_message_that_was_taken_as_items_can_be_appended_again_as_it_was(
    client: httpx.Client, conversation: str
) -> None:
    tool_call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    (stored,) = append(client, conversation, {"role": "assistant", "tool_calls": [tool_call] * 2})
    taken = client.post(path(conversation, "pop?as=items")).json()["message"]
    assert taken == stored
    (again,) = append(client, conversation, {"id": taken["id"], **sent(taken)})
    assert again == {**stored, "seq": 2, "created_at": again["created_at"]}


def test_a_repeated_append_of_items_is_stored_once(client: httpx.Client, conversation: str) -> None:
    key = new_id("key")
    first = add(client, conversation, ITEMS, **{"Idempotency-Key": key})
    again = add(client, conversation, ITEMS, **{"Idempotency-Key": key})
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert again.json() == first.json()
    other = add(client, conversation, ITEMS[1:], **{"Idempotency-Key": key})
    assert other.status_code == 409
    assert len(read(client, conversation)["data"]) == len(ITEMS)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


REFUSED: list[tuple[Any, str]] = [
    ({"items": []}, "$.items"),
    ({"items": [{}] * 1_001}, "$.items"),
    ({"items": {}}, "$.items"),
    ({"items": None}, "$.items"),
    ({"items": [{}], "more": 1}, "$.more"),
    ({"items": [{}], "messages": [{"role": "user"}]}, "$.items"),
    ({"items": [{}, "text"]}, "$.items[1]"),
    ({"items": [{}, None]}, "$.items[1]"),
    ({"items": [{}, [{}]]}, "$.items[1]"),
    ({"items": [{"type": "message"}]}, "$.items[0].role"),
    ({"items": [{"role": None}]}, "$.items[0].role"),
    ({"items": [{"role": ["user"]}]}, "$.items[0].role"),
    ({"items": [{"role": "user", "content": {}}]}, "$.items[0].content"),
    ({"items": [{"type": "x", "a": {"b\0": 1}}]}, '$.items[0].a["b\\u0000"]'),
    ({"items": [{"type": "x", "a": 2**64}]}, "$.items[0].a"),
    ({"items": [{"type": "x", "a": nested(90)}]}, "$.items[0].a[0]"),
]


@pytest.mark.parametrize(("body", "place"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_is_no_item_is_refused_with_its_path_and_nothing_is_stored(
    client: httpx.Client, conversation: str, body: Any, place: str
) -> None:
    answer = client.post(path(conversation), json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["path"].startswith(place)
    assert read(client, conversation)["data"] == []


def test_items_as_deep_as_a_body_may_be_are_stored(client: httpx.Client, conversation: str) -> None:
    for levels in range(80, 100):
        item = {"type": "x", "a": nested(levels)}
        answer = add(client, conversation, [item])
        assert answer.status_code in {201, 422}
        if answer.status_code == 422:
            assert answer.json()["errors"][0]["path"].startswith("$.items[0].a[0]")
            assert levels > 80
            return
        assert answer.json()["data"][0]["items"] == [item]
    raise AssertionError("no depth was refused")


@pytest.mark.parametrize("query", ["as=", "as=item", "as=items&as=items", "view=items"])
def test_an_unknown_view_is_refused(client: httpx.Client, conversation: str, query: str) -> None:
    for answer in (
        client.get(path(conversation, f"messages?{query}")),
        client.get(path(conversation, f"messages/x?{query}")),
        client.post(path(conversation, f"pop?{query}")),
    ):
        assert answer.status_code == 422


def test_a_message_may_have_a_field_that_is_called_items(client: httpx.Client, conversation: str) -> None:
    answer = client.post(path(conversation), json={"role": "user", "items": [1]})
    assert answer.status_code == 201
    assert answer.json()["items"] == [1]
    assert "items" not in read(client, conversation)["data"][0]["items"][0]
