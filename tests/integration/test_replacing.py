"""Replacing a message, replacing a history by a list, and appending to a conversation that is created."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pymongo import MongoClient

from tests.harness import (
    Service,
    append,
    command,
    contents,
    create,
    new_id,
    sent,
    whole_history,
)

PROBLEM = "urn:chat-history:problem:"


def said(name: str, text: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": name, "role": "user", "content": name if text is None else text, **more}


def put(client: httpx.Client, conversation: str, *messages: Any, **query: Any) -> httpx.Response:
    path = f"/conversations/{conversation}/messages"
    return client.put(path, json={"messages": list(messages)}, params=query)


def replace(client: httpx.Client, conversation: str, name: str, message: Any, **query: Any) -> httpx.Response:
    return client.put(f"/conversations/{conversation}/messages/{name}", json=message, params=query)


def about(client: httpx.Client, conversation: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/conversations/{conversation}").json()
    return found


def named(messages: list[Any]) -> list[tuple[int, str, str]]:
    return [(each["seq"], each["id"], each["content"]) for each in messages]


# -- one message -----------------------------------------------------------------------------------------


def test_a_message_is_replaced_in_its_place(client: httpx.Client, conversation: str) -> None:
    before = append(client, conversation, said("a"), said("b", more={"z": 1, "a": 2}), said("c"))
    known = about(client, conversation)
    new = {"role": "assistant", "z": [1.0, 1], "content": None, "a": {"$ref": "x", "$id": 1, "b": None}}
    answer = replace(client, conversation, "b", new)
    assert answer.status_code == 200, answer.text
    replaced = answer.json()
    service_fields = ("id", "conversation_id", "user_id", "seq", "created_at")
    assert {name: replaced[name] for name in service_fields} == {
        name: before[1][name] for name in service_fields
    }
    assert json.dumps(sent(replaced)) == json.dumps(new)
    assert list(replaced)[:7] == [*service_fields, "revision", "updated_at"]
    assert replaced["revision"] == 1
    assert replaced["updated_at"] >= known["updated_at"]
    assert whole_history(client, conversation) == [before[0], replaced, before[2]]
    now = about(client, conversation)
    assert (now["version"], now["last_seq"], now["message_count"]) == (2, 3, 3)
    assert now["active_at"] == known["active_at"]
    again = replace(client, conversation, "b", said("b"))
    assert again.json()["revision"] == 2


def test_a_repetition_of_a_replacement_changes_nothing(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, said("a"))
    first = replace(client, conversation, "a", said("a", "new"))
    known = about(client, conversation)
    assert replace(client, conversation, "a", said("a", "new")).json() == first.json()
    stale = client.put(
        f"/conversations/{conversation}/messages/a", json=said("a", "new"), headers={"If-Match": '"1"'}
    )
    assert (stale.status_code, stale.json()) == (200, first.json())
    assert about(client, conversation) == known
    # Another order of keys is another text, and so is another kind of number.
    for other in ({"content": "new", "role": "user"}, {"content": "new", "role": "user", "n": 1}):
        assert replace(client, conversation, "a", other).json()["revision"] > first.json()["revision"]
    assert (
        replace(client, conversation, "a", {"content": "new", "role": "user", "n": 1.0}).json()["revision"]
        == 4
    )


def test_a_missing_message_is_appended_only_if_that_is_asked_for(
    client: httpx.Client, conversation: str
) -> None:
    missing = replace(client, conversation, "a", said("a"))
    assert (missing.status_code, missing.json()["type"]) == (404, f"{PROBLEM}message-not-found")
    assert about(client, conversation)["version"] == 0
    made = replace(client, conversation, "a", {"role": "user", "content": "one"}, upsert="true")
    assert (made.status_code, made.json()["seq"], "revision" in made.json()) == (201, 1, False)
    same = replace(client, conversation, "a", {"role": "user", "content": "one"}, upsert="true")
    assert (same.status_code, same.json()) == (200, made.json())
    assert replace(client, "nothing", "a", said("a"), upsert="true").status_code == 404


def test_a_streamed_draft_grows_in_its_place(client: httpx.Client, conversation: str) -> None:
    """A draft that is saved every few words is one message, and others may be appended meanwhile."""
    append(client, conversation, said("question"))
    words = ["High", "tide", "is", "at", "five", "past", "two"]
    for count in range(1, len(words) + 1):
        draft = {"role": "assistant", "content": " ".join(words[:count]), "done": count == len(words)}
        stored = replace(client, conversation, "draft", draft, upsert="true")
        assert stored.status_code == (201 if count == 1 else 200)
        if count == 3:
            append(client, conversation, said("meanwhile"))
    history = whole_history(client, conversation)
    assert named(history) == [
        (1, "question", "question"),
        (2, "draft", " ".join(words)),
        (3, "meanwhile", "meanwhile"),
    ]
    assert history[1]["revision"] == len(words) - 1


def test_feedback_is_put_on_a_message(client: httpx.Client, conversation: str) -> None:
    append(client, conversation, said("q"), said("a", metadata={"model": "m"}))
    path = f"/conversations/{conversation}/messages/a"
    tag = client.get(f"/conversations/{conversation}").headers["etag"]
    message = sent(client.get(path).json())
    message["metadata"] = {**message["metadata"], "thumbs": "up"}
    assert client.put(path, json=message, headers={"If-Match": tag}).status_code == 200
    late = client.put(path, json={**message, "metadata": {"thumbs": "down"}}, headers={"If-Match": tag})
    assert (late.status_code, late.json()["type"]) == (409, f"{PROBLEM}stale")
    assert client.get(path).json()["metadata"] == {"model": "m", "thumbs": "up"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"role": "user", "id": "other"}, "$.id"),
        ({"role": "nobody"}, "$.role"),
        ({"role": "user", "revision": 7}, "$.revision"),
        ({"role": "user", "updated_at": "2026-01-01T00:00:00Z"}, "$.updated_at"),
        ({"role": "user", "n": 2**70}, "$.n"),
        ([], "$"),
    ],
)
def test_a_replacement_is_checked_as_an_append_is(
    client: httpx.Client, conversation: str, body: Any, place: str
) -> None:
    append(client, conversation, said("a"))
    refused = replace(client, conversation, "a", body)
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, place)


# -- a whole history -------------------------------------------------------------------------------------


def test_the_whole_list_is_saved_after_each_turn(client: httpx.Client, conversation: str) -> None:
    """The pattern of the AI SDK, whose `onFinish` has all messages and no difference."""
    first = put(client, conversation, said("1"), said("2"))
    assert first.status_code == 200, first.text
    assert named(first.json()["data"]) == [(1, "1", "1"), (2, "2", "2")]
    known = about(client, conversation)
    assert put(client, conversation, said("1"), said("2")).json() == first.json()
    assert about(client, conversation) == known
    one_more = put(client, conversation, said("1"), said("2"), said("3")).json()["data"]
    assert one_more[:2] == first.json()["data"]
    assert named(one_more)[2:] == [(3, "3", "3")]
    changed = put(client, conversation, said("1"), said("2"), said("3", "changed")).json()["data"]
    assert changed[:2] == one_more[:2]
    assert named(changed)[2:] == [(3, "3", "changed")]
    assert (changed[2]["revision"], changed[2]["created_at"]) == (1, one_more[2]["created_at"])
    # The user edits an earlier message, and everything behind it is new.
    edited = put(client, conversation, said("1"), said("2b", "edited"), said("3b")).json()["data"]
    assert named(edited) == [(1, "1", "1"), (4, "2b", "edited"), (5, "3b", "3b")]
    assert whole_history(client, conversation) == edited
    now = about(client, conversation)
    assert (now["last_seq"], now["message_count"], now["version"]) == (5, 3, 4)


def test_a_list_in_another_order_is_the_history(client: httpx.Client, conversation: str) -> None:
    """The ids that are cut off are appended again, in the same transaction."""
    put(client, conversation, *map(said, "abcd"))
    moved = put(client, conversation, *map(said, "adcb")).json()["data"]
    assert named(moved) == [(1, "a", "a"), (5, "d", "d"), (6, "c", "c"), (7, "b", "b")]
    assert whole_history(client, conversation) == moved
    assert put(client, conversation, *map(said, "ad")).json()["data"] == moved[:2]
    assert put(client, conversation).json()["data"] == []
    assert (whole_history(client, conversation), about(client, conversation)["message_count"]) == ([], 0)


def test_after_a_seq_the_list_is_what_follows(client: httpx.Client, conversation: str) -> None:
    before = append(client, conversation, *map(said, "abc"))
    stored = put(client, conversation, said("c"), said("d"), after=2).json()["data"]
    assert named(stored) == [(3, "c", "c"), (4, "d", "d")]
    assert whole_history(client, conversation) == [*before[:2], *stored]
    taken = put(client, conversation, said("a"), after=2)
    assert (taken.status_code, taken.json()["type"]) == (409, f"{PROBLEM}idempotency-conflict")
    beyond = put(client, conversation, said("e"), after=5)
    assert (beyond.status_code, beyond.json()["errors"][0]["path"]) == (422, "query.after")
    assert whole_history(client, conversation) == [*before[:2], *stored]


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{"role": "user"}], "$.messages[0].id"),
        ([said("a"), said("a")], "$.messages[1].id"),
        ([said("a"), {"id": "b", "role": "x"}], "$.messages[1].role"),
        ([7], "$.messages[0]"),
        ("x", "$.messages"),
        ([said(str(n)) for n in range(1001)], "$.messages"),
    ],
)
def test_a_list_is_checked_as_a_whole(
    client: httpx.Client, conversation: str, messages: Any, place: str
) -> None:
    path = f"/conversations/{conversation}/messages"
    refused = client.put(path, json={"messages": messages})
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, place)
    assert whole_history(client, conversation) == []


def test_a_list_has_a_condition_and_its_repetition_wins(client: httpx.Client, conversation: str) -> None:
    assert put(client, conversation, said("a"), expected_last_seq=0).status_code == 200
    assert put(client, conversation, said("a"), expected_last_seq=0).status_code == 200
    stale = put(client, conversation, said("b"), expected_last_seq=0)
    assert (stale.status_code, contents(stale.json()["missed"])) == (409, ["a"])
    assert contents(whole_history(client, conversation)) == ["a"]


def test_a_history_that_is_longer_than_a_transaction_takes_is_refused(
    client: httpx.Client, conversation: str
) -> None:
    append(client, conversation, *[said(str(n)) for n in range(1000)])
    append(client, conversation, said("last"))
    refused = put(client, conversation, said("0"))
    assert (refused.status_code, refused.json()["type"]) == (413, f"{PROBLEM}batch-too-large")
    assert put(client, conversation, said("end"), after=1000).status_code == 200
    assert about(client, conversation)["message_count"] == 1001


async def test_no_reader_finds_a_history_between_two_lists(service: Service, second_service: Service) -> None:
    """LlamaIndex's `set_messages` clears and adds elsewhere; here a reader sees one list or the other."""
    conversation = new_id()
    lists = [[said(f"{name}{n}") for n in range(12)] for name in "ab"]
    async with service.async_client() as writer, second_service.async_client() as reader:
        await writer.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}/messages"
        await writer.put(path, json={"messages": lists[0]})
        writing = True
        seen: set[str] = set()

        async def write() -> None:
            for turn in range(1, 60):
                answer = await writer.put(path, json={"messages": lists[turn % 2]})
                assert answer.status_code == 200, answer.text

        async def read(query: dict[str, Any], expected: int) -> None:
            while writing:
                page = (await reader.get(path, params=query)).json()["data"]
                names = [each["id"] for each in page]
                assert len(names) == expected
                assert len({name[0] for name in names}) == 1
                seen.add(names[0][0])

        readers = [
            asyncio.create_task(read({}, 12)),
            asyncio.create_task(read({"last": 3}, 3)),
            asyncio.create_task(read({"order": "desc", "limit": 20}, 12)),
            asyncio.create_task(read({"role": "user"}, 12)),
        ]
        try:
            await write()
        finally:
            writing = False
        await asyncio.gather(*readers)
    assert seen == {"a", "b"}


