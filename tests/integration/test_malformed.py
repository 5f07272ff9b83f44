"""Documents that somebody made by hand: one of them stops nothing, and its content is in no log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import Decimal128, ObjectId, Regex
from pymongo import MongoClient

from tests.harness import Service, append, command, create, history, new_id, on_database

SECRET = "what nobody may see"
PAST = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def handmade(service: Service, tmp_path: Path) -> Iterator[tuple[Service, Any]]:
    """A service that is yet to be started, and its database, to make documents in by hand."""
    url = on_database(service.database_url, new_id("handmade"))
    with MongoClient[dict[str, Any]](url) as operator:
        database = operator.get_default_database()
        yield Service(tmp_path, mongodb_url=url), database


def conversation(key: Any, **fields: Any) -> dict[str, Any]:
    return {
        "_id": key,
        "user_id": "ada",
        "title": None,
        "metadata": {},
        "created_at": PAST,
        "updated_at": PAST,
        "last_seq": 0,
        "message_count": 0,
        **fields,
    }


def test_no_malformed_document_ends_the_housekeeping_and_the_others_are_done(handmade: Any) -> None:
    made, database = handmade
    due = {"expires_at": PAST, "due_at": PAST}
    database.conversations.insert_many(
        [
            {"_id": "bare-due", **due, "title": SECRET},
            conversation("text-due", **due, last_seq=SECRET),
            conversation(ObjectId("0123456789ab0123456789ab"), **due),
            conversation("sound-due", **due),
            {"_id": "bare-going", "user_id": "", "title": SECRET},
            conversation("text-going", user_id="", message_count=SECRET),
            conversation("sound-going", user_id=""),
            conversation("sound-of-cleo", user_id="cleo"),
            conversation("sound-of-dora", user_id="dora"),
        ]
    )
    database.messages.insert_one({"_id": "text-going/m", "conversation_id": "text-going", "seq": 1})
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    database.erasures.insert_many(
        [
            {"_id": "cleo", "active_at": long_ago, "conversations": SECRET, "messages": 0},
            {"_id": "dora", "active_at": long_ago, "conversations": 0, "messages": 0},
        ]
    )
    try:
        made.start()
        deadline = time.monotonic() + 30
        done = {"sound-due", "sound-going", "sound-of-dora", "bare-going", "text-going"}
        while database.conversations.count_documents({"_id": {"$in": [*done]}}):
            assert time.monotonic() < deadline, made.output()
            time.sleep(0.1)
        made.wait_until("/health/ready")
    finally:
        made.stop()
    said = made.output()
    assert SECRET not in said
    assert "Traceback" not in said
    errors = [json.loads(line) for line in said.splitlines() if '"level":"error"' in line]
    named = {each.get("id"): each["error"] for each in errors}
    # What was asked to be deleted is deleted, well formed or not; what is due is left to an operator where it
    # cannot be told whether it is.
    assert named.keys() == {"bare-due", "0123456789ab0123456789ab", "cleo"}, errors
    assert named["bare-due"] == "MalformedDocument"
    assert database.conversations.find_one({"_id": "bare-due"})
    assert not database.messages.count_documents({})


def test_a_malformed_conversation_leaves_the_rest_of_a_list_and_is_named_by_the_others(
    handmade: Any,
) -> None:
    made, database = handmade
    try:
        with made.start().client() as client:
            for number in range(5):
                create(client, f"c{number}")
            database.conversations.insert_many(
                conversation(f"bad{number}", updated_at=datetime.now(UTC), last_seq=SECRET)
                for number in range(3)
            )
            seen: list[str] = []
            query: dict[str, Any] = {"user_id": "ada", "limit": 2}
            for _ in range(20):
                page = client.get("/conversations", params=query).json()
                seen += [each["id"] for each in page["data"]]
                if not page["has_more"]:
                    break
                query["cursor"] = page["next"]
            assert sorted(seen) == [f"c{number}" for number in range(5)]
            # A conversation that is well formed but for its id is where a page may end, too.
            database.conversations.insert_one(conversation("an id; made by hand", updated_at=PAST))
            create(client, "old")
            database.conversations.update_one(
                {"_id": "old"}, {"$set": {"updated_at": PAST - timedelta(days=1)}}
            )
            for path, named, goes_on, place in (
                ("/conversations", "user_id", "cursor", "next"),
                ("/v1/conversations", "user", "after", "last_id"),
            ):
                seen, query = [], {named: "ada", "limit": 1}
                for _ in range(20):
                    page = client.get(path, params=query).json()
                    seen += [each["id"] for each in page["data"]]
                    if not page["has_more"]:
                        break
                    query[goes_on] = page[place]
                assert sorted(seen) == ["an id; made by hand", *(f"c{number}" for number in range(5)), "old"]
            for call in ("/conversations/bad1", "/conversations/bad1/messages", "/users/ada/export"):
                answer = client.get(call)
                assert answer.status_code == 500, (call, answer.text)
                assert answer.json()["type"].endswith("malformed-document")
                assert SECRET not in answer.text
            # Erasing a user erases what is not well formed, too.
            assert client.delete("/users/ada").json()["conversations"] == 10
            assert not database.conversations.count_documents({})
            assert client.delete("/users/ada").json()["conversations"] == 0
    finally:
        made.stop()
    assert SECRET not in made.output()
    assert "request_failed" not in made.output()


def test_a_malformed_message_is_a_500_that_shows_nothing_of_it(handmade: Any) -> None:
    made, database = handmade
    try:
        with made.start().client() as client:
            create(client, "c")
            append(client, "c", {"role": "user", "content": "x"}, {"role": "user", "content": "y"})
            key = database.messages.find_one({"seq": 2})["_id"]
            for strange in (ObjectId(), Decimal128("1.5"), Regex("a"), b"bytes"):
                changes = {"name": SECRET, "content": {"deep": [strange]}}
                database.messages.update_one({"_id": key}, {"$set": changes})
                for path in ("/conversations/c/messages", f"/conversations/{key.replace('/', '/messages/')}"):
                    answer = client.get(path)
                    assert (answer.status_code, SECRET in answer.text) == (500, False)
                    assert answer.json()["type"].endswith("malformed-document")
                assert [each["seq"] for each in history(client, "c", before=2)["data"]] == [1]
            # A message without an owner is nobody's, so nobody sees anything of it.
            database.messages.update_one({"_id": key}, {"$unset": {"user_id": ""}})
            assert [each["seq"] for each in history(client, "c")["data"]] == [1]
    finally:
        made.stop()
    assert SECRET not in made.output()


def test_a_malformed_key_opens_nothing_and_the_others_are_listed(handmade: Any) -> None:
    made, database = handmade
    made.settings |= {"auth": "key"}
    text = command(made, "keys", "create", "sound", "--scope", "read").stdout.strip()
    bad = command(made, "keys", "create", "bad", "--scope", "read").stdout.strip()
    bad_id = bad.split("_")[1]
    database.api_keys.update_one({"_id": bad_id}, {"$set": {"expires_at": SECRET}})
    database.api_keys.insert_one({"_id": "f" * 16, "name": SECRET})
    listed = command(made, "keys", "list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split("\t")[1] for line in listed.stdout.splitlines()] == ["name", "sound"]
    assert bad_id in listed.stderr
    assert SECRET not in listed.stdout + listed.stderr
    try:
        with made.start().client() as client:
            for key, status in ((text, 200), (bad, 401)):
                answer = client.get("/conversations?user_id=ada", headers={"X-API-Key": key})
                assert answer.status_code == status, answer.text
    finally:
        made.stop()
    assert SECRET not in made.output()
    assert command(made, "keys", "revoke", bad_id).returncode == 0
