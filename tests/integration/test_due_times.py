"""When conversations are due: set by each write, filled in for earlier versions, and read by a sweep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service import clock
from service.chat_service import ChatService
from service.database import Database
from service.history import retention
from service.history.store import ConversationStore
from service.maintenance import due_times, sweep
from service.settings import Settings
from service.tenancy import TenantScope
from service.user_data.erasure import RemovedCounts
from tests.harness import Service, new_id
from tests.mongo_proxy import MongoProxy, mongo_proxied

DAY = timedelta(days=1)
NOW = clock.now()


@pytest.fixture
async def proxy(service: Service) -> AsyncIterator[MongoProxy]:
    with mongo_proxied(service.database_url, new_id("due")) as started:
        yield started
        started.forget()


async def opened(proxy: MongoProxy, **changed: Any) -> ConversationStore:
    settings = Settings(_env_file=None, mongodb_url=proxy.url, **changed)
    database = Database(settings)
    await database.open()
    return ConversationStore(database, settings)


def stored(key: str, **fields: Any) -> dict[str, Any]:
    """Return a conversation as version 0.1.0 stored it."""
    return {
        "_id": key,
        "user_id": "ada",
        "title": None,
        "metadata": {},
        "exact_metadata": None,
        "created_at": NOW - 400 * DAY,
        "updated_at": NOW,
        "last_seq": 0,
        "message_count": 0,
        "expires_at": None,
        **fields,
    }


def due(proxy: MongoProxy) -> dict[str, Any]:
    return {each["_id"]: each.get("due_at", "missing") for each in proxy.latest.conversations.find()}


async def test_each_write_leaves_a_due_time_that_is_not_too_late(proxy: MongoProxy) -> None:
    store = await opened(proxy, retention_days=7)
    chat = ChatService(store, TenantScope())
    conversations = proxy.latest.conversations
    for key, expires_at in (("none", None), ("soon", NOW + DAY), ("late", NOW + 99 * DAY)):
        await chat.get_or_create_conversation("ada", key, expires_at=expires_at)
        await chat.add_message(key, {"role": "user"})
    made = {each["_id"]: each["created_at"] for each in conversations.find()}
    expected = {"none": made["none"] + 7 * DAY, "soon": NOW + DAY, "late": made["late"] + 7 * DAY}
    assert due(proxy) == expected
    await chat.update_conversation("soon", expires_at=None)
    await chat.update_conversation("late", expires_at=NOW + 2 * DAY)
    # A change that is no message is no activity.
    latest = conversations.find_one({"_id": "soon"})["active_at"] + 7 * DAY
    found = due(proxy)
    assert found.pop("soon") == latest
    assert found == {"none": expected["none"], "late": NOW + 2 * DAY}
    await store.database.close()


async def test_what_an_earlier_version_stored_is_filled_in_once_for_each_setting(
    proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.latest.conversations.insert_many(
        [
            stored("a"),
            stored("acme/a"),
            stored("expires", expires_at=NOW - DAY),
            stored("going", user_id="", expires_at=NOW - DAY),
            {"_id": "malformed", "expires_at": NOW + DAY},
            *(stored(f"old{n:02}", updated_at=NOW - 100 * DAY) for n in range(20)),
        ]
    )
    monkeypatch.setattr(due_times, "_WALK_ITEMS", 7)
    store = await opened(proxy)
    await due_times.fill_in(store)
    assert {key for key, each in due(proxy).items() if isinstance(each, datetime)} == {"expires", "malformed"}
    proxy.forget()
    await due_times.fill_in(store)
    assert len(proxy.commands("find")) == 1  # it is done
    await store.database.close()
    # Other settings, in a walk that goes on where it was interrupted.
    settings = {"retention_days": 30, "retention_days_by_tenant": {"acme": 1000}}
    monkeypatch.setattr(due_times, "_WALK_S", 0)
    left = []
    for _ in range(4):
        store = await opened(proxy, **settings)
        await due_times.fill_in(store)
        left.append(sum(each in (None, "missing") for each in due(proxy).values()))
        await store.database.close()
    # The last one is being deleted, so it is never due.
    assert left == [19, 12, 5, 1]
    assert due(proxy)["a"] == NOW + 30 * DAY
    assert due(proxy)["acme/a"] == NOW + 1000 * DAY
    assert due(proxy)["expires"] == NOW - DAY
    assert due(proxy)["old07"] == NOW - 70 * DAY


async def test_a_second_walk_finds_what_an_earlier_version_wrote_beside_the_first(
    proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(proxy)
    await due_times.fill_in(store)
    proxy.latest.conversations.insert_one(stored("beside", expires_at=NOW))
    await due_times.fill_in(store)
    assert due(proxy) == {"beside": "missing"}
    monkeypatch.setattr(due_times, "_WALK_PAUSE", timedelta(0))
    await due_times.fill_in(store)
    assert due(proxy) == {"beside": NOW}
    proxy.forget()
    await due_times.fill_in(store)
    assert len(proxy.commands("find")) == 1
    await store.database.close()


async def test_a_walk_does_not_undo_an_expiry_that_was_set_meanwhile(proxy: MongoProxy) -> None:
    store = await opened(proxy)
    conversation = stored("c", expires_at=NOW + 99 * DAY)
    proxy.latest.conversations.insert_one(conversation)
    await ChatService(store, TenantScope()).update_conversation("c", expires_at=NOW)
    await due_times.set_due_at(store, conversation, NOW + 99 * DAY)
    assert due(proxy) == {"c": NOW}
    await store.database.close()


async def test_a_sweep_sends_the_same_commands_however_many_are_not_due(proxy: MongoProxy) -> None:
    store = await opened(proxy, retention_days=7)
    later = {"expires_at": NOW + DAY, "due_at": NOW + DAY}
    sent = []
    for others in (10, 400):
        proxy.latest.conversations.delete_many({})
        proxy.latest.conversations.insert_many(stored(f"k{n}", **later) for n in range(others))
        # One is removed, and one that was written to after its time had been set is looked at once.
        past = {"expires_at": NOW - DAY, "due_at": NOW - DAY}
        proxy.latest.conversations.insert_many([stored("gone", **past), stored("moved", due_at=NOW - DAY)])
        proxy.forget()
        assert await sweep.expire(store, NOW) == RemovedCounts(1, 0)
        proxy.forget()
        assert await sweep.expire(store, NOW) == RemovedCounts(0, 0)
        answers = [each.answer for each in proxy.seen if each.name == "find"]
        sent.append(
            (
                [each.name for each in proxy.seen],
                [len(each["cursor"]["firstBatch"]) for each in answers if each],
            )
        )
    assert sent[0] == sent[1] == (["find"], [0])
    # Without the type MongoDB does not use the partial index (after its documentation).
    assert proxy.commands("find")[-1]["filter"]["due_at"]["$type"] == "date"
    assert "gone" not in due(proxy)
    assert due(proxy)["moved"] == NOW + 7 * DAY
    await store.database.close()


async def test_the_sweep_reads_along_the_index(service: Service) -> None:
    """The embedded engine's plan; that MongoDB's is the same stands on its documentation."""
    with mongo_proxied(service.database_url, new_id("plan"), hide_engine=False) as proxy:
        store = await opened(proxy)
        await sweep.expire(store, NOW)
        (find,) = [each for each in proxy.commands("find") if "due_at" in each["filter"]]
        query = {"find": find["find"], "filter": find["filter"], "sort": find["sort"]}
        plan = proxy.latest.command("explain", query)["queryPlanner"]["winningPlan"]
        assert "due_at_1__id_1" in str(plan), plan
        await store.database.close()


def test_another_setting_has_another_fingerprint() -> None:
    settings = [
        {},
        {"retention_days": 1},
        {"retention_days_by_tenant": {"a": 1}},
        {"retention_days_by_tenant": {"a": 1, "b": 2}},
    ]
    texts = [retention.fingerprint(Settings(_env_file=None, **each)) for each in settings]  # type: ignore[arg-type]
    assert len(set(texts)) == len(texts)
    turned: dict[str, Any] = {"retention_days_by_tenant": {"b": 2, "a": 1}}
    assert retention.fingerprint(Settings(_env_file=None, **turned)) == texts[-1]


def test_a_time_beyond_the_year_9999_is_never() -> None:
    settings = Settings(_env_file=None, retention_days=36_500)
    late = datetime(9998, 1, 1, tzinfo=UTC)
    assert retention.due_at(settings, "c", expires_at=None, active=late) is None
    assert retention.due_at(settings, "c", expires_at=late, active=late) == late
