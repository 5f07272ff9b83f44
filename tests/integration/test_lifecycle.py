"""A user's data as a whole: erased, exported, imported, expired; each interrupted in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import MongoClient

from service.chat_service import ChatService, ConversationRecord
from service.database import Database
from service.errors import ChatHistoryError, ConversationNotFound
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from service.user_data import UserData, exporting
from service.user_data.exporting import ImportCounts, import_file
from tests.harness import Service, append, command, create, history, new_id, running, whole_history

ODD = {
    "role": "assistant",
    "content": [{"$ref": "x", "$id": 1}, 1.0, 2**53 + 1],
    "a.b": {"$set": None},
    "é": "",
}


def conversations_of(client: httpx.Client, user: str) -> list[Any]:
    found: list[Any] = []
    query: dict[str, Any] = {"user_id": user, "limit": 100}
    while True:
        page = client.get("/conversations", params=query).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        query["cursor"] = page["next"]


def filled(client: httpx.Client, user: str, conversations: int = 12) -> list[str]:
    made = [create(client, new_id(), user=user) for _ in range(conversations)]
    for number, each in enumerate(made):
        if number % 4:  # some are empty
            append(client, each, *({**ODD, "n": n} for n in range(number % 4)))
    return made


def everything(client: httpx.Client, user: str) -> Any:
    listed = conversations_of(client, user)
    return [(each, whole_history(client, each["id"])) for each in listed]


# -- erasing -------------------------------------------------------------------------------------------


def test_erasing_a_user_leaves_nothing_and_says_what_it_was(service: Service, client: httpx.Client) -> None:
    user, other = new_id("user"), new_id("user")
    filled(client, user, 104)
    kept = filled(client, other, 3)
    messages = sum(each["message_count"] for each in conversations_of(client, user))
    said = {"user_id": user, "conversations": 104, "messages": messages}
    assert client.delete(f"/users/{user}?dry_run=true").json() == {**said, "dry_run": True}
    assert len(conversations_of(client, user)) == 104
    assert client.delete(f"/users/{user}").json() == {**said, "dry_run": False}
    assert client.delete(f"/users/{user}").json()["conversations"] == 0
    assert [each["id"] for each in conversations_of(client, other)] == kept[::-1]
    with MongoClient[dict[str, Any]](service.database_url) as operator:
        database = operator.get_default_database()
        for collection in database.list_collection_names():
            assert user not in str(
                list(database[collection].find({"$or": [{"user_id": user}, {"_id": user}]}))
            )


def test_an_erasure_that_was_killed_goes_on_and_its_receipt_is_of_all_of_it(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            filled(client, "ada", 60)
            expected = client.delete("/users/ada?dry_run=true").json()
        failed: list[bool] = []

        def erase() -> None:
            with service.client() as client:
                try:
                    client.delete("/users/ada")
                except httpx.TransportError:
                    failed.append(True)

        erasing = threading.Thread(target=erase)
        erasing.start()
        with service.client() as client:
            while len(conversations_of(client, "ada")) > 45:
                time.sleep(0.01)
        service.kill()
        erasing.join()
        assert failed
        service.start()
        with service.client() as client:
            left = conversations_of(client, "ada")
            assert 0 < len(left) < 60
            # What was not erased yet is whole.
            for each in left:
                assert len(whole_history(client, each["id"])) == each["message_count"]
            while (answer := client.delete("/users/ada")).status_code == 202:
                time.sleep(0.05)  # the machine is busy, and the erasure goes on
            assert answer.json() == {**expected, "dry_run": False}
            assert conversations_of(client, "ada") == []
        assert "0 violations" in command(service, "verify").stdout


def test_an_erasure_that_nobody_repeats_is_finished_by_the_service(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        with service.client() as client:
            filled(client, "ada", 5)
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            begun = {"_id": "ada", "active_at": datetime.now(UTC) - timedelta(hours=1), "conversations": 7}
            operator.get_default_database().erasures.insert_one({**begun, "messages": 9})
        service.stop()
        service.start()
        with service.client() as client:
            deadline = time.monotonic() + 20
            while conversations_of(client, "ada") and time.monotonic() < deadline:
                time.sleep(0.05)
            assert conversations_of(client, "ada") == []
        for _ in range(100):  # the line is written when the erasure has ended
            if "erasures_finished" in service.output():
                break
            time.sleep(0.1)
        assert "erasures_finished" in service.output()


# -- exporting and importing -----------------------------------------------------------------------------


def export(service: Service, user: str, path: Path) -> list[Any]:
    with service.client() as client, client.stream("GET", f"/users/{user}/export") as response:
        assert response.status_code == 200
        path.write_bytes(response.read())
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line]


def test_an_export_is_taken_back_exactly(tmp_path: Path) -> None:
    file = tmp_path / "ada.ndjson"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with running(tmp_path / "one") as service, service.client() as client:
        made = filled(client, "ada", 15)
        body = {
            "title": "t\u2028",
            "metadata": {"$ref": 1, "a.b": {"z": 1, "a": 1.0}},
            "expires_at": "2100-01-01T00:00:00Z",
        }
        client.patch(f"/conversations/{made[0]}", json=body).raise_for_status()
        append(client, made[1], *({"role": "user", "content": f"{n}"} for n in range(600)))
        append(client, made[1], *({"role": "user", "content": "x" * 1_000_000} for n in range(10)))
        client.delete(f"/conversations/{made[1]}/messages/{whole_history(client, made[1])[5]['id']}")
        before = everything(client, "ada")
        lines = export(service, "ada", file)
        assert lines[0]["type"] == "export"
        assert lines[-1] == {"type": "end", "conversations": 15, "messages": sum(len(m) for _, m in before)}
    with running(tmp_path / "two") as service, service.client() as client:
        dry = command(service, "import", "--dry-run", str(file))
        assert (dry.returncode, conversations_of(client, "ada")) == (0, []), dry.stderr
        done = command(service, "import", str(file))
        assert done.returncode == 0, done.stderr
        assert "15 conversations" in done.stdout
        after = everything(client, "ada")
        assert json.dumps(after) == json.dumps(before)
        again = command(service, "import", str(file))
        assert (again.returncode, "15 conversations were there" in again.stdout) == (0, True), again.stderr
        # The seq goes on where it was.
        assert (
            append(client, made[1], {"role": "user"})[0]["seq"]
            == before[[c["id"] for c, _ in before].index(made[1])][0]["last_seq"] + 1
        )
        changed = command(service, "import", str(file))
        assert changed.returncode == 1
        assert made[1] in changed.stderr
        # Into a tenant, the same ids once more.
        assert command(service, "import", "--tenant", "acme", str(file)).returncode == 0
        assert "0 violations" in command(service, "verify").stdout


def test_an_import_that_was_killed_goes_on_and_shows_no_half_of_a_conversation(tmp_path: Path) -> None:
    file = tmp_path / "ada.ndjson"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with running(tmp_path / "one") as service, service.client() as client:
        made = [create(client, new_id(), user="ada") for _ in range(3)]
        for each in made:
            for count in (1_000, 200):  # three batches of an import
                append(client, each, *({"role": "user", "content": f"{n}" * 200} for n in range(count)))
        before = everything(client, "ada")
        export(service, "ada", file)
    with running(tmp_path / "two") as service:
        # With an engine of its own, which ends with it; one that others share would keep a lock for a minute.
        service.stop()
        kills = 0
        for pause in (1.5, 2.0, 2.5, 3.5):
            importing = subprocess.Popen(
                [sys.executable, "-m", "service", "import", str(file)],
                env=service.environment(),
                cwd=service.directory,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                importing.wait(pause)
            except subprocess.TimeoutExpired:
                os.kill(importing.pid, signal.SIGKILL)
                importing.wait()
                kills += 1
        assert kills
        service.start()
        with service.client() as client:
            for each in conversations_of(client, "ada"):
                assert each["message_count"] == len(whole_history(client, each["id"])) == 1_200
            done = command(service, "import", str(file))
            assert done.returncode == 0, done.stderr
            assert json.dumps(everything(client, "ada")) == json.dumps(before)


CONVERSATION: dict[str, Any] = {
    "type": "conversation",
    "id": "c",
    "user_id": "ada",
    "title": None,
    "metadata": {},
    "created_at": "2026-01-01T00:00:00.000Z",
    "updated_at": "2026-01-01T00:00:00.000Z",
    "last_seq": 1,
    "message_count": 1,
}
MESSAGE = {
    "id": "m",
    "conversation_id": "c",
    "user_id": "ada",
    "seq": 1,
    "created_at": "2026-01-01T00:00:00.000Z",
    "role": "user",
}
HEAD, END = {"type": "export", "version": 1}, {"type": "end", "conversations": 1, "messages": 1}


def message(**changes: Any) -> Any:
    return {"type": "message", "message": {**MESSAGE, **changes}}


@contextlib.asynccontextmanager
async def without_http(service: Service) -> AsyncIterator[ConversationStore]:
    """The service module itself, because each command takes some seconds to start."""
    database = Database(Settings(mongodb_url=service.database_url))
    await database.open()
    try:
        yield ConversationStore(database, Settings())
    finally:
        await database.close()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "not an export"),
        ([{"type": "export", "version": 2}], "not an export"),
        ([HEAD, CONVERSATION, message()], "cut short"),
        ([HEAD, CONVERSATION, message(), {**END, "conversations": 2}], "cut short"),
        ([HEAD, CONVERSATION, END], "message_count"),
        ([HEAD, CONVERSATION, message(), message(id="n"), END], "seq"),
        ([HEAD, CONVERSATION, message(seq=2), END], "seq"),
        ([HEAD, CONVERSATION, message(seq=True), END], "seq"),
        ([HEAD, CONVERSATION, message(role="robot"), END], "role"),
        ([HEAD, CONVERSATION, message(id="a\n"), END], "id"),
        ([HEAD, CONVERSATION, message(id=None), END], "id"),
        ([HEAD, CONVERSATION, message(user_id="bob"), END], "another user"),
        ([HEAD, CONVERSATION, message(created_at="soon"), END], "created_at"),
        ([HEAD, {**CONVERSATION, "updated_at": "9999-01-01T00:00:00Z"}, message(), END], "updated_at"),
        ([HEAD, {**CONVERSATION, "last_seq": 2**53 + 1}, message(), END], "last_seq"),
        ([HEAD, {**CONVERSATION, "last_seq": 2**63 - 1}, message(), END], "last_seq"),
        ([HEAD, {**CONVERSATION, "metadata": {"." * 255: 1}}, message(), END], "dots"),
        ([HEAD, CONVERSATION, message(x={"." * 255: 1}), END], "dots"),
        ([HEAD, {**CONVERSATION, "id": "a\n"}, message(), END], "id"),
        ([HEAD, {**CONVERSATION, "user_id": ""}, message(), END], "user_id"),
        ([HEAD, {**CONVERSATION, "more": 1}, message(), END], "more"),
        ([HEAD, [], END], "line 2"),
    ],
)
async def test_what_is_no_whole_export_is_refused_with_its_line(
    service: Service, tmp_path: Path, lines: list[Any], says: str
) -> None:
    conversation = new_id()
    file = tmp_path / "bad.ndjson"
    text = "".join(json.dumps(each).replace('"c"', f'"{conversation}"') + "\n" for each in lines)
    file.write_text(text)
    async with without_http(service) as store:
        with pytest.raises(ChatHistoryError) as refused:
            await import_file(UserData(store, TenantScope()), file, ImportCounts())
        assert says in refused.value.detail
        assert f"{file}, line " in refused.value.detail
        if "cut short" not in says:
            with pytest.raises(ConversationNotFound):
                await ChatService(store, TenantScope()).get_conversation(conversation)


def test_the_command_says_what_is_no_export_and_fails(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "bad.ndjson"
    file.write_text("")
    done = command(service, "import", str(file))
    assert done.returncode == 1
    assert f"{file}, line 1: The file is not an export" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("conversation", "messages", "updated_at"),
    [
        ({}, [{"created_at": "2026-03-01T00:00:00.000Z"}], "2026-03-01T00:00:00.000Z"),
        ({"created_at": "2026-02-01T00:00:00.000Z"}, [{}], "2026-02-01T00:00:00.000Z"),
        ({"updated_at": "2026-05-01T00:00:00.000Z"}, [{}], "2026-05-01T00:00:00.000Z"),
        ({"updated_at": "2026-01-01T02:00:00.000+01:00"}, [{}], "2026-01-01T01:00:00.000Z"),
        (
            {"message_count": 2, "last_seq": 5},
            [{}, {"id": "n", "seq": 5, "created_at": "2026-03-01T00:00:00.000Z"}],
            "2026-03-01T00:00:00.000Z",
        ),
        ({"message_count": 0}, [], "2026-01-01T00:00:00.000Z"),
    ],
)
async def test_an_imported_conversation_is_never_older_than_its_messages(
    service: Service, tmp_path: Path, conversation: Any, messages: list[Any], updated_at: str
) -> None:
    """`since` trusts `updated_at`, and would hide a message that is newer."""
    name, file = new_id(), tmp_path / "old.ndjson"
    end = {**END, "messages": len(messages)}
    lines = [HEAD, {**CONVERSATION, **conversation}, *(message(**each) for each in messages), end]
    file.write_text("".join(json.dumps(each).replace('"c"', f'"{name}"') + "\n" for each in lines))
    async with without_http(service) as store:
        for _ in range(2):
            await import_file(UserData(store, TenantScope()), file, ImportCounts())
    with service.client() as client:
        assert client.get(f"/conversations/{name}").json()["updated_at"] == updated_at
        for stored in whole_history(client, name):
            assert stored in history(client, name, since=stored["created_at"])["data"]
        assert append(client, name, {"role": "user"})[0]["seq"] == conversation.get("last_seq", 1) + 1
        client.delete(f"/conversations/{name}")


class Busy(ChatService):
    """A service in which somebody appends whenever a conversation was read."""

    async def get_conversation(self, conversation_id: str, user_id: str | None = None) -> ConversationRecord:
        found = await super().get_conversation(conversation_id, user_id)
        await self.add_message(conversation_id, {"role": "user", "content": "meanwhile"})
        return found


async def test_what_is_appended_while_an_export_reads_a_conversation_stays_out_of_it(
    service: Service, client: httpx.Client
) -> None:
    """The conversation's line counts its messages, so one more of them could not be imported."""
    user = new_id("user")
    conversation = create(client, new_id(), user=user)
    append(client, conversation, *({"role": "user", "content": f"{n}"} for n in range(100)))
    lines: list[Any] = []
    async with without_http(service) as store:
        async for part in exporting.export(Busy(store, TenantScope()), user):
            lines += part
    about = next(each for each in lines if each["type"] == "conversation")
    assert sum(each["type"] == "message" for each in lines) == about["message_count"] == about["last_seq"]


