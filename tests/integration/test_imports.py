"""An import takes the conversation's id first: what it stores is nobody's to see until all of it is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri

from tests.harness import Service, append, command, create, new_id, on_database, running, whole_history
from tests.integration.test_lifecycle import CONVERSATION, END, HEAD, message
from tests.mongo_proxy import MongoProxy, mongo_proxied


def big_export(file: Path, conversation: str, *, count: int = 1_200, user: str = "ada") -> None:
    """An export of one conversation, which an import stores in three batches."""
    about = {
        **CONVERSATION,
        "id": conversation,
        "user_id": user,
        "last_seq": count,
        "message_count": count,
    }
    told = {"conversation_id": conversation, "user_id": user, "content": "hers alone"}
    messages = [message(**told, id=f"m{seq}", seq=seq) for seq in range(1, count + 1)]
    end = {**END, "messages": count}
    file.write_text("".join(json.dumps(each) + "\n" for each in (HEAD, about, *messages, end)))


@pytest.fixture(scope="module")
def service(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on a database of its own, because `verify` reads all that is in a database."""
    url = on_database(service.database_url, new_id("imports"))
    with running(tmp_path_factory.mktemp("imports"), mongodb_url=url) as started:
        yield started


@pytest.fixture
def behind_a_proxy(service: Service, tmp_path: Path) -> Iterator[tuple[Service, MongoProxy]]:
    """A service's settings for commands whose database is reached through a proxy; it is not started."""
    name = str(parse_uri(service.database_url)["database"])
    with mongo_proxied(service.database_url, name, hide_engine=False) as proxy:
        yield Service(tmp_path, mongodb_url=proxy.url, database_timeout_ms=3_000), proxy