async def test_lists_appends_and_replacements_of_two_processes_agree(
    service: Service, second_service: Service
) -> None:
    conversation = new_id()
    async with service.async_client() as one, second_service.async_client() as two:
        await one.post("/conversations", json={"user_id": "ada", "id": conversation})
        path = f"/conversations/{conversation}/messages"

        async def act(number: int) -> None:
            client = (one, two)[number % 2]
            kinds = [
                lambda: client.put(path, json={"messages": [said("x", str(number)), said(f"p{number}")]}),
                lambda: client.post(path, json=said(f"m{number}")),
                lambda: client.put(f"{path}/x", json=said("x", str(number)), params={"upsert": "true"}),
            ]
            answer = await kinds[number % 3]()
            assert answer.status_code in {200, 201}, answer.text

        await asyncio.gather(*map(act, range(60)))
    with service.client() as client:
        stored = whole_history(client, conversation)
        seqs = [each["seq"] for each in stored]
        assert seqs == sorted(set(seqs))
        assert about(client, conversation)["message_count"] == len(stored)
        assert about(client, conversation)["last_seq"] >= seqs[-1]


def test_a_replaced_message_is_exported_imported_and_verified(service: Service, tmp_path: Any) -> None:
    user = new_id("u")
    with service.client() as client:
        conversation = create(client, user=user)
        append(client, conversation, said("a"), said("b"))
        replace(client, conversation, "a", said("a", "new", more={"b": 1, "a": [1.0]}))
        before = whole_history(client, conversation)
        exported = client.get(f"/users/{user}/export").content
        assert client.delete(f"/users/{user}").status_code in {200, 202}
        file = tmp_path / "export.ndjson"
        file.write_bytes(exported)
        for _ in range(2):  # the second time it finds everything stored
            done = command(service, "import", str(file))
            assert done.returncode == 0, done.stdout + done.stderr
        assert json.dumps(whole_history(client, conversation)) == json.dumps(before)
        assert replace(client, conversation, "a", said("a")).json()["revision"] == 2
    with MongoClient[dict[str, Any]](service.database_url, tz_aware=True) as operator:
        messages = operator.get_default_database()["messages"]
        stored = messages.find_one({"_id": f"{conversation}/a"})
        assert stored is not None
        verified = command(service, "verify", "--from", conversation, "--to", f"{conversation}~")
        assert "0 violations" in verified.stdout, verified.stdout + verified.stderr
        messages.update_one({"_id": f"{conversation}/a"}, {"$set": {"revision": "x"}})
        verified = command(service, "verify", "--from", conversation, "--to", f"{conversation}~")
        assert "is not well formed: its revision" in verified.stdout
        messages.update_one({"_id": f"{conversation}/a"}, {"$set": {"revision": 2}})


