"""Each command of each verb, as a cluster gets it, names the shard key, or is in a table of reasons.

A command that names the shard key is answered by one shard. One that does not is asked of all shards, which
costs more with each shard, or takes every shard into a transaction, so the table is short. The test drives
every route of the API and every command of the command line through a router of two engines, and judges what
the router saw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main

from service.cli import app
from tests.harness import Service, append, command, create, new_id, running, whole_history
from tests.mongo_router import MongoRouter, Routed, routed

# What names no shard key: the command, the collection and the fields that its filter names; and why it may be
# asked of all shards.
ON_ALL_SHARDS = {
    ("find", "conversations", ("user_id",)): "the list of a user, the erasure, and interrupted deletions: "
    "a user has conversations on all shards",
    ("find", "conversations", ("active_at", "user_id")): "a later page of the list",
    ("find", "conversations", ("_id", "active_at", "user_id")): "a later page of the list, within one time",
    ("find", "conversations", ("due_at",)): "the sweep: what is due is on all shards",
    ("find", "conversations", ("_id", "due_at")): "the sweep, within one time",
    ("find", "conversations", ("_id",)): "a walk over all conversations in the order of their ids",
    ("find", "conversations", ()): "whether the collection is empty, at the start",
    ("find", "messages", ()): "whether the collection is empty, at the start",
    ("find", "messages", ("conversation_id",)): "`verify` reads the messages of a range of conversations",
}
# What is asked of all shards may not be in a transaction, because every shard would then take part in it.
JUDGED = {"find", "aggregate", "insert", "update", "delete", "findAndModify", "count", "distinct"}
KEYS = {"conversations": "_id", "messages": "conversation_id"}
MESSAGE = {"role": "user", "content": "hello"}
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
OPENAPI = Path(__file__).parents[2] / "docs" / "openapi.json"


def verdicts(router: MongoRouter) -> Iterator[tuple[Routed, tuple[str, str, tuple[str, ...]]]]:
    """Yield the commands on the two collections that do not name the shard key, each with its row."""
    for each in router.seen:
        if each.name not in JUDGED or each.document["$db"] != router.database or each.collection not in KEYS:
            continue
        key = router.keys[each.collection]
        assert key.first == KEYS[each.collection]
        for query in each.filters():
            if not key.is_named_in(query):
                yield each, (each.name, each.collection, tuple(sorted(query)))


def driven_client(service: Service, called: set[tuple[str, str]]) -> httpx.Client:
    """A client that keeps which routes it called."""

    def note(request: httpx.Request) -> None:
        called.add((request.method, request.url.path))

    return service.client(event_hooks={"request": [note]})


def routes() -> Iterator[tuple[str, str, re.Pattern[str]]]:
    for path, methods in json.loads(OPENAPI.read_text())["paths"].items():
        pattern = re.compile(re.sub(r"\\{[^/]+\\}", "[^/]+", re.escape(path)) + "$")
        for method in methods:
            yield method.upper(), path, pattern


def drive_conversations(client: httpx.Client, user: str) -> None:
    for n in range(6):
        create(client, f"{user}-{n}", user)
        create_again = client.post("/conversations", json={"user_id": user, "id": f"{user}-{n}"})
        assert create_again.status_code == 200
        drive_one(client, f"/conversations/{user}-{n}", user)
    everyone = client.get("/conversations", params={"limit": 2}).json()
    client.get("/conversations", params={"limit": 2, "cursor": everyone["next"]}).raise_for_status()
    page = client.get("/conversations", params={"user_id": user, "limit": 2}).json()
    while page["next"]:
        page = client.get(
            "/conversations", params={"user_id": user, "limit": 2, "cursor": page["next"]}
        ).json()


def drive_one(client: httpx.Client, path: str, user: str) -> None:
    """Every call about one conversation and its messages."""
    conversation = path.rpartition("/")[2]
    stored = append(client, conversation, *[MESSAGE] * 5, key="once")
    assert append(client, conversation, *[MESSAGE] * 5, key="once") == stored
    append(client, conversation, MESSAGE | {"id": "mine"}, MESSAGE | {"role": "assistant"})
    append(client, conversation, MESSAGE | {"id": "mine"})
    assert client.post(f"{path}/messages", json={**MESSAGE, "id": "mine", "name": "x"}).status_code == 409
    assert client.patch(path, json={"title": "t", "metadata": {"a": 1}}).status_code == 200
    assert client.get(path, params={"user_id": user}).status_code == 200
    queries: list[dict[str, Any]] = [
        {},
        {"limit": 2, "after": 2},
        {"limit": 2, "before": 5, "order": "desc"},
        {"last": 3},
        {"role": "assistant"},
        {"since": "2020-01-01T00:00:00Z", "until": "2100-01-01T00:00:00Z", "user_id": user},
        {"as": "items"},
    ]
    for query in queries:
        assert client.get(f"{path}/messages", params=query).status_code == 200
    assert client.post(f"{path}/checkpoints", json={"upto_seq": 7, "summary": "s"}).status_code == 201
    assert client.get(f"{path}/context", params={"max_turns": 3}).status_code == 200
    assert client.get(f"{path}/checkpoints").status_code == 200
    assert client.delete(f"{path}/checkpoints/cp_7").status_code == 204
    lines = client.get(f"{path}/messages", headers={"Accept": "application/x-ndjson"})
    assert len(lines.text.splitlines()) == 7
    assert client.get(f"{path}/messages/mine").status_code == 200
    assert client.put(f"{path}/messages/mine", json=MESSAGE | {"name": "y"}).status_code == 200
    assert client.put(f"{path}/messages/late?upsert=true", json=MESSAGE).status_code == 201
    assert client.post(f"{path}/messages", params={"expected_last_seq": 1}, json=MESSAGE).status_code == 409
    tail = {"messages": [MESSAGE | {"id": "late", "name": "z"}, MESSAGE | {"id": "later"}]}
    last = client.get(path).json()["last_seq"]
    assert client.put(f"{path}/messages", params={"after": last - 1}, json=tail).status_code == 200
    tail["messages"].reverse()
    assert client.put(f"{path}/messages", params={"after": last - 1}, json=tail).status_code == 200
    new = {"conversation": {"user_id": user}, "messages": [MESSAGE]}
    assert client.post(f"{path}-made/messages", json=new).status_code == 201
    assert client.delete(f"{path}-made").status_code == 204
    assert client.get(f"{path}/messages/none").status_code == 404
    assert client.delete(f"{path}/messages/{stored[1]['id']}").status_code == 204
    assert client.delete(f"{path}/messages/none").status_code == 404
    assert client.post(f"{path}/pop").status_code == 200
    assert client.delete(f"{path}/messages", params={"after": 3}).status_code == 204


def drive_items(client: httpx.Client) -> None:
    """OpenAI's routes."""
    made = client.post(
        "/v1/conversations", json={"items": [ITEM], "metadata": {"k": "v"}}, headers={"Idempotency-Key": "k"}
    )
    path = f"/v1/conversations/{made.json()['id']}"
    assert client.get(path).status_code == 200
    assert client.post(path, json={"metadata": {"k": "w"}}).status_code == 200
    (item,) = client.post(f"{path}/items", json={"items": [ITEM]}).json()["data"]
    assert len(client.get(f"{path}/items").json()["data"]) == 2
    assert client.get(f"{path}/items", params={"after": item["id"], "order": "desc"}).status_code == 200
    assert client.get(f"{path}/items/{item['id']}").status_code == 200
    assert client.delete(f"{path}/items/{item['id']}").status_code == 200
    assert client.delete(path).status_code == 200
    assert client.get("/v1/conversations").status_code == 200
    assert client.get("/users/ada/erasures/none").status_code == 404


