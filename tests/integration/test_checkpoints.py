"""Checkpoints over HTTP: where they may stand, what removes them, and how they go with a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import MongoClient
from pymongo.database import Database as MongoDatabase

from service.settings import CHECKPOINTS_MAX
from tests.harness import Service, append, command, create, history, new_id, new_key, running

Json = dict[str, Any]


@pytest.fixture
def operator(service: Service) -> Iterator[MongoDatabase[Json]]:
    with MongoClient[Json](service.database_url) as client:
        yield client.get_default_database()


def talk(client: httpx.Client, turns: int = 4, *, user: str = "ada") -> str:
    """A conversation of turns of two messages each: seq 2, 4 … end a turn."""
    conversation = create(client, new_id(), user)
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": f"m{n + 1}"} for n in range(2 * turns)]
    for first in range(0, 2 * turns, 1_000):
        append(client, conversation, *messages[first : first + 1_000])
    return conversation


def post(client: httpx.Client, conversation: str, upto_seq: int, summary: str = "s", **more: Any) -> Any:
    body = {"upto_seq": upto_seq, "summary": summary, **more}
    return client.post(f"/conversations/{conversation}/checkpoints", json=body)


def listed(client: httpx.Client, conversation: str) -> list[int]:
    answer = client.get(f"/conversations/{conversation}/checkpoints")
    assert answer.status_code == 200, answer.text
    return [each["upto_seq"] for each in answer.json()["data"]]


def context(client: httpx.Client, conversation: str, **query: Any) -> Any:
    answer = client.get(f"/conversations/{conversation}/context", params={"max_messages": 100, **query})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_checkpoint_stands_for_what_it_tells_of(client: httpx.Client) -> None:
    conversation = talk(client)
    stored = post(client, conversation, 4, "They greeted.", metadata={"$ref": "x", "$id": 1, "a": 2})
    assert stored.status_code == 201
    checkpoint = stored.json()
    assert list(checkpoint["metadata"]) == ["$ref", "$id", "a"]
    assert client.get(f"/conversations/{conversation}/checkpoints").json() == {"data": [checkpoint]}
    made = context(client, conversation)
    assert made["checkpoint"] == checkpoint
    assert made["messages"][0]["role"] == "user"
    assert made["messages"][0]["content"].endswith("They greeted.")
    assert [each["seq"] for each in made["messages"][1:]] == [5, 6, 7, 8]
    assert made["left_out"]["messages"] == 4
    assert [each["content"] for each in history(client, conversation)["data"]] == [
        f"m{n}" for n in range(1, 9)
    ]
    assert client.get(f"/conversations/{conversation}").json()["version"] == made["version"] == 1


def test_a_checkpoint_stands_at_the_end_of_a_turn(client: httpx.Client) -> None:
    conversation = talk(client, 2)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    append(client, conversation, {"role": "user"}, {"role": "assistant", "tool_calls": [call]})
    for seq in (1, 3, 5, 6, 7, 10**9):
        answer = post(client, conversation, seq)
        assert answer.status_code == 422, seq
        assert answer.json()["errors"][0]["path"] == "$.upto_seq"
    append(client, conversation, {"role": "tool", "tool_call_id": "c1", "content": "r"})
    assert post(client, conversation, 7).status_code == 422  # the model has not answered yet
    append(client, conversation, {"role": "assistant", "content": "done"})
    assert post(client, conversation, 8).status_code == 201
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c2", "content": "r"}]}
    asked = {"role": "assistant", "content": [{"type": "tool_use", "id": "c2", "name": "f", "input": {}}]}
    append(client, conversation, {"role": "user", "content": "x"}, asked, result)
    assert post(client, conversation, 10).status_code == 422  # no turn begins at a result
    assert listed(client, conversation) == [8]


def test_a_checkpoint_stands_behind_all_others_and_may_be_repeated(client: httpx.Client) -> None:
    conversation = talk(client)
    first = post(client, conversation, 4, "a", metadata={"n": 1})
    again = post(client, conversation, 4, "a", metadata={"n": 1})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    for seq, summary in ((4, "b"), (2, "a")):
        refused = post(client, conversation, seq, summary)
        assert refused.status_code == 409
        assert refused.json()["type"].endswith("checkpoint-not-forward")
        assert "seq 4" in refused.json()["detail"]
    assert post(client, conversation, 6).status_code == 201
    assert listed(client, conversation) == [6, 4]


def test_deleting_a_checkpoint_falls_back_to_the_one_before(client: httpx.Client) -> None:
    conversation = talk(client)
    for seq in (2, 4, 6):
        post(client, conversation, seq, f"up to {seq}")
    path = f"/conversations/{conversation}/checkpoints"
    for removed, left in (("cp_4", [6, 2]), ("cp_6", [2]), ("cp_2", [])):
        assert client.delete(f"{path}/{removed}").status_code == 204
        assert client.delete(f"{path}/{removed}").status_code == 404
        assert listed(client, conversation) == left
        made = context(client, conversation)
        assert (made["checkpoint"] or {}).get("upto_seq") == (left[0] if left else None)
    assert [each["seq"] for each in context(client, conversation)["messages"]] == list(range(1, 9))


CHANGES: list[tuple[str, Any, list[int]]] = [
    ("cut off behind", lambda http, path: http.delete(f"{path}/messages?after=6"), [6, 4, 2]),
    ("cut off within", lambda http, path: http.delete(f"{path}/messages?after=5"), [4, 2]),
    ("cut off further", lambda http, path: http.delete(f"{path}/messages?after=2"), [2]),
    ("cut off all", lambda http, path: http.delete(f"{path}/messages"), []),
    ("one behind", lambda http, path: _delete(http, path, 7), [6, 4, 2]),
    ("one that only the newest tells of", lambda http, path: _delete(http, path, 5), [4, 2]),
    ("one that two tell of", lambda http, path: _delete(http, path, 3), [2]),
    ("one that all tell of", lambda http, path: _delete(http, path, 1), []),
    ("two popped", lambda http, path: [http.post(f"{path}/pop") for _ in range(2)][-1], [6, 4, 2]),
    ("three popped", lambda http, path: [http.post(f"{path}/pop") for _ in range(3)][-1], [4, 2]),
    ("one replaced behind", lambda http, path: _replace(http, path, 7), [6, 4, 2]),
    ("one replaced", lambda http, path: _replace(http, path, 3), [2]),
    ("one replaced by itself", lambda http, path: _replace(http, path, 3, {}), [6, 4, 2]),
    ("the end made another", lambda http, path: _put_end(http, path, 4, {"content": "new"}), [4, 2]),
    ("the end made the same", lambda http, path: _put_end(http, path, 4, {}), [6, 4, 2]),
    ("the end made shorter", lambda http, path: http.put(f"{path}/messages?after=3", json=NOTHING), [2]),
]
NOTHING: Json = {"messages": []}


def _without_service_fields(found: Json) -> Json:
    own = {"conversation_id", "user_id", "seq", "created_at"}
    return {name: value for name, value in found.items() if name not in own}


def _replace(http: httpx.Client, path: str, seq: int, change: Json | None = None) -> httpx.Response:
    (found,) = http.get(f"{path}/messages", params={"after": seq - 1, "limit": 1}).json()["data"]
    body = _without_service_fields(found) | ({"content": "new"} if change is None else change)
    return http.put(f"{path}/messages/{found['id']}", json=body)


def _put_end(http: httpx.Client, path: str, after: int, change: Json) -> httpx.Response:
    """Make the end of the history one in which the first message is changed, and one more stands behind."""
    found = http.get(f"{path}/messages", params={"after": after}).json()["data"]
    first, *rest = map(_without_service_fields, found)
    more = {"id": "more", "role": "user"}
    return http.put(f"{path}/messages?after={after}", json={"messages": [first | change, *rest, more]})


def _delete(http: httpx.Client, path: str, seq: int) -> httpx.Response:
    (found,) = http.get(f"{path}/messages", params={"after": seq - 1, "limit": 1}).json()["data"]
    return http.delete(f"{path}/messages/{found['id']}")


@pytest.mark.parametrize(("what", "change", "left"), CHANGES, ids=[each[0] for each in CHANGES])
def test_a_checkpoint_goes_with_a_message_that_it_tells_of(
    client: httpx.Client, what: str, change: Any, left: list[int]
) -> None:
    conversation = talk(client)
    for seq in (2, 4, 6):
        post(client, conversation, seq)
    assert change(client, f"/conversations/{conversation}").status_code in {200, 204}, what
    assert listed(client, conversation) == left
    assert (context(client, conversation)["checkpoint"] or {}).get("upto_seq") == (left[0] if left else None)


def test_a_long_cut_off_takes_the_checkpoints_along_batch_by_batch(client: httpx.Client) -> None:
    conversation = talk(client, 700)
    for seq in (100, 1_300):
        post(client, conversation, seq)
    assert client.delete(f"/conversations/{conversation}/messages?after=200").status_code == 204
    assert listed(client, conversation) == [100]


@pytest.mark.parametrize("turns", [3, 700], ids=["at once", "in batches"])
def test_checkpoints_go_with_their_conversation(
    client: httpx.Client, operator: MongoDatabase[Json], turns: int
) -> None:
    conversation = talk(client, turns)
    for seq in (2, 4):
        post(client, conversation, seq)
    assert operator.checkpoints.count_documents({"conversation_id": conversation}) == 2
    assert client.delete(f"/conversations/{conversation}").status_code == 204
    assert operator.checkpoints.count_documents({"conversation_id": conversation}) == 0
    create(client, conversation, "bob")
    assert listed(client, conversation) == []


def test_checkpoints_are_exported_erased_and_imported(
    service: Service, client: httpx.Client, operator: MongoDatabase[Json], tmp_path: Path
) -> None:
    user = new_id("user")
    conversation = talk(client, user=user)
    for seq in (2, 6):
        post(client, conversation, seq, f"up to {seq}", metadata={"$ref": "x", "$id": seq, "a": 2})
    before = client.get(f"/conversations/{conversation}/checkpoints").json()
    made = context(client, conversation, max_messages=3)
    exported = client.get(f"/users/{user}/export").text
    head = json.loads(exported.splitlines()[1])
    assert [each["upto_seq"] for each in head["checkpoints"]] == [2, 6]
    client.delete(f"/users/{user}").raise_for_status()
    assert operator.checkpoints.count_documents({"conversation_id": conversation}) == 0
    file = tmp_path / "export.ndjson"
    file.write_text(exported)
    for _ in range(2):  # the second time all of it is stored already
        done = command(service, "import", str(file))
        assert done.returncode == 0, done.stderr
        assert client.get(f"/conversations/{conversation}/checkpoints").json() == before
        now = context(client, conversation, max_messages=3)
        assert now == {**made, "version": now["version"]}
    # Other tests share the database, and change theirs by hand.
    assert conversation not in command(service, "verify").stdout


def test_verify_names_and_repairs_a_counter_that_names_no_checkpoint(tmp_path: Path) -> None:
    with running(tmp_path) as service, service.client() as client:
        conversation, gone = talk(client), talk(client)
        for each in (conversation, gone):
            post(client, each, 4)
        with MongoClient[Json](service.database_url) as mongo:
            database = mongo.get_default_database()
            database.conversations.update_one({"_id": conversation}, {"$set": {"checkpoint_seq": 0}})
            database.conversations.delete_one({"_id": gone})
            database.messages.delete_many({"conversation_id": gone})
            found = command(service, "verify")
            assert found.returncode != 0
            assert "checkpoint_seq is 0, and the newest checkpoint stands at seq 4" in found.stdout
            assert "there are checkpoints without this conversation" in found.stdout
            command(service, "verify", "--repair")
            database.checkpoints.delete_many({"conversation_id": gone})
        assert command(service, "verify").returncode == 0
        assert context(client, conversation)["checkpoint"]["upto_seq"] == 4


def test_a_key_that_may_only_write_gets_the_id_alone(tmp_path: Path) -> None:
    with running(tmp_path, auth="key") as service:
        both, writer = new_key(service, "read", "write"), new_key(service, "write")
        with service.client(headers={"Authorization": f"Bearer {both}"}) as client:
            conversation = talk(client)
        with service.client(headers={"Authorization": f"Bearer {writer}"}) as client:
            assert post(client, conversation, 4).json() == {"id": "cp_4"}
            assert client.get(f"/conversations/{conversation}/checkpoints").status_code == 403
            assert client.get(f"/conversations/{conversation}/context?max_turns=1").status_code == 403


def test_what_cannot_be_a_checkpoint_is_refused(client: httpx.Client) -> None:
    conversation = talk(client)
    for body in (
        {"upto_seq": 4},
        {"summary": "s"},
        {"upto_seq": 0, "summary": "s"},
        {"upto_seq": 4, "summary": ""},
        {"upto_seq": 4, "summary": "ä" * 40_000},
        {"upto_seq": 4, "summary": "\ud800"},
        {"upto_seq": 4, "summary": "s", "metadata": {"a": "x" * 9_000}},
        {"upto_seq": 4, "summary": "s", "other": 1},
    ):
        answer = client.post(
            f"/conversations/{conversation}/checkpoints",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 422, body
    assert listed(client, conversation) == []


def test_a_conversation_keeps_its_newest_checkpoints(client: httpx.Client) -> None:
    conversation = talk(client, CHECKPOINTS_MAX + 3)
    for turn in range(1, CHECKPOINTS_MAX + 3):
        assert post(client, conversation, 2 * turn).status_code == 201
    kept = listed(client, conversation)
    assert len(kept) == CHECKPOINTS_MAX
    assert kept[0] == 2 * (CHECKPOINTS_MAX + 2)
    assert kept[-1] == 6