# -- append or create ------------------------------------------------------------------------------------


def append_to(client: httpx.Client, conversation: str, new: Any, *messages: Any, **options: Any) -> Any:
    path = f"/conversations/{conversation}/messages"
    return client.post(path, json={"conversation": new, "messages": list(messages)}, **options)


def test_an_append_creates_the_conversation_that_it_needs(client: httpx.Client) -> None:
    conversation = new_id()
    new = {"user_id": "ada", "title": "Tides", "metadata": {"b": 1, "a": 2}}
    first = append_to(client, conversation, new, said("a"))
    assert (first.status_code, named(first.json()["data"])) == (201, [(1, "a", "a")])
    made = about(client, conversation)
    assert {name: made[name] for name in ("user_id", "title", "metadata", "version", "last_seq")} == {
        **new,
        "version": 1,
        "last_seq": 1,
    }
    assert append_to(client, conversation, {"user_id": "ada", "title": "Other"}, said("b")).status_code == 201
    again = append_to(client, conversation, new, said("a"))
    assert (again.status_code, again.json()) == (200, first.json())
    assert about(client, conversation)["title"] == "Tides"
    assert contents(whole_history(client, conversation)) == ["a", "b"]
    path = f"/conversations/{new_id()}/messages"
    items = client.post(path, json={"conversation": {"user_id": "ada"}, "items": [{"type": "reasoning"}]})
    assert items.status_code == 201