def drive_users(client: httpx.Client, service: Service, user: str, run: Callable[..., str]) -> None:
    """Export, delete, erase, import twice, and let something expire."""
    exported = service.directory / "export.ndjson"
    exported.write_bytes(client.get(f"/users/{user}/export").content)
    assert client.delete(f"/conversations/{user}-0").status_code == 204
    assert client.get("/conversations", params={"user_id": user}).json()["data"]
    assert client.delete(f"/users/{user}", params={"dry_run": True}).json()["conversations"] == 5
    assert client.delete(f"/users/{user}").json()["conversations"] == 5
    assert "6 conversations" in run("import", str(exported))
    assert "6 conversations were there" in run("import", str(exported))
    assert len(whole_history(client, f"{user}-1")) == 2


def drive_expiry(client: httpx.Client, router: MongoRouter, run: Callable[..., str]) -> None:
    for n in range(4):
        create(client, f"old-{n}")
        append(client, f"old-{n}", MESSAGE)
        soon = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        assert client.patch(f"/conversations/old-{n}", json={"expires_at": soon}).status_code == 200
        past = {"$set": dict.fromkeys(("expires_at", "due_at"), datetime.now(UTC) - timedelta(days=1))}
        for each in (0, 1):
            router.shard(each).conversations.update_one({"_id": f"old-{n}"}, past)
    # The service sweeps, too, so it is not known which of the two removes them.
    assert "would expire" in run("expire", "--dry-run")
    run("expire")
    assert not any(client.get(f"/conversations/old-{n}").is_success for n in range(4))


