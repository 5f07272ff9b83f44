"""Conversations: get or create, read, change, delete, list."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pymongo import MongoClient

from tests.harness import Service, append, create, new_id, whole_history


def test_creating_answers_201_with_location_and_again_200_with_the_same(client: httpx.Client) -> None:
    wanted = {"id": new_id(), "user_id": "ada", "title": "Tides", "metadata": {"b": 1, "a": {"x.y": None}}}
    first = client.post("/conversations", json=wanted)
    assert first.status_code == 201
    assert first.headers["location"] == f"/conversations/{wanted['id']}"
    assert wanted.items() <= first.json().items()
    assert list(first.json()["metadata"]) == ["b", "a"]
    again = client.post("/conversations", json=wanted | {"title": "Another title"})
    assert again.status_code == 200
    assert again.json() == first.json()
    assert client.get(first.headers["location"]).json() == first.json()


def test_without_an_id_each_creation_is_a_new_conversation(client: httpx.Client) -> None:
    assert create(client).startswith("conv_")
    assert create(client) != create(client)


def test_an_id_that_somebody_else_has_is_a_conflict(client: httpx.Client) -> None:
    conversation = create(client, new_id(), user="ada")
    response = client.post("/conversations", json={"id": conversation, "user_id": "bob"})
    assert response.status_code == 409
    assert response.json()["type"].endswith("conversation-id-taken")
    assert client.get(f"/conversations/{conversation}").json()["user_id"] == "ada"


def test_a_patch_changes_what_it_names_and_nothing_else(client: httpx.Client) -> None:
    before = client.post(
        "/conversations", json={"user_id": "ada", "title": "One", "metadata": {"k": 1}}
    ).json()
    path = f"/conversations/{before['id']}"
    renamed = client.patch(path, json={"title": "Two"}).json()
    assert (renamed["title"], renamed["metadata"]) == ("Two", {"k": 1})
    assert renamed["updated_at"] >= before["updated_at"]
    assert client.patch(path, json={"metadata": {"z": 1, "a": 2}}).json()["metadata"] == {"z": 1, "a": 2}
    cleared = client.patch(path, json={"title": None, "metadata": None}).json()
    assert (cleared["title"], cleared["metadata"]) == (None, {})
    assert client.patch(path, json={}).json() == cleared
    assert client.get(path).json() == cleared


def test_a_conversation_that_is_not_yours_looks_like_none_at_all(
    client: httpx.Client, conversation: str
) -> None:
    message = append(client, conversation, {"role": "user", "content": "private"})[0]
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "", {}),
        ("PATCH", "", {"json": {"title": "mine"}}),
        ("GET", "/messages", {}),
        ("GET", "/messages", {"headers": {"accept": "application/x-ndjson"}}),
        ("POST", "/messages", {"json": {"role": "user", "content": "x"}}),
        ("POST", "/checkpoints", {"json": {"upto_seq": 1, "summary": "private"}}),
        ("GET", "/checkpoints", {}),
        ("GET", "/context?max_turns=5", {}),
        ("DELETE", "/checkpoints/cp_1", {}),
        ("GET", f"/messages/{message['id']}", {}),
        ("POST", "/pop", {}),
        ("DELETE", f"/messages/{message['id']}", {}),
        ("DELETE", "/messages", {}),
        ("DELETE", "", {}),
    ]
    for method, path, options in calls:
        owner = f"{'&' if '?' in path else '?'}user_id=bob"
        theirs = client.request(method, f"/conversations/{conversation}{path}{owner}", **options)
        none = client.request(method, f"/conversations/none{path}{owner}", **options)
        assert theirs.status_code == none.status_code == 404, (method, path)
        assert theirs.json() | {"detail": ""} == none.json() | {"detail": ""}
        assert theirs.text.replace(conversation, "none") == none.text
    assert whole_history(client, conversation) == [message]
    for method, path, options in calls:
        owner = f"{'&' if '?' in path else '?'}user_id=ada"
        mine = client.request(method, f"/conversations/{conversation}{path}{owner}", **options)
        assert mine.status_code in {200, 201, 204} or "messages/msg_" in path, (method, path, mine.text)


def test_deleting_takes_all_messages_and_frees_the_id(client: httpx.Client, service: Service) -> None:
    conversation = create(client, new_id())
    append(client, conversation, *({"role": "user", "content": str(n)} for n in range(20)))
    assert client.delete(f"/conversations/{conversation}").status_code == 204
    assert client.get(f"/conversations/{conversation}").status_code == 404
    assert client.delete(f"/conversations/{conversation}").status_code == 404
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        messages = operator.get_default_database().messages
        assert messages.count_documents({"conversation_id": conversation}) == 0
    assert create(client, conversation, user="bob") == conversation
    assert append(client, conversation, {"role": "user", "content": "new"})[0]["seq"] == 1


def test_a_long_conversation_is_deleted_in_batches(client: httpx.Client, service: Service) -> None:
    conversation = create(client, new_id(), user=(user := new_id("user")))
    for _ in range(3):
        append(client, conversation, *({"role": "user", "content": "x"} for _ in range(700)))
    assert client.delete(f"/conversations/{conversation}").status_code == 204
    assert client.get("/conversations", params={"user_id": user}).json()["data"] == []
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        database = operator.get_default_database()
        assert database.messages.count_documents({"conversation_id": conversation}) == 0
        assert database.conversations.find_one({"_id": conversation}) is None


def test_an_interrupted_deletion_is_taken_up_when_its_id_is_used_again(
    client: httpx.Client, service: Service
) -> None:
    conversation = create(client, new_id())
    append(client, conversation, *({"role": "user", "content": "old"} for _ in range(5)))
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        # What a crash after the first step of a long deletion leaves behind.
        operator.get_default_database().conversations.update_one(
            {"_id": conversation}, {"$set": {"user_id": ""}}
        )
    path = f"/conversations/{conversation}"
    assert client.get(path).status_code == client.delete(path).status_code == 404
    assert client.post(path + "/messages", json={"role": "user", "content": "x"}).status_code == 404
    assert create(client, conversation) == conversation
    assert whole_history(client, conversation) == []


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_the_list_pages_through_everything_once_in_order(client: httpx.Client, limit: int) -> None:
    user = new_id("user")
    made = [create(client, user=user) for _ in range(7)]
    append(client, made[2], {"role": "user", "content": "latest"})
    expected = [made[2], *(each for each in reversed(made) if each != made[2])]
    found: list[str] = []
    query: dict[str, Any] = {"user_id": user, "limit": limit}
    while True:
        page = client.get("/conversations", params=query).json()
        assert 0 < len(page["data"]) <= limit
        found += [each["id"] for each in page["data"]]
        assert page["has_more"] is (len(found) < len(made))
        assert (page["next"] is not None) is page["has_more"]
        if not page["has_more"]:
            break
        query["cursor"] = page["next"]
    times = {each: client.get(f"/conversations/{each}").json()["active_at"] for each in made}
    # Those of one millisecond are ordered by their ids.
    assert found == sorted(sorted(found), key=lambda each: times[each], reverse=True)
    assert set(found) == set(expected)
    assert found[0] == made[2]


def test_only_messages_move_a_conversation_to_the_top_of_the_list(client: httpx.Client) -> None:
    user = new_id("user")
    older, newer = (create(client, user=user) for _ in range(2))
    append(client, older, *({"role": "user", "content": f"{n}"} for n in range(4)))
    append(client, newer, {"role": "user", "content": "newer"})
    before = client.get(f"/conversations/{older}").json()
    path = f"/conversations/{older}"
    assert before["version"] == 1
    for change in ({"title": "Renamed"}, {"metadata": {"pinned": True}}, {"expires_at": None}):
        assert client.patch(path, json=change).json()["version"] == 1
    assert client.delete(f"{path}/messages?after=3").status_code == 204
    assert client.post(f"{path}/pop").status_code == 200
    (first,) = client.get(f"{path}/messages", params={"limit": 1}).json()["data"]
    assert client.delete(f"{path}/messages/{first['id']}").status_code == 204
    after = client.get(path).json()
    assert after["active_at"] == before["active_at"] < after["updated_at"]
    assert after["version"] == 4
    listed = client.get("/conversations", params={"user_id": user}).json()["data"]
    assert [each["id"] for each in listed] == [newer, older]
    append(client, older, {"role": "user", "content": "latest"})
    listed = client.get("/conversations", params={"user_id": user}).json()["data"]
    assert [each["id"] for each in listed] == [older, newer]


def test_a_user_without_conversations_has_an_empty_list(client: httpx.Client) -> None:
    response = client.get("/conversations", params={"user_id": new_id("user")})
    assert response.json() == {"data": [], "has_more": False, "next": None}


def test_the_list_wants_a_cursor_of_its_own(client: httpx.Client) -> None:
    for cursor in ("!", "AAAA", "x" * 600, "OTk5OTk5OTk5OTk5OTk5OTk5OTk6eA", ""):
        response = client.get("/conversations", params={"user_id": "ada", "cursor": cursor})
        assert response.status_code == 422, cursor
        assert response.json()["errors"][0]["path"] == "query.cursor"
