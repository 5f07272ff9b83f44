"""What version 0.1.0 stored opens: it is listed, appended to, exported, verified, and it expires.

`tests/version_0_1_0` has a data directory that the code of version 0.1.0 (commit cf16023) made, the answers
that it gave, and the program that made both.
"""

from __future__ import annotations

import json
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from service import clock
from service.chat_service import ChatService
from service.database import Database
from service.history.store import ConversationStore
from service.maintenance import due_times, sweep
from service.maintenance.verify import Verifier
from service.settings import Settings
from service.tenancy import TenantScope
from service.user_data import UserData
from service.user_data.erasure import RemovedCounts
from tests.harness import Service, append, command, new_id, on_database, running, whole_history
from tests.version_0_1_0.make import ANSWERS, ARCHIVE, answers

NOW = clock.now()
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


def store_as_version_0_1_0(database: Any) -> None:
    """Store what version 0.1.0 (commit cf16023) stored, with its fields in its order and its indexes."""
    conversation: dict[str, Any] = {
        "user_id": "ada",
        "title": None,
        "metadata": {"z": 1, "a": 2},
        "exact_metadata": None,
        "created_at": LONG_AGO,
        "updated_at": LONG_AGO,
        "last_seq": 2,
        "message_count": 2,
        "expires_at": None,
    }
    past = {"expires_at": NOW - timedelta(days=1)}
    database.conversations.insert_many(
        [{"_id": "kept", **conversation}, {"_id": "past", **conversation, **past}]
    )
    database.messages.insert_many(
        {
            "_id": f"{key}/m{seq}",
            "conversation_id": key,
            "user_id": "ada",
            "seq": seq,
            "created_at": LONG_AGO,
            "role": "user",
            "content": f"{seq}",
        }
        for key in ("kept", "past")
        for seq in (1, 2)
    )
    listed: list[tuple[str, int]] = [("user_id", 1), ("updated_at", -1), ("_id", 1)]
    database.conversations.create_index(listed, name="user_id_1_updated_at_-1__id_1")
    database.conversations.create_index([("user_id", 1), ("_id", 1)], name="user_id_1__id_1")
    database.conversations.create_index([("expires_at", 1)], name="expires_at_1")
    database.conversations.create_index([("updated_at", 1)], name="updated_at_1")
    for fields in (("seq",), ("created_at",), ("role", "seq")):
        keys = [(name, 1) for name in ("conversation_id", *fields)]
        name = "_".join(f"{field}_1" for field, _ in keys)
        database.messages.create_index(keys, name=name, unique=fields == ("seq",))


async def order_of(chat: ChatService) -> list[str]:
    """Return the list page by page, so that each page begins behind the one before."""
    found: list[str] = []
    after = None
    while True:
        page = await chat.list_conversations("ada", limit=1, after=after)
        found += [each.id for each in page.conversations]
        after = page.next
        if after is None:
            return found


async def test_what_version_0_1_0_stored_opens(service: Service) -> None:
    url = on_database(service.database_url, new_id("old"))
    with MongoClient[dict[str, Any]](url) as operator:
        store_as_version_0_1_0(operator.get_default_database())
        settings = Settings(_env_file=None, mongodb_url=url)
        database = Database(settings)
        await database.open(indexes="build")
        store = ConversationStore(database, settings)
        chat = ChatService(store, TenantScope())
        listed = (await chat.list_conversations("ada")).conversations
        assert {each.id for each in listed} == {"kept", "past"}
        # Until every conversation has an `active_at`, the list keeps the order of the version that has none.
        assert store.lists_by_update
        await chat.get_or_create_conversation("ada", "new")
        await chat.update_conversation("past", title="renamed")
        assert await order_of(chat) == ["past", "new", "kept"]
        (appended,) = (await chat.add_messages("kept", [{"role": "user", "content": "3"}])).messages
        assert appended["seq"] == 3
        assert [each["content"] for each in (await chat.get_chat_history("kept")).messages] == ["1", "2", "3"]
        report = await Verifier(store, repair=False).run()
        assert not report.violations
        parts = [part async for part in UserData(store, TenantScope()).export("ada")]
        assert parts[-1][-1] == {"type": "end", "conversations": 3, "messages": 5}
        await due_times.fill_in(store)
        assert store.lists_by_update
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(due_times, "_WALK_PAUSE", timedelta(0))
            await due_times.fill_in(store)
        assert not store.lists_by_update
        # Activity that nobody noted is taken from the latest change.
        assert await order_of(chat) == ["kept", "past", "new"]
        names = operator.get_default_database().conversations.index_information()
        assert "user_id_1_updated_at_-1__id_1" not in names
        assert await sweep.expire(store) == RemovedCounts(1, 2)
        assert await order_of(chat) == ["kept", "new"]
        await database.close()


@pytest.mark.embedded_engine("it is a data directory of the engine's")
def test_a_data_directory_that_version_0_1_0_made_opens_and_answers_as_it_did(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        # Our own archive; the filters of newer Pythons are not in 3.11.2, which is Debian's.
        archive.extractall(tmp_path)
    then = json.loads(ANSWERS.read_text())
    with running(tmp_path) as service, service.client() as client:
        now = answers(client)
        assert now.keys() == then.keys()
        for path, answer in then.items():
            # In the same order of fields; a later version may say more of a conversation.
            told = now[path] if isinstance(answer, list) else {name: now[path][name] for name in answer}
            assert json.dumps(told) == json.dumps(answer), path
        # A key and an id that were used then are still known.
        old = [each for each in then["/conversations/bob-0/messages"] if each["content"] in ("n0", "n1")]
        keyed = [{"role": "user", "content": f"n{each}"} for each in range(6)]
        assert append(client, "bob-0", *keyed, key="once")[:2] == old
        assert append(client, "eve-1", {"role": "developer", "content": "d", "id": "mine"})[0]["seq"] == 5
        (added,) = append(client, "eve-1", {"role": "user", "content": "new"})
        assert added["seq"] == 12
        assert whole_history(client, "eve-1")[:-1] == then["/conversations/eve-1/messages"]
        lines = client.get("/users/ada/export").text.splitlines()
        assert json.loads(lines[-1])["conversations"] == 3
        verified = command(service, "verify")
        assert (verified.returncode, verified.stdout.split(",")[2]) == (0, " 0 violations"), verified.stdout
        assert client.delete("/users/bob").json()["conversations"] == 2