def drive_verify(client: httpx.Client, router: MongoRouter, run: Callable[..., str]) -> None:
    """Repair everything that can be repaired."""
    for name in ("counted", "owned", "left", "gone"):
        create(client, name)
        append(client, name, *[MESSAGE] * 3)
    for each in map(router.shard, (0, 1)):
        each.conversations.update_one({"_id": "counted"}, {"$inc": {"message_count": 1, "last_seq": -1}})
        each.messages.update_one({"conversation_id": "owned", "seq": 2}, {"$set": {"user_id": "bob"}})
        each.messages.update_one({"conversation_id": "left", "seq": 3}, {"$set": {"user_id": "bob"}})
        each.conversations.update_one({"_id": "left"}, {"$inc": {"message_count": -1, "last_seq": -1}})
        each.conversations.update_one({"_id": "gone"}, {"$set": {"user_id": ""}})
    assert "0 left" in run("verify", "--repair")
    assert "0 violations" in run("verify")


@pytest.fixture(scope="module")
def driven(
    shards: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MongoRouter, set[tuple[str, str]], set[str]]]:
    """A router that has seen everything, the calls that were made, and the commands that were run."""
    called: set[tuple[str, str]] = set()
    ran = {"serve"}
    directory = tmp_path_factory.mktemp("driven")
    with routed(shards, new_id("driven")) as router:

        def run(*arguments: str) -> str:
            name = " ".join(arguments[: 2 if arguments[0] == "keys" else 1])
            done = command(service, *arguments)
            assert done.returncode == 0, done.stderr
            ran.add(name)
            return done.stdout

        with running(directory, mongodb_url=router.url, audit_days=1, retention_days=30) as service:
            with driven_client(service, called) as client:
                for path in ("/health/live", "/health/ready"):
                    assert client.get(path).status_code == 200
                drive_conversations(client, "ada")
                drive_items(client)
                drive_users(client, service, "ada", run)
                drive_expiry(client, router, run)
                drive_verify(client, router, run)
            run("keys", "create", "test", "--scope", "read")
            run("keys", "revoke", run("keys", "list").splitlines()[1].split()[0])
            run("indexes")
            run("mongo-url")
        assert not re.search(r'"level": ?"error"|Traceback', service.output())
        yield router, called, ran


Driven = tuple[MongoRouter, set[tuple[str, str]], set[str]]


def test_every_route_and_every_command_was_driven(driven: Driven) -> None:
    _, called, ran = driven
    # The events of a list are a change stream of the whole database, and reads that the list makes, too.
    not_called = [
        (method, path)
        for method, path, pattern in routes()
        if path != "/events" and not any(each == method and pattern.match(made) for each, made in called)
    ]
    assert not not_called
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    names = {*commands} - {"keys", "health"}  # `health` asks a service, and no database
    assert ran == names | {f"keys {each}" for each in commands["keys"].commands}


def test_every_command_names_the_shard_key_or_has_its_reason(driven: Driven) -> None:
    router, _, _ = driven
    assert sum(each.collection in KEYS for each in router.seen if each.name in JUDGED) > 300
    without = {row: each.document for each, row in verdicts(router)}
    assert without.keys() == ON_ALL_SHARDS.keys()


def test_no_transaction_asks_all_shards(driven: Driven) -> None:
    router, _, _ = driven
    assert not [row for each, row in verdicts(router) if each.in_transaction]


def test_what_names_the_shard_key_is_asked_of_one_shard(driven: Driven) -> None:
    router, _, _ = driven
    unnamed = [id(each) for each, _ in verdicts(router)]
    for each in router.seen:
        if each.name in JUDGED and each.collection in KEYS and id(each) not in unnamed:
            named = each.document.get("filter", {}).get(KEYS[each.collection])
            if isinstance(named, dict) and len(named.get("$in", ())) > 1:
                continue  # a page of the list of all users, whose conversations are on all shards
            assert len(each.shards) == 1, each