def test_a_file_that_another_program_wrote_is_imported_and_its_changes_are_told(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    conversation, file, user = new_id(), tmp_path / "theirs.ndjson", new_id("user")
    times = [
        "1969-07-20T20:17:40Z",
        "2024-05-01 10:00:00",
        None,
        "2024-04-30T00:00:00Z",
        "2024-05-01T12:00:00+02:00",
    ]
    about = {**CONVERSATION, "id": conversation, "user_id": user, "last_seq": 5, "message_count": 5}
    about |= {"created_at": "1969-07-20T20:17:40", "updated_at": None}
    told = {"conversation_id": conversation, "user_id": user}
    messages = [message(**told, id=f"m{seq}", seq=seq, created_at=time) for seq, time in enumerate(times, 1)]
    del messages[2]["message"]["created_at"]
    lines = [HEAD, about, *messages, {**END, "messages": 5}]
    text = "\ufeff" + "\r\n".join(json.dumps(each) for each in lines) + "\r\n"
    file.write_bytes(text.encode())
    done = command(service, "import", str(file))
    assert done.returncode == 0, done.stderr
    said, *changes = done.stdout.splitlines()
    assert "1 conversations, 5 messages imported" in said
    assert sorted(changes) == [
        "  1 times earlier than the time before them, set to the time before",
        "  2 missing times, set to the time before, or to the first that is known",
        "  2 times before 1970, set to 1970-01-01T00:00:00Z",
        "  2 times without a zone, read as UTC",
    ]
    stored = [each["created_at"] for each in whole_history(client, conversation)]
    assert stored == ["1970-01-01T00:00:00.000Z", *["2024-05-01T10:00:00.000Z"] * 4]
    shown = client.get(f"/conversations/{conversation}").json()
    assert (shown["created_at"], shown["updated_at"]) == (stored[0], stored[-1])
    again = command(service, "import", str(file)).stdout.splitlines()[0]
    assert again.endswith("0 messages imported, 1 conversations were there")
    assert append(client, conversation, {"role": "user"})[0]["seq"] == 6


def test_the_file_in_the_description_of_the_format_is_one_and_is_exported_so(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    page = Path(__file__).parents[2] / "docs" / "export-format.md"
    (shown,) = re.findall(r"^```js\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    file = tmp_path / "shown.ndjson"
    file.write_text(shown)
    done = command(service, "import", str(file), "--user", "cleo")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # nothing was changed
    exported = [json.loads(line) for line in client.get("/users/cleo/export").text.splitlines()]
    head, *told = map(json.loads, shown.splitlines())
    assert exported[0] == {**head, "created_at": exported[0]["created_at"]}
    told[0]["expires_at"] = None
    assert exported[1:] == told
    named = set(re.findall(r"`(\w+)`", page.read_text()))
    assert {name for line in exported for name in line} <= named


def interrupted_import(behind: tuple[Service, MongoProxy], file: Path, conversation: str) -> None:
    """Import, and let the database refuse the second batch."""
    service, proxy = behind

    def second(insert: Any) -> bool:
        return bool(insert["documents"][0]["_id"] == f"{conversation}/m501")

    proxy.fail("insert", 8, "UnknownError", when=second)
    done = command(service, "import", str(file))
    assert done.returncode == 1, done.stderr
    proxy.forget()
    stored = proxy.latest.messages.count_documents({"conversation_id": conversation})
    assert stored == 500


def test_nobody_gets_what_an_interrupted_import_stored_and_the_same_import_goes_on(
    service: Service, client: httpx.Client, behind_a_proxy: tuple[Service, MongoProxy], tmp_path: Path
) -> None:
    conversation, file = new_id(), tmp_path / "ada.ndjson"
    big_export(file, conversation)
    interrupted_import(behind_a_proxy, file, conversation)
    # The id is taken, as any other; nobody sees anything under it, not even whose it will be.
    taken = client.post("/conversations", json={"user_id": "bob", "id": conversation})
    assert taken.status_code == 409, taken.text
    for path in ("", "/messages", "/messages/m1"):
        for user in ("bob", "ada"):
            answer = client.get(f"/conversations/{conversation}{path}", params={"user_id": user})
            assert answer.status_code == 404, answer.text
    assert client.post(f"/conversations/{conversation}/messages", json={"role": "user"}).status_code == 404
    assert client.delete(f"/conversations/{conversation}").status_code == 404
    found = command(service, "verify").stdout
    assert conversation not in found  # an import that is going on is no violation
    # Another user's import of the id waits; the same one goes on.
    other = tmp_path / "bob.ndjson"
    big_export(other, conversation, user="bob")
    refused = command(service, "import", str(other))
    assert (refused.returncode, "is going on" in refused.stderr) == (1, True), refused.stderr
    done = command(service, "import", str(file))
    assert done.returncode == 0, done.stderr
    assert len(whole_history(client, conversation)) == 1_200
    about = client.get(f"/conversations/{conversation}", params={"user_id": "ada"}).json()
    assert (about["message_count"], about["updated_at"]) == (1_200, CONVERSATION["updated_at"])
    assert append(client, conversation, {"role": "user"})[0]["seq"] == 1_201


def test_an_abandoned_import_is_removed_and_its_id_is_free(
    service: Service, client: httpx.Client, behind_a_proxy: tuple[Service, MongoProxy], tmp_path: Path
) -> None:
    conversation, file = new_id(), tmp_path / "ada.ndjson"
    big_export(file, conversation)
    interrupted_import(behind_a_proxy, file, conversation)
    proxy = behind_a_proxy[1]
    long_ago = {"$set": {"updated_at": datetime.now(UTC) - timedelta(minutes=11)}}
    proxy.latest.conversations.update_one({"_id": conversation}, long_ago)
    said = command(service, "verify").stdout
    # The services that run meanwhile remove it once a minute, which may be before it is looked at.
    assert f"{conversation}: its import was interrupted" in said or not proxy.latest.conversations.find_one(
        {"_id": conversation}
    )
    made = client.post("/conversations", json={"user_id": "bob", "id": conversation})
    assert made.status_code == 201, made.text
    assert client.get(f"/conversations/{conversation}/messages/m1").status_code == 404
    assert append(client, conversation, {"role": "user", "id": "m1"})[0]["seq"] == 1
    assert proxy.latest.messages.count_documents({"conversation_id": conversation}) == 1
    done = command(service, "import", str(file))
    assert (done.returncode, "is taken by a conversation" in done.stderr) == (1, True), done.stderr


def test_erasing_a_user_takes_what_an_interrupted_import_stored_of_his(
    client: httpx.Client, behind_a_proxy: tuple[Service, MongoProxy], tmp_path: Path
) -> None:
    conversation, user, file = new_id(), new_id("user"), tmp_path / "user.ndjson"
    big_export(file, conversation, user=user)
    interrupted_import(behind_a_proxy, file, conversation)
    receipt = client.delete(f"/users/{user}").json()
    assert (receipt["conversations"], receipt["messages"]) == (1, 500)
    assert behind_a_proxy[1].latest.messages.count_documents({"user_id": user}) == 0


def test_two_imports_of_one_conversation_at_once_store_it_once(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    conversation, file = new_id(), tmp_path / "ada.ndjson"
    big_export(file, conversation)
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "service", "import", str(file)],
            env=service.environment(),
            cwd=service.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for each in both:
        _, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors
    assert [each["seq"] for each in whole_history(client, conversation)] == list(range(1, 1_201))
    assert client.get(f"/conversations/{conversation}").json()["message_count"] == 1_200


@pytest.mark.parametrize("before", [True, False], ids=["before_the_request", "before_the_answer"])
def test_an_import_knows_its_own_last_batch_whose_answer_was_lost(
    client: httpx.Client, behind_a_proxy: tuple[Service, MongoProxy], tmp_path: Path, before: bool
) -> None:
    conversation, file = new_id(), tmp_path / "ada.ndjson"
    big_export(file, conversation, count=3)
    service, proxy = behind_a_proxy
    # Both of the driver's attempts to commit are lost: when the id is taken, and with the only batch.
    proxy.unknown_commit(before=before, when=proxy.wrote("insert", "conversations"))
    proxy.unknown_commit(before=before, when=proxy.wrote("insert", "messages"))
    done = command(service, "import", str(file))
    assert done.returncode == 0, done.stderr
    assert len(whole_history(client, conversation)) == 3


@pytest.mark.parametrize(
    "said", [{"metadata": {"user_id": "bob"}}, {"content": "\x02user_id\0\x04\0\0\0bob\0"}]
)
def test_a_message_becomes_nobodys_by_what_is_written_in_it(
    service: Service, client: httpx.Client, said: Any
) -> None:
    conversation = create(client, new_id(), user="bob")
    append(client, conversation, {"role": "user", "id": "m1"})
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        messages = operator.get_default_database().messages
        messages.update_one({"_id": f"{conversation}/m1"}, {"$set": {"user_id": "ada", **said}})
    path = f"/conversations/{conversation}"
    assert client.get(f"{path}/messages/m1").status_code == 404
    assert client.get(f"/v1{path}/items/m1").status_code == 404
    assert client.get(f"{path}/messages").json()["data"] == []


def test_what_an_older_version_left_of_an_import_is_shown_to_nobody(
    service: Service, client: httpx.Client, tmp_path: Path
) -> None:
    """Messages without a conversation, under an id that another user then takes."""
    conversation, file = new_id(), tmp_path / "ada.ndjson"
    big_export(file, conversation)
    theirs = [
        {
            "_id": f"{conversation}/m{seq}",
            "conversation_id": conversation,
            "user_id": "ada",
            "seq": seq,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
            "role": "user",
            "content": "hers alone",
        }
        for seq in range(1, 5)
    ]
    with MongoClient[dict[str, Any]](service.database_url, tz_aware=True) as operator:
        messages = operator.get_default_database().messages
        messages.insert_many(theirs)
        path = f"/conversations/{conversation}"
        create(client, conversation, user="bob")
        for place in ("/messages/m1", "/messages/m4"):
            assert client.get(path + place, params={"user_id": "bob"}).status_code == 404
            assert client.delete(path + place, params={"user_id": "bob"}).status_code == 404
        assert client.get(f"{path}/messages").json()["data"] == []
        assert client.post(f"{path}/pop").status_code == 204
        for body in ({"role": "user"}, {"role": "user", "id": "m1"}):
            refused = client.post(f"{path}/messages", json=body)
            assert refused.status_code == 500
            assert "chat-history verify --repair" in refused.json()["detail"]
        # Which of the two indexes is named where both are violated is the engine's own choice.
        messages.update_one({"_id": f"{conversation}/m4"}, {"$set": {"seq": 9}})
        messages.delete_many({"_id": {"$in": [f"{conversation}/m1", f"{conversation}/m2"]}})
        refused = client.post(f"{path}/messages", json={"role": "user", "id": "m4"})
        assert (refused.status_code, refused.json()["type"][-14:]) == (500, "broken-counter")
        assert messages.count_documents({"conversation_id": conversation}) == 2
        found = command(service, "verify", "--repair")
        assert f"{conversation}: 2 messages of another user" in found.stdout, found.stdout
        assert append(client, conversation, {"role": "user", "id": "m1"})[0]["seq"] == 1
        assert [each["user_id"] for each in whole_history(client, conversation)] == ["bob"]
        # Where nobody took the id, the same import finds them and goes on.
        client.delete(path).raise_for_status()
        messages.insert_many(theirs)
        done = command(service, "import", str(file))
        assert done.returncode == 0, done.stderr
        assert len(whole_history(client, conversation)) == 1_200
