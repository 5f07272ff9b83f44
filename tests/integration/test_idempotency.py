"""Exactly once: keys, ids of the caller's own, and what does not match them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.harness import append, create, new_id, whole_history


def post(client: httpx.Client, conversation: str, body: Any, key: str | None = None) -> httpx.Response:
    headers = {b"Idempotency-Key": key.encode()} if key is not None else {}
    return client.post(f"/conversations/{conversation}/messages", json=body, headers=headers)


ONE = {"role": "user", "content": "once", "extra": {"n": 1}}
TWO = {"messages": [ONE, {"role": "assistant", "content": None, "tool_calls": [1]}]}


@pytest.mark.parametrize("body", [ONE, TWO], ids=["message", "batch"])
def test_a_retried_append_returns_the_first_result(
    client: httpx.Client, conversation: str, body: Any
) -> None:
    first = post(client, conversation, body, "key-1")
    assert first.status_code == 201
    assert "idempotent-replayed" not in first.headers
    append(client, conversation, {"role": "user", "content": "something in between"})
    for _ in range(3):
        again = post(client, conversation, body, "key-1")
        assert again.status_code == 200
        assert again.headers["idempotent-replayed"] == "true"
        assert again.text == first.text
    assert len(whole_history(client, conversation)) == (2 if body is ONE else 3)


def test_message_ids_of_the_callers_own_make_an_append_repeatable(
    client: httpx.Client, conversation: str
) -> None:
    body = ONE | {"id": "m1"}
    first = post(client, conversation, body)
    assert first.status_code == 201
    assert first.json()["id"] == "m1"
    again = post(client, conversation, body)
    assert (again.status_code, again.text) == (200, first.text)
    assert client.get(f"/conversations/{conversation}/messages/m1").json() == first.json()


def test_a_batch_with_some_ids_is_repeatable_as_a_whole(client: httpx.Client, conversation: str) -> None:
    body = {"messages": [ONE, ONE | {"id": "m2"}, ONE]}
    first = post(client, conversation, body)
    assert first.status_code == 201
    again = post(client, conversation, body)
    assert (again.status_code, again.text) == (200, first.text)
    assert len(whole_history(client, conversation)) == 3


def test_the_same_key_or_id_may_be_used_in_another_conversation(client: httpx.Client) -> None:
    for _ in range(2):
        conversation = create(client, new_id())
        assert post(client, conversation, ONE, "shared").status_code == 201
        assert post(client, conversation, ONE | {"id": "shared"}).status_code == 201


OTHERS: list[Any] = [
    ONE | {"content": "twice"},
    ONE | {"extra": {"n": 1.0}},
    ONE | {"extra": {"n": True}},
    ONE | {"more": None},
    {"role": "user", "content": "once"},
    {"messages": [ONE, ONE]},
]


@pytest.mark.parametrize("other", OTHERS)
def test_the_same_key_with_another_payload_is_a_conflict_that_stores_nothing(
    client: httpx.Client, conversation: str, other: Any
) -> None:
    stored = post(client, conversation, ONE, "k").json()
    response = post(client, conversation, other, "k")
    assert response.status_code == 409
    assert response.json()["type"].endswith("idempotency-conflict")
    assert whole_history(client, conversation) == [stored]
    assert client.get(f"/conversations/{conversation}").json()["last_seq"] == 1


def test_the_same_id_with_another_payload_is_a_conflict(client: httpx.Client, conversation: str) -> None:
    post(client, conversation, ONE | {"id": "m"})
    for other in ({"role": "user", "id": "m"}, {"messages": [ONE, ONE | {"id": "m"}]}):
        assert post(client, conversation, other).status_code == 409
    assert len(whole_history(client, conversation)) == 1


def test_part_of_a_batch_or_more_than_it_is_not_the_same_request(
    client: httpx.Client, conversation: str
) -> None:
    assert post(client, conversation, TWO, "k").status_code == 201
    three = {"messages": [*TWO["messages"], ONE]}
    for other in ({"messages": TWO["messages"][:1]}, ONE, three, {"messages": TWO["messages"][::-1]}):
        assert post(client, conversation, other, "k").status_code == 409
    assert len(whole_history(client, conversation)) == 2


def test_the_order_of_an_objects_keys_is_no_other_payload(client: httpx.Client, conversation: str) -> None:
    first = post(client, conversation, {"role": "user", "content": [{"a": 1, "b": 2}]}, "k")
    again = post(client, conversation, {"content": [{"b": 2, "a": 1}], "role": "user"}, "k")
    assert (again.status_code, again.text) == (200, first.text)


def test_a_key_is_good_for_as_long_as_its_messages_exist(client: httpx.Client, conversation: str) -> None:
    first = post(client, conversation, ONE, "k").json()
    assert client.delete(f"/conversations/{conversation}/messages/{first['id']}").status_code == 204
    again = post(client, conversation, ONE, "k")
    assert again.status_code == 201
    assert again.json()["seq"] == 2


def test_a_key_whose_batch_was_deleted_in_part_is_a_conflict(client: httpx.Client, conversation: str) -> None:
    stored = post(client, conversation, TWO, "k").json()["data"]
    client.delete(f"/conversations/{conversation}/messages/{stored[0]['id']}")
    assert post(client, conversation, TWO, "k").status_code == 409
    assert whole_history(client, conversation) == stored[1:]


def test_ids_and_a_key_together_are_refused(client: httpx.Client, conversation: str) -> None:
    response = post(client, conversation, ONE | {"id": "m"}, "k")
    assert response.status_code == 422
    assert response.json()["errors"][0]["path"] == "$.id"


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "é"])
def test_a_key_is_1_to_255_visible_characters(client: httpx.Client, conversation: str, key: str) -> None:
    response = post(client, conversation, ONE, key)
    assert response.status_code == 422
    assert response.json()["errors"][0]["path"] == "header.Idempotency-Key"
    assert post(client, conversation, ONE, "x" * 255).status_code == 201


def test_an_id_twice_in_a_batch_is_refused(client: httpx.Client, conversation: str) -> None:
    response = post(client, conversation, {"messages": [ONE | {"id": "m"}, ONE, ONE | {"id": "m"}]})
    assert response.status_code == 422
    assert response.json()["errors"] == [
        {"path": "$.messages[2].id", "message": "stands twice in this batch"}
    ]


def test_a_replay_finds_no_conversation_that_is_not_yours(client: httpx.Client, conversation: str) -> None:
    post(client, conversation, ONE, "k")
    path = f"/conversations/{conversation}/messages?user_id=bob"
    assert client.post(path, json=ONE, headers={"Idempotency-Key": "k"}).status_code == 404