def test_nobody_appends_to_anothers_conversation_by_creating_it(
    client: httpx.Client, conversation: str
) -> None:
    taken = append_to(client, conversation, {"user_id": "bob"}, said("a"))
    assert (taken.status_code, taken.json()["type"]) == (409, f"{PROBLEM}conversation-id-taken")
    assert whole_history(client, conversation) == []


def test_a_refused_append_creates_nothing(client: httpx.Client) -> None:
    conversation = new_id()
    for body, place in (
        ({"user_id": "a b\n"}, "$.conversation.user_id"),
        ({"user_id": "ada", "titel": "x"}, "$.conversation.titel"),
        ({"user_id": "ada", "metadata": {"n": 2**70}}, "$.conversation.metadata.n"),
        (None, "$.conversation"),
        ({"user_id": "ada", "title": "x" * 1001}, "$.conversation.title"),
    ):
        refused = append_to(client, conversation, body, said("a"))
        assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, place)
    other = append_to(client, conversation, {"user_id": "ada"}, said("a"), params={"user_id": "bob"})
    assert other.json()["errors"][0]["path"] == "$.conversation.user_id"
    stale = append_to(client, conversation, {"user_id": "ada"}, said("a"), params={"expected_last_seq": 3})
    assert (stale.status_code, stale.json()["last_seq"]) == (409, 0)
    assert client.get(f"/conversations/{conversation}").status_code == 404
    first = append_to(client, conversation, {"user_id": "ada"}, said("a"), params={"expected_last_seq": 0})
    assert first.status_code == 201


async def test_many_appends_at_once_create_one_conversation(
    service: Service, second_service: Service
) -> None:
    conversation = new_id()
    async with service.async_client() as one, second_service.async_client() as two:
        path = f"/conversations/{conversation}/messages"

        async def write(number: int) -> int:
            body = {"conversation": {"user_id": "ada"}, "messages": [said(str(number))]}
            answer = await (one, two)[number % 2].post(path, json=body)
            return answer.status_code

        assert set(await asyncio.gather(*map(write, range(24)))) == {201}
    with service.client() as client:
        stored = whole_history(client, conversation)
    assert [each["seq"] for each in stored] == list(range(1, 25))
    assert {each["id"] for each in stored} == {str(n) for n in range(24)}