def test_an_import_goes_into_a_tenant_that_can_be_one(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "empty.ndjson"
    file.write_text("".join(json.dumps(each) + "\n" for each in (HEAD, {**END, "conversations": 0})))
    for tenant in ("a\nb", "..", "x" * 1_501, "."):
        done = command(service, "import", "--tenant", tenant, str(file))
        assert (done.returncode, "no name for a tenant" in done.stderr) == (1, True), done.stderr


# -- expiring ------------------------------------------------------------------------------------------


def test_an_expired_conversation_is_removed_whole_and_others_stay(tmp_path: Path) -> None:
    past, future = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z"
    with running(tmp_path) as service, service.client() as client:
        # The service's first sweep is over, and the next one comes in a minute.
        while "due_times_filled_in" not in service.output():
            time.sleep(0.05)
        time.sleep(0.5)
        made = {}
        for name, expires_at in (("past", past), ("future", future), ("none", None)):
            body = {"user_id": "ada", "id": name, "expires_at": expires_at}
            made[name] = client.post("/conversations", json=body).json()
            append(client, name, {"role": "user"}, {"role": "user"})
        assert made["future"]["expires_at"] == "2100-01-01T00:00:00.000Z"
        assert "expires_at" not in made["none"]
        dry = command(service, "expire", "--dry-run").stdout
        assert dry == "1 conversations with 2 messages would expire\n"
        assert client.get("/conversations/past").status_code == 200
        assert command(service, "expire").stdout == "1 conversations with 2 messages expired\n"
        assert client.get("/conversations/past").status_code == 404
        assert client.get("/conversations/past/messages").status_code == 404
        assert {each["id"] for each in conversations_of(client, "ada")} == {"future", "none"}
        # It may be given later, and taken back.
        assert client.patch("/conversations/none", json={"expires_at": past}).json()["expires_at"]
        assert "expires_at" not in client.patch("/conversations/none", json={"expires_at": None}).json()
        assert command(service, "expire").stdout.startswith("0 conversations")
        for bad in (7, "7", "4102444800.0", "soon", "2020-01-01T00:00:00"):
            response = client.patch("/conversations/none", json={"expires_at": bad})
            assert response.status_code == 422
            assert response.json()["errors"][0]["path"] == "$.expires_at"


def test_what_had_no_activity_for_too_long_is_removed_by_the_service_by_tenant(tmp_path: Path) -> None:
    settings = {"retention_days": 30, "retention_days_by_tenant": '{"acme": 10, "keeps": 3650}'}
    now = datetime.now(UTC)
    # The settings are new, and the conversations were stored by an earlier version.
    with running(tmp_path) as service, MongoClient[dict[str, Any]](service.database_url) as operator:
        about: dict[str, Any] = {
            "title": None,
            "metadata": {},
            "exact_metadata": None,
            "created_at": now - timedelta(days=400),
        }
        operator.get_default_database().conversations.insert_many(
            {
                "_id": f"{tenant}{days}-{n}",
                "user_id": f"{tenant}ada",
                "updated_at": now - timedelta(days=days),
                "last_seq": 0,
                "message_count": 0,
                **about,
            }
            for tenant in ("", "acme/", "keeps/")
            for days in (5, 20, 40, 300)
            for n in range(25)
        )
    with running(tmp_path, **settings) as service:
        with MongoClient[dict[str, Any]](service.database_url) as operator:
            conversations = operator.get_default_database().conversations
            deadline = time.monotonic() + 60
            while conversations.count_documents({}) > 175 and time.monotonic() < deadline:
                time.sleep(0.1)
            left = {each["_id"].rpartition("-")[0] for each in conversations.find()}
        assert left == {"5", "20", "acme/5", "keeps/5", "keeps/20", "keeps/40", "keeps/300"}
