"""Missing indexes are built beside the service, by one process, and what cannot be mended is said at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from service.chat_service import ChatService
from service.database import Database, IndexPolicy
from service.database.shared import Leases
from service.errors import DatabaseUnavailable, UnsuitableDatabase
from service.history.store import ConversationStore
from service.settings import Settings
from service.tenancy import TenantScope
from tests.harness import Service, command, new_id, running
from tests.mongo_proxy import MongoProxy, mongo_proxied

MESSAGE = {"role": "user", "content": "x"}
ROLE, UNIQUE = "conversation_id_1_role_1_seq_1", "conversation_id_1_seq_1"


@pytest.fixture
async def proxy(service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MongoProxy]:
    """A MongoDB in which one conversation has a message, and the index by role is missing."""
    monkeypatch.setattr("service.database.indexes._PAUSE_S", 0.1)
    monkeypatch.setattr("service.database.indexes._FIRST_ATTEMPT_S", 0.3)
    monkeypatch.setattr("service.database.opening._RECONNECT_S", 0.1)
    with mongo_proxied(service.database_url, new_id("indexes")) as started:
        database, chat = await opened(started, "require")
        await chat.get_or_create_conversation("ada", "c")
        await chat.add_message("c", MESSAGE)
        await database.close()
        started.latest.messages.drop_index(ROLE)
        started.forget()
        yield started
        started.forget()


async def opened(
    proxy: MongoProxy, indexes: IndexPolicy = "build", **changed: Any
) -> tuple[Database, ChatService]:
    settings = Settings(_env_file=None, mongodb_url=proxy.url, database_timeout_ms=2_000, **changed)
    database = Database(settings)
    await database.open(indexes=indexes)
    return database, ChatService(ConversationStore(database, settings), TenantScope())


async def until(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it took too long")


async def is_served(chat: ChatService) -> None:
    before = len((await chat.get_chat_history("c")).messages)
    await chat.add_message("c", MESSAGE)
    assert len((await chat.get_chat_history("c")).messages) == before + 1


PASSING = [
    (276, "IndexBuildAborted"),
    (117, "ConflictingOperationInProgress"),
    (13388, "StaleConfig"),
    (50, "x"),
]


async def test_reads_and_appends_are_served_while_a_build_fails_and_is_tried_again(proxy: MongoProxy) -> None:
    rules = [proxy.fail("createIndexes", *each) for each in PASSING]
    held = proxy.rule("createIndexes", delay_s=0.5)
    database, chat = await opened(proxy)
    assert await database.is_ready()
    assert database.indexes.missing == [f"messages.{ROLE}"]
    await is_served(chat)
    await until(lambda: held.done)
    assert all(rule.done for rule in rules)
    await is_served(chat)
    await until(lambda: not database.indexes.missing)
    assert ROLE in proxy.latest.messages.index_information()
    assert not any("maxTimeMS" in each for each in proxy.commands("createIndexes"))
    assert await database.leases.take("indexes", 1), "the lease was given back"
    await database.close()


async def test_without_the_unique_index_no_call_is_served_until_it_is_built(proxy: MongoProxy) -> None:
    proxy.latest.messages.drop_index(UNIQUE)
    building = proxy.fail("createIndexes", 276, "IndexBuildAborted", times=3)
    database, chat = await opened(proxy)
    assert not await database.is_ready()
    assert f"messages.{UNIQUE}" in database.why_not_ready
    with pytest.raises(DatabaseUnavailable, match="keeps each `seq` unique"):
        await chat.get_chat_history("c")
    await until(lambda: database._prepared)
    assert building.done == 3
    await is_served(chat)
    await until(lambda: not database.indexes.missing)
    await database.close()


async def test_stored_messages_that_contradict_the_unique_index_end_the_start(proxy: MongoProxy) -> None:
    proxy.latest.messages.drop_index(UNIQUE)
    messages = proxy.latest.messages
    messages.insert_one({**(messages.find_one() or {}), "_id": "c/double"})
    with pytest.raises(UnsuitableDatabase, match=r"code 11000.*chat-history verify"):
        await opened(proxy)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (13, r"`createIndex`, and these indexes are missing: messages\.conversation_id_1_role_1_seq_1"),
        (18, "refuses the user name or the password"),
        (67, r"cannot be made \(code 67\)"),
        (85, r"drop that index"),
        (86, r"db\.messages\.dropIndex"),
    ],
)
async def test_what_never_becomes_right_ends_the_start_and_says_what_to_do(
    proxy: MongoProxy, code: int, says: str
) -> None:
    proxy.fail("createIndexes", code, "No", times=1_000)
    with pytest.raises(UnsuitableDatabase, match=says):
        await opened(proxy)


async def test_a_role_without_create_index_serves_where_all_indexes_are_there(proxy: MongoProxy) -> None:
    proxy.latest.messages.create_index(
        [("conversation_id", 1), ("role", 1), ("seq", 1)], name="by_hand", sparse=False
    )
    refused = proxy.fail("createIndexes", 13, "Unauthorized", times=1_000)
    database, chat = await opened(proxy)
    await is_served(chat)
    assert not refused.done
    assert not database.indexes.missing
    await database.close()


async def test_while_another_process_has_the_lease_this_one_builds_nothing(proxy: MongoProxy) -> None:
    first, _ = await opened(proxy, "ignore")
    other = Leases(first._connection)
    assert await other.take("indexes", 60)
    database, chat = await opened(proxy)
    await is_served(chat)
    await asyncio.sleep(0.5)
    assert not proxy.commands("createIndexes")
    assert database.indexes.missing
    await other.release("indexes")
    await until(lambda: not database.indexes.missing)
    await database.close()
    await first.close()


async def test_the_indexes_of_empty_collections_are_made_by_whoever_opens_them(proxy: MongoProxy) -> None:
    proxy.engine.drop_database(proxy.database)
    database, _ = await opened(proxy, "require")
    assert not database.indexes.missing
    assert {UNIQUE, ROLE} < proxy.latest.messages.index_information().keys()
    by_due_time = proxy.latest.conversations.index_information()["due_at_1__id_1"]
    assert by_due_time["partialFilterExpression"] == {"due_at": {"$type": "date"}}
    await database.close()


# -- the audit trail -------------------------------------------------------------------------------------


def expiry(proxy: MongoProxy) -> Any:
    return proxy.latest.audit.index_information()["at_1"]["expireAfterSeconds"]


async def test_another_number_of_audit_days_is_changed_in_place(proxy: MongoProxy) -> None:
    for days, changes in ((30, 0), (7, 1), (7, 1), (8, 2)):
        database, _ = await opened(proxy, "require", audit_days=days)
        await database.close()
        assert expiry(proxy) == days * 86_400
        assert len(proxy.commands("collMod")) == changes
    assert not proxy.commands("dropIndexes")


async def test_where_coll_mod_is_refused_the_service_warns_and_goes_on(
    proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = await opened(proxy, "require", audit_days=30)
    await database.close()
    log = MagicMock()
    monkeypatch.setattr("service.database.indexes.log", log)
    proxy.fail("collMod", 13, "Unauthorized", times=1_000)
    database, chat = await opened(proxy, "require", audit_days=7)
    await is_served(chat)
    await database.close()
    assert expiry(proxy) == 30 * 86_400
    (warning,) = [call for call in log.warning.mock_calls if call.args[0] == "audit_days_not_changed"]
    assert (
        'db.runCommand({collMod: "audit", index: {name: "at_1", expireAfterSeconds: 604800}})'
        in (warning.kwargs["detail"])
    )


# -- as an operator sees it ------------------------------------------------------------------------------


@pytest.mark.embedded_engine("the engine has its own indexes")
def test_the_command_finds_nothing_to_build_on_the_embedded_engine(service: Service) -> None:
    done = command(service, "indexes")
    assert (done.returncode, done.stdout) == (0, "all indexes are there\n"), done.stderr


def test_a_build_is_reported_and_the_command_builds_and_sigterm_does_not_wait_for_one(
    proxy: MongoProxy, service: Service, tmp_path: Path
) -> None:
    proxy.rule("createIndexes", delay_s=120, times=1_000)
    with running(tmp_path, mongodb_url=proxy.url, metrics="true") as started, started.client() as client:
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert ready.json() == {"status": "ready", "missing_indexes": [f"messages.{ROLE}"]}
        assert "chat_missing_indexes 1.0" in client.get("/metrics").text
        # The command takes another way to the same database, because the service's build hangs in the first.
        with mongo_proxied(service.database_url, proxy.database) as beside:
            built = command(started, "indexes", CHAT_MONGODB_URL=beside.url)
        assert (built.returncode, built.stdout.splitlines()) == (
            0,
            [f"building messages.{ROLE}", f"built messages.{ROLE}", "all indexes are there"],
        ), built.stderr
        assert ROLE in proxy.latest.messages.index_information()
        assert started.stop(timeout_s=20) == 0
        proxy.rules.clear()
        proxy.latest.messages.drop_index(ROLE)
        passing = proxy.fail("createIndexes", 276, "IndexBuildAborted", message="aborted")
        proxy.fail("createIndexes", 13, "Unauthorized", message="not authorized")
        refused = command(started, "indexes")
        assert passing.done
        assert refused.returncode == 1
        assert "trying again in 1 s: OperationFailure (code 276), aborted" in refused.stderr
        assert "lacks a privilege (code 13): `createIndex`" in refused.stderr
